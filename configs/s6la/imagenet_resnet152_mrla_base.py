r"""ResNet-152 on ImageNet with MRLA-base.

    python -m experiments.train --config=configs/s6la/imagenet_resnet152_mrla_base.py --workdir=runs/resnet152_mrla_base

Not run by this project. The recipe is MRLA's (arXiv:2302.03985); when the rate falls, counted from the end of the
warm-up, is inferred. A block remembers the maps of all blocks before it in its stage, which takes memory: give
--config.accumulate=2 or more if it is not enough.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet_mrla("resnet152_mrla_base")
    config.published.source = "not stated: none known for this recipe"
    return config
