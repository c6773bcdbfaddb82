r"""Progressive resizing on CIFAR-10: 80 epochs at 16 x 16, with a band limit of 0.2, then 20 at 32 x 32 (S4ND, 4.3).

    python -m experiments.train --config=configs/s4nd/cifar10_progressive_16.py --workdir=runs/progressive_16

Not run by this project. As in the authors' final sweeps: each stage has a warm-up and a cosine of its own, and nothing
is augmented. What comes after a colon is the network: `small` (6 x 256), `big` (8 x 512) or `conv2d`, the baseline.
"""

from ml_collections import ConfigDict

from configs.common import cifar10

VARIANTS = ("small", "big", "conv2d")


def get_config(network: str = "small") -> ConfigDict:
    config = cifar10.progressive(16, network)
    config.published.source = "not stated: of S4ND, 22 % faster for about 1 point less (abstract)"
    return config
