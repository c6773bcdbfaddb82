r"""PVTv2-B1 on ImageNet, the baseline of S6LA.

    python -m experiments.train --config=configs/s6la/imagenet_pvt_v2_b1.py --workdir=runs/pvt_v2_b1

Not run by this project. The recipe is PVTv2's (arXiv:2106.13797).
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.pvt_v2("pvt_v2_b1")
    config.published.update(value=78.7, source="PVTv2's README")
    return config
