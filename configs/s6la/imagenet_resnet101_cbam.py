r"""ResNet-101 on ImageNet with CBAM.

    python -m experiments.train --config=configs/s6la/imagenet_resnet101_cbam.py --workdir=runs/resnet101_cbam

Not run by this project. The recipe is RLANet's, for a fair comparison.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet("resnet101_cbam")
    config.published.source = "not stated: none known for this recipe"
    return config
