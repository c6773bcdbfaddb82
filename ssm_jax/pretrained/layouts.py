"""How PyTorch lays out what our variables hold.

Its linear maps and convolutions have the axis of outputs first. In S4's release, complex numbers are a trailing (real,
imaginary) pair, and read-outs C have one axis for direction (outermost), tensor rank, output channel and channel
together.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from flax import nnx

from ssm_jax.detection.mask_rcnn import Doubled
from ssm_jax.layers.s4nd import S4ND
from ssm_jax.layers.ssm_kernel import DPLRKernel, S4DKernel
from ssm_jax.pretrained.names import Path


class Layout(NamedTuple):
    """A permutation of numbers, and its inverse."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    to_ours: Callable[[np.ndarray], np.ndarray]

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in PyTorch of what has this `shape` here."""
        return self.to_torch(np.broadcast_to(np.int8(0), shape)).shape


_SAME = Layout(lambda x: x, lambda x: x)
_LINEAR = Layout(np.transpose, np.transpose)
_CONV = Layout(lambda x: np.moveaxis(x, (-1, -2), (0, 1)), lambda x: np.moveaxis(x, (0, 1), (-1, -2)))
_TRANSPOSED_CONV = Layout(lambda x: np.moveaxis(x, (-2, -1), (0, 1)), lambda x: np.moveaxis(x, (0, 1), (-2, -1)))
_PER_CHANNEL = Layout(lambda x: x[:, None, None], lambda x: x[:, 0, 0])  # torchvision's layer scale
_COMPLEX = Layout(lambda x: np.moveaxis(x, 0, -1), lambda x: np.moveaxis(x, -1, 0))
_B = Layout(lambda x: np.moveaxis(x, 0, -1)[None], lambda x: np.moveaxis(x[0], -1, 0))


def _read_outs(shape: tuple[int, ...], out_channels: int) -> Layout:
    """Of C (2, directions, trank, channels * out_channels, h, n)."""
    _, directions, trank, kernels, *system = shape
    split = (2, directions, trank, kernels // out_channels, out_channels, *system)
    swapped = (directions, trank, out_channels, kernels // out_channels, *system, 2)

    def to_torch(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x.reshape(split).swapaxes(3, 4), 0, -1).reshape(-1, *system, 2)

    def to_ours(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x.reshape(swapped), -1, 0).swapaxes(3, 4).reshape(shape)

    return Layout(to_torch, to_ours)


def _flattened(shape: tuple[int, ...]) -> Layout:
    """Of a linear map of maps (h, w, channels), which PyTorch flattens channels first."""
    h, w, channels, features = shape
    return Layout(
        lambda x: _CONV.to_torch(x).reshape(features, -1),
        lambda x: _CONV.to_ours(x.reshape(features, channels, h, w)),
    )


def layout(modules: Mapping[Path, nnx.Module], path: Path, shape: tuple[int, ...], name: str) -> Layout:
    """The layout of the variable at `path`, of this `shape`, known there by `name`; `modules` has all by path."""
    leaf = path[-1]
    if isinstance(modules.get(path[:-1]), S4DKernel):
        if leaf == "C":
            owner = modules.get(path[:-3])
            return _read_outs(shape, (isinstance(owner, S4ND) and owner.out_channels) or 1)
        return {"B": _B, "P": _COMPLEX}.get(str(leaf), _SAME)
    if leaf == "kernel":
        if isinstance(modules.get(path[:-1]), Doubled):
            return _TRANSPOSED_CONV
        if isinstance(modules.get(path[:-1]), nnx.LinearGeneral):
            return _flattened(shape)
        return _LINEAR if len(shape) == 2 else _CONV
    return _PER_CHANNEL if name.endswith(".layer_scale") else _SAME


def release_buffers(modules: Mapping[Path, nnx.Module]) -> dict[Path, np.ndarray]:
    """What S4ND layers have in the release besides our variables, as it is before the first forward pass.

    Low-rank kernels have `l_kernel`, the length that their read-outs were truncated to, and dense layers a D that they
    do not use.
    """
    buffers: dict[Path, np.ndarray] = {}
    for path, module in modules.items():
        if isinstance(module, DPLRKernel):
            buffers[*path, "l_kernel"] = np.zeros((), np.int64)
        if isinstance(module, S4ND) and module.out_channels is not None:
            C = module.kernels[0].C
            buffers[*path, "D"] = np.zeros((C.shape[3] // module.out_channels, module.d_model), C.dtype)
    return buffers
