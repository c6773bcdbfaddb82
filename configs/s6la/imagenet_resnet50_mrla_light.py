r"""ResNet-50 on ImageNet with MRLA-light.

    python -m experiments.train --config=configs/s6la/imagenet_resnet50_mrla_light.py --workdir=runs/resnet50_light

Not run by this project. The recipe is MRLA's (arXiv:2302.03985); when the rate falls, counted from the end of the
warm-up, is inferred.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet_mrla("resnet50_mrla_light")
    config.published.update(value=77.75, source="MRLA's checkpoint names")
    return config
