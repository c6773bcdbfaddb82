r"""Progressive resizing on CIFAR-10 against training at full resolution throughout, small (S4ND, section 4.3).

    python -m experiments.sweep --config=configs/sweeps/progressive.py --config.data_dir=FOLDER

80 % of the epochs at 8 x 8 with a band limit of 0.1, or at 16 x 16 with 0.2, then 20 % at 32 x 32: as the authors have
it, without a limit, which lets modes in that have not been trained, and with the same one. A table of 3 epochs, and one
of 6, which take less time with smaller images than 3 at full resolution. The paper's own size is
configs/s4nd/cifar10_progressive_8.py and cifar10_progressive_16.py.
"""

from ml_collections import ConfigDict

from configs.common import cifar10, sweeps

S4ND = {"d_model": 32, "n_layers": 4, "weight_decay": 0.03}
NOTE = "S4ND-ISO of 4 layers of width 32; nothing is augmented, and each stage has a warm-up and a cosine of its own."


def get_config() -> ConfigDict:
    few = rows(3.0)
    for size in (16, 8):
        label = f"{size} x {size}, then 32 x 32, the same limit"
        few[f"from_{size}_limited"] = sweeps.row(label, limited(staged(size, 3.0)))
    tables = {
        "cifar10": sweeps.table("Progressive resizing on CIFAR-10, 3 epochs", NOTE, few),
        "cifar10_longer": sweeps.table("Progressive resizing on CIFAR-10, 6 epochs", NOTE, rows(6.0)),
    }
    return sweeps.sweep("s4nd", tables)


def rows(epochs: float) -> dict[str, ConfigDict]:
    """Full resolution, and the two ways to get there."""
    found = {"full": sweeps.row("32 x 32 throughout", run(cifar10.s4nd(**S4ND), epochs))}
    for size in (16, 8):
        found[f"from_{size}"] = sweeps.row(f"{size} x {size}, then 32 x 32", staged(size, epochs))
    return found


def staged(size: int, epochs: float) -> ConfigDict:
    """First at `size` x `size`."""
    return run(cifar10.staged(cifar10.s4nd(**S4ND), size, epochs=(0.8 * epochs, 0.2 * epochs)), epochs)


def limited(config: ConfigDict) -> ConfigDict:
    """The band limit of the first stage in the last one, too."""
    limit, _ = config.stages.bandlimits
    config.stages.bandlimits = (limit, limit)
    return config


def run(config: ConfigDict, epochs: float) -> ConfigDict:
    """The paper's recipe for fewer epochs."""
    config.epochs = epochs
    config.optimizer.warmup_epochs = 0.05 * epochs
    config.eval.update(every_epochs=epochs / 5, batch_size=500)
    config.checkpoint_every_epochs = epochs / 10
    return config
