r"""Conv2D-ISO on CIFAR-10 at 32 x 32, the baseline of S4ND-ISO (S4ND, arXiv:2210.06583, section 4.3).

    python -m experiments.train --config=configs/s4nd/cifar10_iso_conv2d.py --workdir=runs/cifar10_iso_conv2d

Not run by this project. 3 x 3 depthwise convolutions have the 2.2 M parameters of the paper, as have the 5 x 5 ones of
cifar10_iso_conv2d.py:5x5; which of them it is about is not known. The weight decay is that of S4ND-ISO.
"""

from ml_collections import ConfigDict

from configs.common import cifar10

VARIANTS = ("3x3", "5x5")


def get_config(kernel: str = "3x3") -> ConfigDict:
    if kernel not in VARIANTS:
        raise ValueError(f"--config=FILE:KERNEL takes one of {', '.join(VARIANTS)}, got {kernel!r}.")
    config = cifar10.conv2d(d_model=512, n_layers=8, weight_decay=0.05, kernel_size=int(kernel[0]))
    config.published.update(value=93.7, source="S4ND's paper; recalled, not verified")
    return cifar10.augmented(config)
