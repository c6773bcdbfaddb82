r"""ResNet-152 on ImageNet with RLA.

    python -m experiments.train --config=configs/s6la/imagenet_resnet152_rla.py --workdir=runs/resnet152_rla

Not run by this project. The recipe is RLANet's (arXiv:2110.11852).
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet("resnet152_rla")
    config.published.source = "not stated: none known for this recipe"
    return config
