r"""ResNet-50 on ImageNet, the baseline of S6LA and its peers.

    python -m experiments.train --config=configs/s6la/imagenet_resnet50.py --workdir=runs/resnet50

Not run by this project. The recipe is RLANet's, for a fair comparison.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet("resnet50")
    config.published.source = "not stated: none known for this recipe"
    return config
