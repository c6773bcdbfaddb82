r"""ResNet-152 on ImageNet with squeeze-and-excitation.

    python -m experiments.train --config=configs/s6la/imagenet_resnet152_se.py --workdir=runs/resnet152_se

Not run by this project. The recipe is RLANet's, for a fair comparison.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet("resnet152_se")
    config.published.source = "not stated: none known for this recipe"
    return config
