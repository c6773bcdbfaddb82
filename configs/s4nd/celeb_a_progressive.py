r"""Progressive resizing of S4ND-ConvNeXt-M on CelebA: at 64 x 64, then at 128 x 128 (S4ND, section 4.3).

    python -m experiments.train --config=configs/s4nd/celeb_a_progressive.py --workdir=runs/celeb_a_progressive

Not run by this project. 16 epochs and 4, or 12 and 8 with celeb_a_progressive.py:12-8, both with a band limit of 0.1,
for images of 160 x 160, at which the network is tested too.
"""

from ml_collections import ConfigDict

from configs.common import celeb_a

VARIANTS = ("16-4", "12-8")


def get_config(epochs: str = "16-4") -> ConfigDict:
    if epochs not in VARIANTS:
        raise ValueError(f"--config=FILE:EPOCHS takes one of {', '.join(VARIANTS)}, got {epochs!r}.")
    config = celeb_a.convnext("convnext_micro_s4nd", resolution=128, weight_decay=1.0)
    config.stages.epochs = tuple(map(float, epochs.split("-")))
    config.stages.update(resolutions=(64, 128), bandlimits=(0.1, 0.1))
    config.published.source = "not stated: the paper's tables could not be read"
    return config
