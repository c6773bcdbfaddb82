r"""S4ND-ISO trained on CIFAR-10 at 32 x 32, tested at 8, 16 and 32 without more training (S4ND, section 4.3).

    python -m experiments.train --config=configs/s4nd/cifar10_zero_shot_32.py --workdir=runs/zero_shot_32

Not run by this project. There is no band limit. What comes after a colon are the initial state matrices, legs by
default, or `conv2d`: cifar10_zero_shot_32.py:diag-lin.
"""

from ml_collections import ConfigDict

from configs.common import cifar10

VARIANTS = (*cifar10.INITS, "conv2d")


def get_config(init: str = "legs") -> ConfigDict:
    config = cifar10.zero_shot(32, init)
    config.published.source = "not stated: the paper's tables could not be read"
    return config
