r"""ResNet-50 on ImageNet with squeeze-and-excitation.

    python -m experiments.train --config=configs/s6la/imagenet_resnet50_se.py --workdir=runs/resnet50_se

Not run by this project. The recipe is RLANet's, for a fair comparison.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet("resnet50_se")
    config.published.source = "not stated: none known for this recipe"
    return config
