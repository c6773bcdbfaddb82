r"""A bottleneck ResNet of 110 layers on CIFAR-10 with S6LA.

    python -m experiments.train --config=configs/s6la/cifar10_resnet110_s6la.py --workdir=runs/cifar10_resnet110_s6la

Not run by this project. An independent implementation: no settings and no numbers of S6LA's paper (arXiv:2502.10463)
are known here.
"""

from ml_collections import ConfigDict

from configs.common import cifar10


def get_config() -> ConfigDict:
    config = cifar10.resnet("resnet_cifar_s6la", depth=110)
    config.published.source = "not stated: S6LA's paper could not be read"
    return config
