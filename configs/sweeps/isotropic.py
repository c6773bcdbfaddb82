r"""S4ND-ISO against Conv2D-ISO of as many parameters on CIFAR-10 at full resolution, small (S4ND, section 4.3).

    python -m experiments.sweep --config=configs/sweeps/isotropic.py --config.data_dir=FOLDER

The paper's own size is configs/s4nd/cifar10_iso.py and cifar10_iso_conv2d.py.
"""

from ml_collections import ConfigDict

from configs.common import cifar10, sweeps

EPOCHS = 3.0


def get_config() -> ConfigDict:
    rows = {
        "s4nd": sweeps.row("S4ND-ISO", run(cifar10.s4nd(d_model=32, n_layers=4, weight_decay=0.03))),
        "conv2d": sweeps.row("Conv2D-ISO", run(cifar10.conv2d(d_model=96, n_layers=4, weight_decay=0.03))),
    }
    note = "4 layers, S4ND of width 32 and Conv2D of width 96; images are cropped and mirrored at random."
    return sweeps.sweep("s4nd", {"cifar10": sweeps.table("Isotropic networks on CIFAR-10", note, rows)})


def run(config: ConfigDict) -> ConfigDict:
    """The paper's recipe for fewer epochs."""
    config.epochs = EPOCHS
    config.optimizer.warmup_epochs = 0.1 * EPOCHS
    config.eval.update(every_epochs=EPOCHS / 2, batch_size=500)
    config.checkpoint_every_epochs = EPOCHS / 6
    return cifar10.augmented(config)
