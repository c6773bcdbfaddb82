r"""Progressive resizing on CIFAR-10 against training at full resolution throughout, small (S4ND, section 4.3).

    python -m experiments.sweep --config=configs/sweeps/progressive.py --config.data_dir=FOLDER

80 % of the epochs at 8 x 8 with a band limit of 0.1, or at 16 x 16 with 0.2, then 20 % at 32 x 32: as the authors have
it, without a limit, which lets modes in that have not been trained, and with the same one; and without, twice as many
epochs, as they too take less time than those at full resolution. The paper's own size is
configs/s4nd/cifar10_progressive_8.py and cifar10_progressive_16.py.
"""

from ml_collections import ConfigDict

from configs.common import cifar10, sweeps

EPOCHS = 3.0
NOTE = "S4ND-ISO of 4 layers of width 32; nothing is augmented, and each stage has a warm-up and a cosine of its own."


def get_config() -> ConfigDict:
    full = cifar10.s4nd(**S4ND)
    rows = {"full": sweeps.row("32 x 32 throughout", run(full))}
    for size in (16, 8):
        rows[f"from_{size}"] = sweeps.row(f"{size} x {size}, then 32 x 32", staged(size, EPOCHS))
    for size in (16, 8):
        label = f"{size} x {size}, then 32 x 32, the same limit"
        rows[f"from_{size}_limited"] = sweeps.row(label, limited(staged(size, EPOCHS)))
    for size in (16, 8):
        label = f"{size} x {size}, then 32 x 32, twice the epochs"
        rows[f"from_{size}_longer"] = sweeps.row(label, staged(size, 2 * EPOCHS))
    return sweeps.sweep("s4nd", {"cifar10": sweeps.table("Progressive resizing on CIFAR-10", NOTE, rows)})


S4ND = {"d_model": 32, "n_layers": 4, "weight_decay": 0.03}


def staged(size: int, epochs: float) -> ConfigDict:
    """First at `size` x `size`."""
    return run(cifar10.staged(cifar10.s4nd(**S4ND), size, epochs=(0.8 * epochs, 0.2 * epochs)), epochs)


def limited(config: ConfigDict) -> ConfigDict:
    """The band limit of the first stage in the last one, too."""
    limit, _ = config.stages.bandlimits
    config.stages.bandlimits = (limit, limit)
    return config


def run(config: ConfigDict, epochs: float = EPOCHS) -> ConfigDict:
    """The paper's recipe for fewer epochs."""
    config.epochs = epochs
    config.optimizer.warmup_epochs = 0.05 * epochs
    config.eval.update(every_epochs=epochs / 5, batch_size=500)
    config.checkpoint_every_epochs = epochs / 10
    return config
