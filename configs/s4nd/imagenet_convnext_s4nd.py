r"""S4ND-ConvNeXt-T on ImageNet (S4ND, arXiv:2210.06583, section 4.1).

    python -m experiments.train --config=configs/s4nd/imagenet_convnext_s4nd.py --workdir=runs/convnext_s4nd

Not run by this project. S4ND in the blocks and the stem, convolutions between the stages: that has the paper's 30.0 M
parameters, from which it is inferred. The config of the release, imagenet_convnext_s4nd.py:released, has S4ND between
the stages too, and 29.4 M.
"""

from ml_collections import ConfigDict

from configs.common import imagenet

VARIANTS = ("", "released")


def get_config(variant: str = "") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"--config=FILE:VARIANT takes released or nothing, got {variant!r}.")
    if variant == "released":
        config = imagenet.convnext_s4nd("convnext_tiny_s4nd", downsample="s4nd")
        config.published.source = "not stated: none for this network"
    else:
        config = imagenet.convnext_s4nd("convnext_tiny_s4nd")
        config.published.update(value=82.2, source="VMamba's table")
    return config
