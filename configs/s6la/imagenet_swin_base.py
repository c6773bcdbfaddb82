r"""Swin-B on ImageNet, the baseline of S6LA.

    python -m experiments.train --config=configs/s6la/imagenet_swin_base.py --workdir=runs/swin_base

Not run by this project. The recipe is Swin's (arXiv:2103.14030).
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.swin("swin_base", drop_path=0.5)
    config.published.update(value=83.5, source="Swin's README")
    return config
