"""Weights of PyTorch networks into ours."""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssm_jax.detection import Backbone
from ssm_jax.layers.position import resample_positions
from ssm_jax.layers.ssm_kernel import DPLRKernel
from ssm_jax.models.swin import WindowAttention, resample_relative_positions
from ssm_jax.models.vit import VisionTransformer
from ssm_jax.pretrained.files import find_state, read_state
from ssm_jax.pretrained.layouts import layout, release_buffers
from ssm_jax.pretrained.names import Path, dialects

_BUFFERS = r"\.(num_batches_tracked|relative_position_index|attn_mask)$"
"""What PyTorch keeps and we compute."""

_SHOWN = 5  # names of each kind in an error


def load_torch(
    model: nnx.Module,
    source: str | os.PathLike | Mapping[str, Any],
    *,
    key: str | None = None,
    reset_head: bool = False,
    reset_aggregation: bool = False,
) -> None:
    """Gives a network the weights of a PyTorch one, in place.

    ```python
    model = ssm_jax.create_model("deit_small", num_classes=10, rngs=nnx.Rngs(0))
    load_torch(model, "deit_small_patch16_224.pth", reset_head=True)
    ```

    Names may be those of timm, torchvision, the original repositories, or S4's release. Position embeddings, and Swin's
    tables of relative positions, are resampled where the size of the network's images or windows is another. Values
    take the variables' dtype and sharding; variables may be abstract (`nnx.eval_shape`). Where low-rank kernels hold
    C (I - Abar^l_kernel), which the release's first forward pass makes of C, that C is computed, in float64.

    A detector may be given the weights of one of torchvision's, whose other backbones have the names of timm, and
    `detector.backbone` those of a classifier, of any number of classes.

    Args:
        model: the network.
        source: a file (`.safetensors`, or what `torch.save` wrote; it is read without running anything in it), or what
            such a file holds: a state dict, names to arrays, also one under `model`, `state_dict` or `module`.
        key: where in `source` the state dict is instead, such as `model_ema`.
        reset_head: leave classifiers, `head` and `head_dist`, and a detector's outputs for classes as they are, for
            another number of classes.
        reset_aggregation: leave what aggregates layers, such as S6LA, as it is, for the weights of the plain network.

    Raises:
        ValueError: if names or shapes do not fit the network, listing what is missing, unexpected or misshaped by the
            names in `source`; the network is unchanged then. Also for a file that cannot be read.
    """
    state = find_state(source, key=key) if isinstance(source, Mapping) else read_state(source, key=key)
    # What a classifier has besides is known, but not taken.
    model, removed = (model.network, model.removed) if isinstance(model, Backbone) else (model, ())
    modules = dict(nnx.iter_modules(model))
    variables = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    buffers = release_buffers(modules)
    dialect, names = _spoken(dialects(model, [*variables, *buffers, *removed]), state)
    own = {"reset_head": (reset_head, _is_head), "reset_aggregation": (reset_aggregation, _is_aggregation)}
    kept = {path for path in variables if any(reset and of(path) for reset, of in own.values())}
    if any(isinstance(variables[path].get_value(), jax.ShapeDtypeStruct) for path in kept):
        given = " and ".join(name for name, (reset, _) in own.items() if reset)
        raise ValueError(f"{given} must be False for an abstract network: it has no values of its own to keep.")

    values, misshaped, missing = {}, [], []
    for path in variables.keys() - kept:
        name, shape = names[path], variables[path].shape
        form = layout(modules, path, shape, name)
        expected = form.torch_shape(shape)
        if name not in state:
            missing.append(f"{name} {expected} is missing")
            continue
        value = _resampled(modules[path[:-1]], path[-1], np.asarray(state[name]), expected)
        if value.shape != expected:
            misshaped.append(f"{name} has shape {value.shape} instead of {expected}")
            continue
        values[path] = form.to_ours(value)
    truncated = {}
    for path, kernel in modules.items():
        if isinstance(kernel, DPLRKernel) and (length := int(np.asarray(state.get(names[*path, "l_kernel"], 0)))):
            truncated[path] = kernel, length
            if kernel.l_kernel not in (None, length):
                misshaped.append(f"{names[*path, 'l_kernel']} is {length}, the network's {kernel.l_kernel}")
    unknown = set(state) - set(names.values())
    unexpected = [f"{name} is unexpected" for name in unknown if not re.search(_BUFFERS, name)]
    if problems := _listed(misshaped) + _listed(missing) + _listed(unexpected):
        unfilled = variables.keys() - kept - values.keys()
        if unfilled and all(_is_head(path) or _is_aggregation(path) for path in unfilled):
            fitting = [name for name, (_, of) in own.items() if any(of(path) for path in unfilled)]
            problems.append(f"{' and '.join(f'{name}=True' for name in fitting)} keeps the network's own values")
        title = f"weights do not fit {type(model).__name__}, by the names of {dialect}:"
        raise ValueError("\n  ".join([title, *problems]))

    for path, (kernel, length) in truncated.items():
        values[*path, "C"] = _restored(kernel, values, path, length)
    new = {path: variables[path].replace(_placed(value, variables[path])) for path, value in values.items()}
    nnx.update(model, nnx.from_flat_state(new))


def _is_head(path: Path) -> bool:
    outputs = [("box", "classes"), ("box", "deltas"), ("mask", "output"), ("classifier", "output")]  # of detectors
    return path[0] in ("head", "head_dist") or path[:2] in outputs


def _is_aggregation(path: Path) -> bool:
    return "aggregation" in path


def _spoken(known: dict[str, dict[Path, str]], state: Collection[str]) -> tuple[str, dict[Path, str]]:
    """The way of naming that has most in common with the names in a state."""
    return max(known.items(), key=lambda item: sum(name in state for name in item[1].values()))


def _resampled(owner: nnx.Module, leaf: Any, value: np.ndarray, expected: tuple[int, ...]) -> np.ndarray:
    """Embeddings of the positions in a square, as those for the size of the `owner`; anything else as it is."""
    if value.shape == expected or value.ndim != len(expected) or value.shape[-1] != expected[-1]:
        return value
    if leaf == "pos_embed" and isinstance(owner, VisionTransformer):
        patches = value.shape[1] - (expected[1] - owner.grid[0] * owner.grid[1])
        side = round(max(patches, 0) ** 0.5)
        if patches > 0 and side**2 == patches:
            return np.asarray(resample_positions(jnp.asarray(value, jnp.float32), (side, side), owner.grid))
    if leaf == "relative_position_bias_table" and isinstance(owner, WindowAttention):
        side = round(len(value) ** 0.5)
        if side**2 == len(value) and side % 2 == 1:
            return resample_relative_positions(value.astype(np.float32), owner.window)
    return value


def _restored(kernel: DPLRKernel, values: Mapping[Path, np.ndarray], path: Path, length: int) -> np.ndarray:
    """The C of a low-rank kernel whose `values` hold C (I - Abar^length)."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):  # TPUs have no float64
        graphdef, state = nnx.split(kernel)
        flat = {leaf: v.replace(jnp.asarray(values[*path, *leaf], jnp.float64)) for leaf, v in nnx.to_flat_state(state)}
        kernel = nnx.merge(graphdef, nnx.from_flat_state(flat))
        kernel.restore_read_outs(length)
        return np.asarray(kernel.C[...])


def _placed(value: np.ndarray, variable: nnx.Variable) -> jax.Array:
    """A copy of `value` in a variable's dtype, and where its value is."""
    value = np.array(value, variable.dtype)
    old = variable.get_value()
    if isinstance(old, jax.Array):
        return jax.device_put(value, old.sharding) if old.committed else jnp.asarray(value)
    return jnp.asarray(value) if old.sharding is None else jax.device_put(value, old.sharding)


def _listed(problems: list[str]) -> list[str]:
    """The first ones, and the number of the others."""
    more = len(problems) - _SHOWN
    return sorted(problems)[:_SHOWN] + ([f"and {more} more of these"] if more > 0 else [])
