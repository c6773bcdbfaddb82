r"""Swin-T on ImageNet with S6LA.

    python -m experiments.train --config=configs/s6la/imagenet_swin_tiny_s6la.py --workdir=runs/swin_tiny_s6la

Not run by this project. An independent implementation: no settings and no numbers of S6LA's paper (arXiv:2502.10463)
are known here. The recipe is Swin's; S6LA in a network without a class token is this project's reading.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.swin("swin_tiny_s6la", drop_path=0.2)
    config.published.source = "not stated: S6LA's paper could not be read"
    return config
