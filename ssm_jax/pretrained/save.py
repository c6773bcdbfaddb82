"""Our weights as a file for PyTorch."""

import os

import numpy as np
from flax import nnx

from ssm_jax.pretrained.files import write_safetensors
from ssm_jax.pretrained.layouts import layout, release_buffers
from ssm_jax.pretrained.names import dialects


def save_safetensors(model: nnx.Module, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes a network's parameters and statistics as timm's `state_dict` of it, or S4's release's where S4ND is in it.

    `load_torch` reads the file back exactly, and `load_state_dict` of the other network takes it. Read-outs of low-rank
    kernels are the true C, as in a network of the release before its first forward pass. The file is there as a whole
    or not at all.

    Raises FileExistsError for a file that exists, unless `overwrite`, and ValueError for a `path` that does not end
    with `.safetensors`.
    """
    modules = dict(nnx.iter_modules(model))
    buffers = release_buffers(modules)
    variables = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    names = next(iter(dialects(model, [*variables, *buffers]).values()))
    arrays = {names[at]: value for at, value in buffers.items()}
    for at, variable in variables.items():
        arrays[names[at]] = layout(modules, at, variable.shape, names[at]).to_torch(np.asarray(variable[...]))
    write_safetensors(arrays, path, overwrite=overwrite)
