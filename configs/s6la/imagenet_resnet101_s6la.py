r"""ResNet-101 on ImageNet with S6LA.

    python -m experiments.train --config=configs/s6la/imagenet_resnet101_s6la.py --workdir=runs/resnet101_s6la

Not run by this project. An independent implementation: no settings and no numbers of S6LA's paper (arXiv:2502.10463)
are known here. The recipe is RLANet's, on whose code S6LA is evidently built.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet("resnet101_s6la")
    config.published.source = "not stated: S6LA's paper could not be read"
    return config
