r"""A bottleneck ResNet of 20 layers on CIFAR-10, the baseline of S6LA.

    python -m experiments.train --config=configs/s6la/cifar10_resnet20.py --workdir=runs/cifar10_resnet20

Not run by this project. The weight decay, 1e-4, is the usual one and inferred.
"""

from ml_collections import ConfigDict

from configs.common import cifar10


def get_config() -> ConfigDict:
    config = cifar10.resnet("resnet_cifar", depth=20)
    config.published.source = "not stated: none known for this recipe"
    return config
