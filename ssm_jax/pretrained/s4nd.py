"""S4ND layers and networks from the weights of the authors' PyTorch release (github.com/state-spaces/s4).

A state is that release's `state_dict`, as a mapping of names to arrays; a config holds the arguments that the PyTorch
module was built with. The layouts differ in three ways: PyTorch's linear maps are transposed, its complex numbers are
a trailing (real, imaginary) pair, and its read-outs C have one axis for direction (outermost), tensor rank, output
channel and channel together. Low-rank kernels also replace C by C (I - Abar^l_kernel) in their first forward pass.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from ssm_jax.layers.s4nd import S4ND
from ssm_jax.layers.ssm_kernel import DPLRKernel
from ssm_jax.models.isotropic import Isotropic, isotropic_s4nd


class _Layout(NamedTuple):
    official_shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # of our shape
    to_ours: Callable[[np.ndarray], np.ndarray]  # up to a reshape


_SAME = _Layout(lambda shape: shape, lambda x: x)
_TRANSPOSED = _Layout(lambda shape: shape[::-1], np.transpose)
_COMPLEX = _Layout(lambda shape: (*shape[1:], 2), lambda x: np.moveaxis(x, -1, 0))
_B = _Layout(lambda shape: (1, *shape[1:], 2), lambda x: np.moveaxis(x, -1, 0))


def _read_outs(channels: int, out_channels: int) -> _Layout:
    def to_ours(x: np.ndarray) -> np.ndarray:
        x = x.reshape(-1, out_channels, channels, *x.shape[1:])
        return np.moveaxis(np.swapaxes(x, 1, 2), -1, 0)

    return _Layout(lambda shape: (math.prod(shape[1:4]), *shape[4:], 2), to_ours)


_Path = tuple[str | int, ...]
_Table = dict[str, tuple[_Path, _Layout]]
"""Official names, and where the values belong in our module."""


def _linear_table(name: str, path: _Path) -> _Table:
    return {f"{name}.weight": ((*path, "kernel"), _TRANSPOSED), f"{name}.bias": ((*path, "bias"), _SAME)}


def _norm_table(name: str, path: _Path) -> _Table:
    return {f"{name}.weight": ((*path, "scale"), _SAME), f"{name}.bias": ((*path, "bias"), _SAME)}


def _layer_table(prefix: str, path: _Path, arguments: Mapping[str, Any]) -> _Table:
    out_channels = arguments.get("out_channels")
    C = _read_outs(arguments.get("channels", 1), out_channels or 1)
    layouts = {"inv_dt": _SAME, "A_real": _SAME, "A_imag": _SAME, "B": _B, "C": C}
    if arguments["mode"] == "dplr":
        layouts["P"] = _COMPLEX
    table: _Table = {} if out_channels else {f"{prefix}D": ((*path, "D"), _SAME)}
    for axis in range(arguments.get("dims", 2)):
        for name, layout in layouts.items():
            table[f"{prefix}kernel.{axis}.{name}"] = ((*path, "kernels", axis, name), layout)
    if arguments.get("linear_output", False):
        return table
    return table | _linear_table(f"{prefix}output_linear.0", (*path, "output"))


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


def _load(
    build: Callable[[DTypeLike], nnx.Module], table: _Table, state: Mapping[str, ArrayLike], param_dtype: DTypeLike
) -> Any:
    """Builds a module without initial values and gives it those of `state`, which must match `table` exactly."""
    truncated = any(np.any(value) for name, value in state.items() if name.endswith(".l_kernel"))
    # A dense layer has a D that it does not use.
    state = {name: state[name] for name in state if name in table or name.rpartition(".")[2] not in ("l_kernel", "D")}
    with jax.enable_x64(True):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build(jnp.float64)))
        variables = dict(nnx.to_flat_state(abstract))
        values, problems = {}, [f"{name} is unexpected" for name in sorted(set(state) - set(table))]
        for name, (path, layout) in table.items():
            expected = layout.official_shape(variables[path].shape)
            if name not in state:
                problems.append(f"{name} {expected} is missing")
            elif np.shape(state[name]) != expected:
                problems.append(f"{name} has shape {np.shape(state[name])} instead of {expected}")
            else:
                value = layout.to_ours(np.asarray(state[name], np.float64)).reshape(variables[path].shape)
                values[path] = variables[path].replace(jnp.asarray(value))
        if problems:
            raise ValueError(f"state does not fit config: {'; '.join(problems)}.")
        module = nnx.merge(graphdef, nnx.from_flat_state(values))
        for _, kernel in nnx.iter_modules(module):
            if truncated and isinstance(kernel, DPLRKernel):
                kernel.restore_read_outs()
        loaded = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module)))
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: build(param_dtype)))
    nnx.replace_by_pure_dict(abstract, jax.tree.map(lambda x: jnp.asarray(x, param_dtype), loaded))
    return nnx.merge(graphdef, abstract)


def s4nd_from_torch(
    state: Mapping[str, ArrayLike], config: Mapping[str, Any], *, param_dtype: DTypeLike = jnp.float32
) -> S4ND:
    """Builds the layer that the official S4ND module with this `state` and these constructor arguments is.

    It gives the official output at every `rate`, from a state before or after the module's first forward pass; for
    low-rank kernels that means `l_kernel` of `DPLRKernel`. The layer is channels last, whatever `transposed` was.

    Raises ValueError for an option that has no counterpart here, or for names and shapes in `state` that do not
    belong to `config`, listing all of them.
    """
    arguments = _arguments(config)
    if arguments["mode"] == "dplr":
        arguments["l_kernel"] = _l_kernels(state, "", arguments.get("dims", 2))
    table = _layer_table("", (), arguments)
    return _load(lambda dtype: S4ND(**arguments, param_dtype=dtype, rngs=nnx.Rngs(0)), table, state, param_dtype)


def isotropic_from_torch(
    state: Mapping[str, ArrayLike], config: Mapping[str, Any], *, param_dtype: DTypeLike = jnp.float32
) -> Isotropic:
    """Builds the isotropic network that the official one with this `state` is.

    `config` has `d_model`, `n_layers` and `layer`, the arguments of the official S4ND modules; the sizes of input and
    output are those of the encoder and decoder. Raises ValueError as `s4nd_from_torch` does.
    """
    d_model, n_layers = config["d_model"], config["n_layers"]
    mixer = _arguments({**config["layer"], "d_model": d_model, "dim": 2})
    table = (
        _linear_table("encoder", ("encoder",))
        | _norm_table("model.norm.norm", ("norm",))
        | _linear_table("decoder.output_transform", ("decoder",))
    )
    for i in range(n_layers):
        table |= _norm_table(f"model.layers.{i}.norm.norm", ("blocks", i, "norm"))
        table |= _layer_table(f"model.layers.{i}.layer.", ("blocks", i, "mixer"), mixer)
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

    def build(param_dtype: DTypeLike) -> Isotropic:
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

    return _load(build, table, state, param_dtype)
