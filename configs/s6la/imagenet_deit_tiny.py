r"""DeiT-Ti on ImageNet, the baseline of S6LA and MRLA.

    python -m experiments.train --config=configs/s6la/imagenet_deit_tiny.py --workdir=runs/deit_tiny

Not run by this project. The recipe is DeiT's (arXiv:2012.12877).
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.deit("deit_tiny")
    config.published.update(value=72.2, source="DeiT's README")
    return config
