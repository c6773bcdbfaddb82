"""Running a function on each device's own part of the batch."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which a batch is divided."""


def batch_local(fn: Callable[..., PyTree[Array]]) -> Callable[..., PyTree[Array]]:
    """Wraps `fn(x, *weights)` so that each device computes its rows of `x` (arrays, batch first) with all of the
    weights.

    XLA cannot partition an FFT over its batch dimensions (openxla/xla#24): under plain `jit`, CPUs and GPUs gather
    the whole batch on every device, and TPUs gather per-device kernel gradients. Nor does it keep a batch divided that
    is merged with another axis before it. Inside `shard_map` the only collective left is the all-reduce of the weights'
    gradients.

    The mesh is the one in context (`jax.set_mesh`). Without one, or inside another `shard_map`, `fn` runs as it is.
    Raises ValueError if the batch is not divisible by the devices it is divided over.
    """

    def wrapped(x: PyTree[Array], *weights: PyTree[Array]) -> PyTree[Array]:
        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
        n_shards = math.prod(mesh.shape[axis] for axis in axes)
        if mesh.manual_axes:
            return fn(x, *_varying(weights, mesh.manual_axes))
        if n_shards == 1:
            return fn(x, *weights)
        rows = jax.tree.leaves(x)[0].shape[0]
        if rows % n_shards:
            raise ValueError(
                f"batch size must be a multiple of {n_shards}, the devices of mesh axes {axes}, got {rows}; "
                "pad the batch."
            )
        sharded = jax.shard_map(
            lambda x, *weights: fn(x, *_varying(weights, axes)),
            in_specs=(P(axes), *[P()] * len(weights)),
            out_specs=P(axes),
        )
        return sharded(x, *weights)

    return wrapped


def _varying(weights: PyTree[Array], axes: tuple[str, ...]) -> PyTree[Array]:
    """Weights as if they were others on each device.

    What is summed over devices is the gradient of where that begins. It would be at the last thing that is made of
    weights alone: at the matrix of a kernel, which is much larger, or in each turn of a loop.
    """

    def vary(weight: Array) -> Array:
        missing = tuple(axis for axis in axes if axis not in jax.typeof(weight).manual_axis_type.varying)
        return jax.lax.pcast(weight, missing, to="varying") if missing else weight

    return jax.tree.map(vary, weights)
