"""Our weights as a file for PyTorch."""

import os
from collections.abc import Mapping

import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from ssm_jax.pretrained.files import write_safetensors
from ssm_jax.pretrained.layouts import layout, release_buffers
from ssm_jax.pretrained.names import Path, dialects


def save_safetensors(model: nnx.Module, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes a network's parameters and statistics as timm's `state_dict` of it, or S4's release's where S4ND is in it.

    `load_torch` reads the file back exactly, and `load_state_dict` of the other network takes it. Read-outs of low-rank
    kernels are the true C, as in a network of the release before its first forward pass. The file is there as a whole
    or not at all.

    Raises FileExistsError for a file that exists, unless `overwrite`, and ValueError for a `path` that does not end
    with `.safetensors`.
    """
    variables = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    write_safetensors(torch_state(model, {at: variable[...] for at, variable in variables}), path, overwrite=overwrite)


def torch_state(model: nnx.Module, values: Mapping[Path, ArrayLike]) -> dict[str, np.ndarray]:
    """What such a file has of a network like `model` with other `values` of its parameters and statistics."""
    modules = dict(nnx.iter_modules(model))
    buffers = release_buffers(modules)
    names = next(iter(dialects(model, [*values, *buffers]).values()))
    arrays = {names[at]: value for at, value in buffers.items()}
    for at, value in values.items():
        array = np.asarray(value)
        arrays[names[at]] = layout(modules, at, array.shape, names[at]).to_torch(array)
    return arrays
