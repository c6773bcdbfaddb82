r"""A bottleneck ResNet of 56 layers on CIFAR-10, the baseline of S6LA.

    python -m experiments.train --config=configs/s6la/cifar10_resnet56.py --workdir=runs/cifar10_resnet56

Not run by this project. The weight decay, 1e-4, is the usual one and inferred.
"""

from ml_collections import ConfigDict

from configs.common import cifar10


def get_config() -> ConfigDict:
    config = cifar10.resnet("resnet_cifar", depth=56)
    config.published.source = "not stated: none known for this recipe"
    return config
