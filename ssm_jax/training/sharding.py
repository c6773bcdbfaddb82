"""The device mesh and where arrays live on it."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssm_jax.ops.batch_local import BATCH_AXES

_MIN_SHARDED_BYTES = 1 << 20  # gathering a small array costs more time than keeping it everywhere costs memory


def make_mesh(shape: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh over all devices from axis sizes such as `{"data": -1, "fsdp": 4}`; one -1 takes what is left.

    Raises ValueError for an unknown axis or sizes that do not multiply to the number of devices.
    """
    n_devices = jax.device_count()
    sizes = dict(shape)
    unknown = set(sizes) - set(BATCH_AXES)
    if unknown:
        raise ValueError(f"unknown mesh axis {sorted(unknown)}; the axes are {', '.join(BATCH_AXES)}.")
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()) or n_devices % fixed:
        raise ValueError(
            f"mesh axes {sizes} do not fit {n_devices} devices: use positive sizes whose product divides "
            f"{n_devices}, and -1 for at most one axis."
        )
    if free:
        sizes[free[0]] = n_devices // fixed
    elif fixed != n_devices:
        raise ValueError(f"mesh axes {sizes} use {fixed} of {n_devices} devices: set one axis to -1 to use all.")
    # Auto: with Explicit axes, the default, JAX rejects reshapes that vision models are full of.
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows of a batch divided over all of the mesh."""
    return NamedSharding(mesh, P(tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def param_spec(shape: tuple[int, ...], itemsize: int, fsdp: int) -> P:
    """Divides the largest axis that `fsdp` devices can share; arrays below 1 MiB stay whole."""
    if fsdp > 1 and math.prod(shape) * itemsize >= _MIN_SHARDED_BYTES:
        for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
            if shape[axis] % fsdp == 0:
                return P(*[None] * axis, "fsdp")
    return P()


def state_shardings(abstract_state: Any, mesh: jax.sharding.Mesh) -> Any:
    """A sharding for each leaf of a training state, from its shape: the optimizer's moments go with their weights."""
    fsdp = mesh.shape.get("fsdp", 1)
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, param_spec(leaf.shape, leaf.dtype.itemsize, fsdp)), abstract_state
    )


def put_batch(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Makes global arrays of the rows that each process holds."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
