r"""S4ND-ISO trained on CIFAR-10 at 8 x 8, tested at 8, 16 and 32 without more training (S4ND, section 4.3).

    python -m experiments.train --config=configs/s4nd/cifar10_zero_shot_8.py --workdir=runs/zero_shot_8

Not run by this project. The band limit, 0.1, is the authors' final one. What comes after a colon are the initial state
matrices, legs by default, or `conv2d`: cifar10_zero_shot_8.py:diag-lin.
"""

from ml_collections import ConfigDict

from configs.common import cifar10

VARIANTS = (*cifar10.INITS, "conv2d")


def get_config(init: str = "legs") -> ConfigDict:
    config = cifar10.zero_shot(8, init)
    config.published.source = "not stated: at 32 x 32, S4ND is 40 points above Conv2D (abstract)"
    return config
