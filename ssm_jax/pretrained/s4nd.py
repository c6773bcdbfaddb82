"""S4ND layers and networks from the weights of the authors' PyTorch release (github.com/state-spaces/s4).

A state is that release's `state_dict`, as a mapping of names to arrays; a config holds the arguments that the PyTorch
module was built with. The layouts differ in three ways: PyTorch's linear maps are transposed, its complex numbers are
a trailing (real, imaginary) pair, and its read-outs C have one axis for directions (outermost) and channels together.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from ssm_jax.layers.s4nd import S4ND
from ssm_jax.models.isotropic import Isotropic, isotropic_s4nd


class _Layout(NamedTuple):
    official_shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # of our shape
    to_ours: Callable[[np.ndarray], np.ndarray]  # up to a reshape


_SAME = _Layout(lambda shape: shape, lambda x: x)
_TRANSPOSED = _Layout(lambda shape: shape[::-1], np.transpose)
_COMPLEX = _Layout(
    lambda shape: (math.prod(shape[1:-2]), *shape[-2:], 2),
    lambda x: np.moveaxis(x, -1, 0),
)

_Path = tuple[str | int, ...]
_Table = dict[str, tuple[_Path, _Layout]]
"""Official names, and where the values belong in our module."""


def _linear_table(name: str, path: _Path) -> _Table:
    return {f"{name}.weight": ((*path, "kernel"), _TRANSPOSED), f"{name}.bias": ((*path, "bias"), _SAME)}


def _norm_table(name: str, path: _Path) -> _Table:
    return {f"{name}.weight": ((*path, "scale"), _SAME), f"{name}.bias": ((*path, "bias"), _SAME)}


_KERNEL = {"inv_dt": _SAME, "A_real": _SAME, "A_imag": _SAME, "B": _COMPLEX, "C": _COMPLEX}


def _layer_table(prefix: str, path: _Path, *, dims: int, linear_output: bool) -> _Table:
    table: _Table = {f"{prefix}D": ((*path, "D"), _SAME)}
    for axis in range(dims):
        for name, layout in _KERNEL.items():
            table[f"{prefix}kernel.{axis}.{name}"] = ((*path, "kernels", axis, name), layout)
    return table if linear_output else table | _linear_table(f"{prefix}output_linear.0", (*path, "output"))


_ARGUMENTS = {
    "d_model": "d_model",
    "dim": "dims",
    "l_max": "l_max",
    "channels": "channels",
    "linear": "linear_output",
    "dropout": "dropout",
    "d_state": "d_state",
    "n_ssm": "n_ssm",
    "bidirectional": "bidirectional",
    "disc": "discretization",
    "bandlimit": "bandlimit",
    "dt_tie": "dt_tie",
    "dt_transform": "dt_transform",
    "real_transform": "real_transform",
    "imag_transform": "imag_transform",
}
"""Official arguments that change the function, and ours. Their defaults are the same."""

_IGNORED = {
    "_name_",
    "contract_version",
    "deterministic",
    "dt_max",
    "dt_min",
    "init",
    "initializer",
    "lr",
    "rank",
    "tie_dropout",
    "transposed",
    "verbose",
}
"""Official arguments that change only initial values, optimization, or the order of axes."""

_ONLY = {
    "mode": ("diag", "s4d"),
    "trank": (1,),
    "out_channels": (None,),
    "weight_norm": (False,),
    "activation": ("gelu",),
    "final_act": ("glu",),
}
"""Official arguments of which our layer has only these values."""


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments of `S4ND` from the official ones."""
    config = {"mode": "dplr", **config}  # the official default
    if config.get("linear", False):
        config = {name: value for name, value in config.items() if name not in ("activation", "final_act")}
    for name, allowed in _ONLY.items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {config[name]!r}.")
    if unknown := sorted(set(config) - set(_ARGUMENTS) - _IGNORED - set(_ONLY)):
        raise ValueError(f"config has options without a counterpart here: {', '.join(unknown)}.")
    arguments = {ours: config[name] for name, ours in _ARGUMENTS.items() if name in config}
    if arguments.get("n_ssm", 1) is None:
        arguments["n_ssm"] = arguments["d_model"]
    return arguments


def _load(build: Callable[[], Any], table: _Table, state: Mapping[str, ArrayLike]) -> Any:
    """Builds a module without initial values and gives it those of `state`, which must match `table` exactly."""
    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    variables = dict(nnx.to_flat_state(abstract))
    values, problems = {}, [f"{name} is unexpected" for name in sorted(set(state) - set(table))]
    for name, (path, layout) in table.items():
        variable = variables[path]
        expected = layout.official_shape(variable.shape)
        if name not in state:
            problems.append(f"{name} {expected} is missing")
        elif np.shape(state[name]) != expected:
            problems.append(f"{name} has shape {np.shape(state[name])} instead of {expected}")
        else:
            value = layout.to_ours(np.asarray(state[name])).reshape(variable.shape)
            values[path] = variable.replace(jnp.asarray(value, variable.dtype))
    if problems:
        raise ValueError(f"state does not fit config: {'; '.join(problems)}.")
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def s4nd_from_torch(
    state: Mapping[str, ArrayLike], config: Mapping[str, Any], *, param_dtype: DTypeLike = jnp.float32
) -> S4ND:
    """Builds the layer that the official S4ND module with this `state` and these constructor arguments is.

    Diagonal kernels only (`mode="diag"` or `"s4d"`). The layer is channels last, whatever `transposed` was.

    Raises ValueError for an option that has no counterpart here, or for names and shapes in `state` that do not
    belong to `config`, listing all of them.
    """
    arguments = _arguments(config)
    table = _layer_table("", (), dims=arguments.get("dims", 2), linear_output=arguments.get("linear_output", False))
    return _load(lambda: S4ND(**arguments, param_dtype=param_dtype, rngs=nnx.Rngs(0)), table, state)


def isotropic_from_torch(
    state: Mapping[str, ArrayLike], config: Mapping[str, Any], *, param_dtype: DTypeLike = jnp.float32
) -> Isotropic:
    """Builds the isotropic network that the official one with this `state` is.

    `config` has `d_model`, `n_layers` and `layer`, the arguments of the official S4ND modules; the sizes of input and
    output are those of the encoder and decoder. Raises ValueError as `s4nd_from_torch` does.
    """
    d_model, n_layers = config["d_model"], config["n_layers"]
    mixer = _arguments({**config["layer"], "d_model": d_model, "dim": 2})
    del mixer["d_model"], mixer["dims"]
    dropout = mixer.pop("dropout", 0.0)
    linear_output = mixer.get("linear_output", False)
    table = (
        _linear_table("encoder", ("encoder",))
        | _norm_table("model.norm.norm", ("norm",))
        | _linear_table("decoder.output_transform", ("decoder",))
    )
    for i in range(n_layers):
        table |= _norm_table(f"model.layers.{i}.norm.norm", ("blocks", i, "norm"))
        table |= _layer_table(f"model.layers.{i}.layer.", ("blocks", i, "mixer"), dims=2, linear_output=linear_output)

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

    return _load(build, table, state)
