r"""ConvNeXt-M on CelebA's 40 attributes, the baseline of S4ND-ConvNeXt-M (S4ND, arXiv:2210.06583, section 4.3).

    python -m experiments.train --config=configs/s4nd/celeb_a_convnext.py --workdir=runs/celeb_a_convnext

Not run by this project. What comes after a colon is the resolution of the training images: 160 (the default), 128 or
64; all are tested at the three of them. The crop of the images is not known: here the middle, 178 x 178, resized.
"""

from ml_collections import ConfigDict

from configs.common import celeb_a

VARIANTS = ("160", "128", "64")


def get_config(resolution: str = "160") -> ConfigDict:
    if resolution not in VARIANTS:
        raise ValueError(f"--config=FILE:RESOLUTION takes one of {', '.join(VARIANTS)}, got {resolution!r}.")
    config = celeb_a.convnext("convnext_micro", resolution=int(resolution), weight_decay=0.1)
    if resolution == "160":
        config.published.update(value=91.0, source="S4ND's paper; recalled, not verified")
    else:
        config.published.source = "not stated: the paper's tables could not be read"
    return config
