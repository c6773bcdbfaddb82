r"""S4ND-ISO on CIFAR-10 at 32 x 32: 6 blocks of width 256, the smaller network of S4ND's authors (arXiv:2210.06583).

    python -m experiments.train --config=configs/s4nd/cifar10_iso_small.py --workdir=runs/cifar10_iso_small

Not run by this project. The size and the weight decay are those of the authors' final sweeps.
"""

from ml_collections import ConfigDict

from configs.common import cifar10


def get_config() -> ConfigDict:
    config = cifar10.augmented(cifar10.s4nd(d_model=256, n_layers=6, weight_decay=0.03))
    config.published.source = "not stated: the paper's tables could not be read"
    return config
