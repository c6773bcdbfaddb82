r"""ResNet-50 on ImageNet with RLA.

    python -m experiments.train --config=configs/s6la/imagenet_resnet50_rla.py --workdir=runs/resnet50_rla

Not run by this project. The recipe is RLANet's (arXiv:2110.11852). RLA-ECA-ResNet-50, with ECA in the
blocks too, is imagenet_resnet50_rla.py:eca.
"""

from ml_collections import ConfigDict

from configs.common import imagenet

VARIANTS = ("", "eca")


def get_config(attention: str = "") -> ConfigDict:
    if attention not in VARIANTS:
        raise ValueError(f"--config=FILE:ATTENTION takes eca or nothing, got {attention!r}.")
    config = imagenet.resnet("resnet50_rla", channel_attention=attention or "none")
    config.published.update(value=77.85 if attention else 77.17, source="RLANet's README")
    return config
