"""Recipes for CIFAR-10: S4ND's isotropic networks, and bottleneck ResNets."""

from typing import Any

from ml_collections import ConfigDict

from configs.common import classification

INITS = ("legs", "fourier", "diag-lin", "diag-inv")
"""Initial state matrices that the paper compares; `diag-lin` is most likely what it calls random-linear, ..."""

BANDLIMITS = {32: 0.0, 16: 0.2, 8: 0.1}
"""By the resolution of training: what the authors' final runs have. 0: none."""


def s4nd(*, d_model: int, n_layers: int, weight_decay: float, init: str = "legs", bandlimit: float = 0.0) -> ConfigDict:
    """S4ND-ISO (arXiv:2210.06583, section 4.3): AdamW 0.01, batch 50, 100 epochs of which the first is a warm-up."""
    config = _iso("isotropic_s4nd", d_model, n_layers, weight_decay)
    config.model.mixer = {"mode": "dplr", "d_state": 64, "init": init, "dt_min": 0.1, "dt_max": 1.0}
    if bandlimit:
        config.model.mixer.bandlimit = bandlimit
    return config


def conv2d(*, d_model: int, n_layers: int, weight_decay: float, kernel_size: int = 3) -> ConfigDict:
    """Conv2D-ISO, the same network with depthwise convolutions."""
    config = _iso("isotropic_conv2d", d_model, n_layers, weight_decay)
    config.model.mixer = {"kernel_size": kernel_size}
    return config


def augmented(config: ConfigDict) -> ConfigDict:
    """Adds a random crop of the image with 4 more pixels on each side, and the flip."""
    config.augment.update(crop_padding=4, flip=True)
    return config


def zero_shot(resolution: int, init: str) -> ConfigDict:
    """Training at one resolution, without augmentation, for a test at all of them; `init` may be `conv2d`."""
    size: dict[str, Any] = {"d_model": 256, "n_layers": 6, "weight_decay": 0.03}
    if init == "conv2d":
        config = conv2d(**size)
    elif init in INITS:
        config = s4nd(**size, init=init, bandlimit=BANDLIMITS[resolution])
    else:
        raise ValueError(f"--config=FILE:INIT takes one of {', '.join(INITS)} and conv2d, got {init!r}.")
    config.data.resolution = resolution
    return config


def progressive(resolution: int, network: str) -> ConfigDict:
    """80 epochs at a lower `resolution` and 20 at 32 x 32, each with a warm-up and a cosine of its own."""
    networks = {
        "small": lambda: s4nd(d_model=256, n_layers=6, weight_decay=0.03),
        "big": lambda: s4nd(d_model=512, n_layers=8, weight_decay=0.05),
        "conv2d": lambda: conv2d(d_model=256, n_layers=6, weight_decay=0.03),
    }
    if network not in networks:
        raise ValueError(f"--config=FILE:NETWORK takes one of {', '.join(networks)}, got {network!r}.")
    return staged(networks[network](), resolution, epochs=(80.0, 20.0))


def staged(config: ConfigDict, resolution: int, *, epochs: tuple[float, float]) -> ConfigDict:
    """Trains at a lower `resolution`, with the authors' band limit if it is S4ND, and then at 32 x 32."""
    bandlimit = BANDLIMITS[resolution] if config.model.name == "isotropic_s4nd" else 0.0
    config.stages.update(epochs=epochs, resolutions=(resolution, 32), bandlimits=(bandlimit, 0.0))
    return config


def resnet(name: str, *, depth: int, **model: Any) -> ConfigDict:
    """The usual recipe for small ResNets, here with bottlenecks: SGD 0.1, 180 epochs, a tenth after 100 and 150."""
    config = augmented(_common(name, {"depth": depth, **model}))
    config.batch_size = 128
    config.epochs = 180.0
    config.optimizer.update(name="sgd", lr=0.1, ssm_lr=0.1, weight_decay=1e-4, decay_rule="all")
    config.optimizer.decay_epochs = (100.0, 150.0)
    return config


def _iso(name: str, d_model: int, n_layers: int, weight_decay: float) -> ConfigDict:
    config = _common(name, {"d_model": d_model, "n_layers": n_layers, "dropout": 0.1})
    config.seed = 2222
    config.batch_size = 50
    config.epochs = 100.0
    # All decays: biases and norms too until S4's version 4, which is newer than the paper.
    config.optimizer.update(lr=1e-2, ssm_lr=1e-3, weight_decay=weight_decay, decay_rule="all", warmup_epochs=1.0)
    config.eval.resolutions = (8, 16, 32)
    return config


def _common(name: str, model: dict[str, Any]) -> ConfigDict:
    config = classification.get_config()
    config.model = {"name": name, **model}
    config.data.name = "cifar10"
    config.eval.batch_size = 200
    config.log_every_steps = 100
    config.published.metric = "accuracy"
    return config
