"""S4ND layers and networks from the weights of the authors' PyTorch release (github.com/state-spaces/s4).

A state is that release's `state_dict`, as a mapping of names to arrays; a config holds the arguments that the PyTorch
module was built with.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from ssm_jax.layers.s4nd import S4ND
from ssm_jax.models.isotropic import Isotropic, isotropic_s4nd
from ssm_jax.pretrained.load import load_torch

_ARGUMENTS = {
    "d_model": "d_model",
    "dim": "dims",
    "l_max": "l_max",
    "channels": "channels",
    "out_channels": "out_channels",
    "linear": "linear_output",
    "dropout": "dropout",
    "trank": "trank",
    "d_state": "d_state",
    "n_ssm": "n_ssm",
    "bidirectional": "bidirectional",
    "bandlimit": "bandlimit",
    "dt_tie": "dt_tie",
    "dt_transform": "dt_transform",
    "real_transform": "real_transform",
    "imag_transform": "imag_transform",
}
"""Official arguments that change the function, and ours. Their defaults are the same."""

_MODES = {"diag": "diag", "s4d": "diag", "dplr": "dplr", "nplr": "dplr", "s4": "dplr"}

_INITIAL = {
    *("_name_", "B_init", "B_scale", "P_scale", "contract_version", "deterministic", "dt_max", "dt_min", "imag_random"),
    *("imag_scale", "init", "initializer", "lr", "normalize", "real_random", "real_scale", "tie_dropout", "transposed"),
    "verbose",
}
"""Official arguments that change only initial values, optimization, or the order of axes."""

_ONLY = {"mode": tuple(_MODES), "weight_norm": (False,), "activation": ("gelu",), "final_act": ("glu",)}
"""Official arguments of which our layer has only these values."""


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments of `S4ND` from the official ones."""
    config = {"mode": "dplr", **config}  # the official default
    if config.get("linear", False):
        config = {name: value for name, value in config.items() if name not in ("activation", "final_act")}
    for name, allowed in _ONLY.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {config[name]!r}.")
    only_one_mode = {"rank", "disc"}
    if unknown := sorted(set(config) - set(_ARGUMENTS) - _INITIAL - set(_ONLY) - only_one_mode):
        raise ValueError(f"config has options without a counterpart here: {', '.join(unknown)}.")
    arguments = {ours: config[name] for name, ours in _ARGUMENTS.items() if name in config}
    arguments["mode"] = _MODES[config["mode"]]
    # The initial values are replaced: any will do that fit every rank and transform.
    arguments |= {"init": "diag-lin", "init_options": {"imag_scale": 0.0}, "dt_max": 0.1}
    if arguments["mode"] == "dplr":
        arguments["rank"] = config.get("rank", 1)
    elif "disc" in config:
        arguments["discretization"] = config["disc"]
    return arguments


def _l_kernels(state: Mapping[str, ArrayLike], prefix: str, dims: int) -> tuple[int, ...]:
    """The lengths that low-rank kernels were truncated to, 0 before the first forward pass."""
    return tuple(int(np.asarray(state.get(f"{prefix}kernel.{axis}.l_kernel", 0))) for axis in range(dims))


def _load(build: Callable[[], nnx.Module], state: Mapping[str, ArrayLike]) -> Any:
    """What `build` builds, without initial values, but with those of `state`."""
    module = nnx.eval_shape(build)
    load_torch(module, state)
    return module


def s4nd_from_torch(
    state: Mapping[str, ArrayLike], config: Mapping[str, Any], *, param_dtype: DTypeLike = jnp.float32
) -> S4ND:
    """Builds the layer that the official S4ND module with this `state` and these constructor arguments is.

    It gives the official output at every `rate`, from a state before or after the module's first forward pass; for
    low-rank kernels that means `l_kernel` of `DPLRKernel`. The layer is channels last, whatever `transposed` was.

    Raises ValueError for an option that has no counterpart here, or for names and shapes in `state` that do not
    belong to `config`, listing them.
    """
    arguments = _arguments(config)
    if arguments["mode"] == "dplr":
        arguments["l_kernel"] = _l_kernels(state, "", arguments.get("dims", 2))
    return _load(lambda: S4ND(**arguments, param_dtype=param_dtype, rngs=nnx.Rngs(0)), state)


def isotropic_from_torch(
    state: Mapping[str, ArrayLike], config: Mapping[str, Any], *, param_dtype: DTypeLike = jnp.float32
) -> Isotropic:
    """Builds the isotropic network that the official one with this `state` is.

    `config` has `d_model`, `n_layers` and `layer`, the arguments of the official S4ND modules; the sizes of input and
    output are those of the encoder and decoder. Raises ValueError as `s4nd_from_torch` does.
    """
    d_model, n_layers = config["d_model"], config["n_layers"]
    mixer = _arguments({**config["layer"], "d_model": d_model, "dim": 2})
    if mixer["mode"] == "dplr":
        lengths = {_l_kernels(state, f"model.layers.{i}.layer.", 2) for i in range(n_layers)}
        if len(lengths) > 1:
            raise ValueError(f"state has layers with different l_kernel: {sorted(lengths)}.")
        (mixer["l_kernel"],) = lengths
    del mixer["d_model"], mixer["dims"]
    dropout = mixer.pop("dropout", 0.0)

    def size(name: str, axis: int) -> int:
        shape = np.shape(state.get(name, ()))
        return shape[axis] if len(shape) == 2 else 1  # what is wrong here is reported with all else

    def build() -> Isotropic:
        return isotropic_s4nd(
            size("decoder.output_transform.weight", 0),
            in_channels=size("encoder.weight", 1),
            d_model=d_model,
            n_layers=n_layers,
            dropout=dropout,
            mixer=mixer,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
        )

    return _load(build, state)
