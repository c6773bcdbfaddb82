r"""Swin-T on ImageNet, the baseline of S6LA.

    python -m experiments.train --config=configs/s6la/imagenet_swin_tiny.py --workdir=runs/swin_tiny

Not run by this project. The recipe is Swin's (arXiv:2103.14030).
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.swin("swin_tiny", drop_path=0.2)
    config.published.update(value=81.2, source="Swin's README")
    return config
