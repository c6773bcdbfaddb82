r"""DeiT-Ti on ImageNet with S6LA.

    python -m experiments.train --config=configs/s6la/imagenet_deit_tiny_s6la.py --workdir=runs/deit_tiny_s6la

Not run by this project. An independent implementation: no settings and no numbers of S6LA's paper (arXiv:2502.10463)
are known here. The recipe is DeiT's, with the batch of the authors' command, 4 x 256.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.deit("deit_tiny_s6la")
    config.published.source = "not stated: S6LA's paper could not be read"
    return config
