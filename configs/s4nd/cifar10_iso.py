r"""S4ND-ISO on CIFAR-10 at 32 x 32: 8 blocks of width 512 (S4ND, arXiv:2210.06583, section 4.3).

    python -m experiments.train --config=configs/s4nd/cifar10_iso.py --workdir=runs/cifar10_iso \
        --config.data.dir=$HOME/tensorflow_datasets

Not run to its end by this project. The size is that of 5.3 M parameters, the paper's. Its code had a warm-up of 1,000
steps and a cosine of 100,000, which stopped at 90,000: here as in its release, 900 and 90,000.
"""

from ml_collections import ConfigDict

from configs.common import cifar10


def get_config() -> ConfigDict:
    config = cifar10.augmented(cifar10.s4nd(d_model=512, n_layers=8, weight_decay=0.05))
    config.published.update(value=94.1, source="S4ND's paper; recalled, not verified")
    return config
