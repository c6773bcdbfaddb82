r"""Progressive resizing on CIFAR-10 against training at full resolution throughout, small (S4ND, section 4.3).

    python -m experiments.sweep --config=configs/sweeps/progressive.py --config.data_dir=FOLDER

80 % of the epochs at 8 x 8 with a band limit of 0.1, or at 16 x 16 with 0.2, then 20 % at 32 x 32. The paper's own size
is configs/s4nd/cifar10_progressive_8.py and cifar10_progressive_16.py.
"""

from ml_collections import ConfigDict

from configs.common import cifar10, sweeps

EPOCHS = 3.0
NOTE = "S4ND-ISO of 4 layers of width 32; nothing is augmented, and each stage has a warm-up and a cosine of its own."


def get_config() -> ConfigDict:
    full = cifar10.s4nd(**S4ND)
    rows = {"full": sweeps.row("32 x 32 throughout", run(full))}
    for size in (16, 8):
        stages = cifar10.staged(cifar10.s4nd(**S4ND), size, epochs=(0.8 * EPOCHS, 0.2 * EPOCHS))
        rows[f"from_{size}"] = sweeps.row(f"{size} x {size}, then 32 x 32", run(stages))
    return sweeps.sweep("s4nd", {"cifar10": sweeps.table("Progressive resizing on CIFAR-10", NOTE, rows)})


S4ND = {"d_model": 32, "n_layers": 4, "weight_decay": 0.03}


def run(config: ConfigDict) -> ConfigDict:
    """The paper's recipe for fewer epochs."""
    config.epochs = EPOCHS
    config.optimizer.warmup_epochs = 0.05 * EPOCHS
    config.eval.update(every_epochs=EPOCHS / 5, batch_size=500)
    config.checkpoint_every_epochs = EPOCHS / 10
    return config
