r"""DeiT-Ti on ImageNet with MRLA-light.

    python -m experiments.train --config=configs/s6la/imagenet_deit_tiny_mrla_light.py --workdir=runs/deit_tiny_light

Not run by this project. The recipe is DeiT's; MRLA's settings for it are not known here.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.deit("deit_tiny_mrla_light")
    config.published.source = "not stated: none known for this recipe"
    return config
