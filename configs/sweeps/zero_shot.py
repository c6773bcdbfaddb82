r"""Zero-shot change of resolution on CIFAR-10, as far as a CPU gets in hours (S4ND, arXiv:2210.06583, section 4.3).

    python -m experiments.sweep --config=configs/sweeps/zero_shot.py --config.data_dir=FOLDER

Trained at 8 x 8, 16 x 16 or 32 x 32 and tested at all three: S4ND with several band limits and initial state matrices,
and convolutions of 3 x 3 pixels in a network of as many parameters. Of training at 32 x 32 this is also the comparison
of S4ND-ISO and Conv2D-ISO. The paper's own size is configs/s4nd/cifar10_zero_shot_8.py and its neighbours. What comes
after a colon are the resolutions of training, with commas between; by default all.
"""

from ml_collections import ConfigDict

from configs.common import cifar10, sweeps

EPOCHS = {8: 4.0, 16: 1.5, 32: 1.0}
"""By resolution of training."""

BANDLIMITS = {8: (0.0, 0.5, 0.2, 0.1, 0.05), 16: (0.0, 0.5, 0.2, 0.1, 0.05), 32: (0.0, 0.1)}
"""By resolution of training; 0: none."""

SIZES = {
    8: {"s4nd": 64, "conv2d": 152},
    16: {"s4nd": 32, "conv2d": 96},
    32: {"s4nd": 32, "conv2d": 96},
}
"""Widths with about as many parameters, by resolution of training."""


def get_config(argument: str = "") -> ConfigDict:
    chosen = argument.split(",") if argument else list(map(str, EPOCHS))
    if unknown := set(chosen) - set(map(str, EPOCHS)):
        raise ValueError(
            f"--config=configs/sweeps/zero_shot.py:RESOLUTIONS takes any of {', '.join(map(str, EPOCHS))}, got "
            f"{', '.join(sorted(unknown))!r}."
        )
    return sweeps.sweep("s4nd", {f"from_{size}": table(size) for size in EPOCHS if str(size) in chosen})


def table(resolution: int) -> ConfigDict:
    """Its band limits with LegS, from 8 x 8 the other initial state matrices with that of 0.1, and convolutions."""
    widths = SIZES[resolution]
    network = {"n_layers": 4, "weight_decay": 0.03}
    cases = [("legs", limit) for limit in BANDLIMITS[resolution]]
    if resolution == 8:
        cases += [(init, 0.1) for init in cifar10.INITS if init != "legs"]
    rows = {"conv2d": sweeps.row("Conv2D", run(resolution, cifar10.conv2d(d_model=widths["conv2d"], **network)))}
    for init, limit in cases:
        name = f"s4nd_{init}_{round(100 * limit):03d}".replace("-", "_")
        label = f"S4ND, {init}, " + (f"band limit {limit:g}" if limit else "no band limit")
        config = cifar10.s4nd(d_model=widths["s4nd"], **network, init=init, bandlimit=limit)
        rows[name] = sweeps.row(label, run(resolution, config))
    note = (
        f"Isotropic networks of 4 layers, S4ND of width {widths['s4nd']} and Conv2D of width {widths['conv2d']}; "
        "nothing is augmented."
    )
    return sweeps.table(f"Trained on CIFAR-10 at {resolution} x {resolution}", note, rows)


def run(resolution: int, config: ConfigDict) -> ConfigDict:
    """A recipe of the paper, for fewer epochs."""
    config.data.resolution = resolution
    config.epochs = EPOCHS[resolution]
    config.optimizer.warmup_epochs = 0.1 * config.epochs
    config.eval.update(every_epochs=config.epochs / 2, batch_size=500)
    config.checkpoint_every_epochs = config.epochs / 4
    return config
