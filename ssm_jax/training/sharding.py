"""The device mesh, and where arrays live on it.

The batch is divided over all devices, `data` x `fsdp`. Parameters, their optimizer state and their average are whole
on every device, but for large ones where `fsdp` is more than 1: each device of a group of that many keeps a part, takes
the whole from the others where the network uses it, and gets the part of the gradient that is its own (ZeRO, stage 3).
There is no axis for tensor parallelism: the largest of these networks has 0.1 G parameters, whose products are far too
small to be worth dividing.
"""

import fnmatch
import functools
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssm_jax.ops.batch_local import BATCH_AXES

_MIN_SHARDED_BYTES = 1 << 20  # gathering a small array costs more time than keeping it everywhere costs memory

Rules = Iterable[tuple[str, int | None]]
"""Patterns of names of parameters, and the axis that `fsdp` divides, None for none; the first that matches holds."""


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices from axis sizes such as `{"data": -1, "fsdp": 4}`; one -1 takes what is left.

    Where the devices are several slices of TPUs, which a slower network connects, `data` is the axis between them, so
    that only gradients, or parts of them, cross it.

    Args:
        shape: sizes of the axes `data` and `fsdp`.
        devices: default all of this program; others may be those of a `jax.experimental.topologies` description.

    Raises:
        ValueError: for an unknown axis, sizes that do not multiply to the number of devices, or slices that would have
            to share parameters.
    """
    devices = jax.devices() if devices is None else devices
    n_devices = len(devices)
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
    return Mesh(
        _arrange(tuple(sizes.values()), tuple(sizes), devices),
        tuple(sizes),
        # With Explicit axes, the default, JAX rejects reshapes that vision models are full of.
        axis_types=(AxisType.Auto,) * len(sizes),
    )


def _arrange(sizes: tuple[int, ...], axes: tuple[str, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices in the order in which those of an axis are near each other."""
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, **options)
    between = tuple(slices if axis == "data" else 1 for axis in axes)
    if "data" not in axes or sizes[axes.index("data")] % slices:
        raise ValueError(
            f"mesh axis data must be a multiple of {slices}, the slices of devices, got "
            f"{dict(zip(axes, sizes, strict=True))}; fsdp is for the devices of one slice."
        )
    within = tuple(size // count for size, count in zip(sizes, between, strict=True))
    return mesh_utils.create_hybrid_device_mesh(within, between, **options)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch divided over all of the mesh."""
    return NamedSharding(mesh, P(tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def param_spec(name: str, shape: tuple[int, ...], itemsize: int, fsdp: int, rules: Rules = ()) -> P:
    """Which axis of an array `fsdp` devices share.

    It is the largest that they can share equally, of arrays of 1 MiB and more; others stay whole. `rules` come before
    that: their patterns, such as `head.kernel` or `blocks.*.mlp.*`, match the end of the `name` from a dot on, so that
    what an optimizer keeps for a parameter lies as the parameter does.

    Raises:
        ValueError: for a rule whose axis does not exist or cannot be shared.
    """
    if fsdp == 1:
        return P()
    for pattern, axis in rules:
        if _matches(name, pattern) and shape:
            if axis is None:
                return P()
            if not 0 <= axis < len(shape) or shape[axis] % fsdp:
                raise ValueError(
                    f"sharding rule ({pattern!r}, {axis}): {fsdp} devices cannot share axis {axis} of {name}, whose "
                    f"shape is {shape}."
                )
            return P(*[None] * axis, "fsdp")
    if math.prod(shape) * itemsize >= _MIN_SHARDED_BYTES:
        for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
            if shape[axis] % fsdp == 0:
                return P(*[None] * axis, "fsdp")
    return P()


def state_shardings(abstract_state: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """A sharding for each leaf of a training state, see `param_spec`: the optimizer's moments go with their weights.

    Raises:
        ValueError: for a rule that matches nothing, or cannot be followed.
    """
    fsdp = mesh.shape.get("fsdp", 1)
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
    for pattern, _ in rules:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"sharding rule {pattern!r} matches none of the parameters, such as {names[-1]}.")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, param_spec(_name(path), leaf.shape, leaf.dtype.itemsize, fsdp, rules)),
        abstract_state,
    )


def gather(params: Any, shardings: Any) -> Any:
    """Whole arrays on every device, of which the gradients are divided as `shardings` says.

    Left to itself, the compiler would rather gather activations where a parameter's channels are divided.
    """
    return jax.tree.map(
        lambda x, sharding: x if sharding.is_fully_replicated else _whole(x, sharding), params, shardings
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, P()))


def _whole_fwd(x: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, None]:
    return _whole(x, sharding), None


def _whole_bwd(sharding: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Summed whole, and divided then. Asked for a part alone, the compiler may gather activations to compute it, as for
    # a ResNet with S6LA, which can cost far more than the half of this traffic that a reduce-scatter saves.
    summed = jax.lax.with_sharding_constraint(gradient, NamedSharding(sharding.mesh, P()))
    return (jax.lax.with_sharding_constraint(summed, sharding),)


_whole.defvjp(_whole_fwd, _whole_bwd)


def put_batch(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Makes global arrays of the rows that each process holds."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


class Placement(NamedTuple):
    """Arrays of a state that lie alike, and are one row of a table."""

    name: str
    shape: tuple[int, ...] | None
    """None where shapes differ."""
    count: int
    spec: P | None
    """None where they differ."""
    bytes: int
    device_bytes: int
    """On each device."""


def placements(abstract_state: Any) -> tuple[Placement, ...]:
    """Where a `TrainState` lies, described by shapes with shardings.

    A row for each kind of divided parameter, its numbers replaced by `*`, one for all whole parameters, and one for
    each other part of the state.
    """
    rows: dict[tuple[Any, ...], Counter[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(vars(abstract_state)):
        part, _, name = _name(path).partition(".")
        if part != "params":
            key = (part, None, None)
        elif leaf.sharding.is_fully_replicated:
            key = ("other parameters", None, P())
        else:
            key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), leaf.shape, leaf.sharding.spec)
        here = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        whole = math.prod(leaf.shape) * leaf.dtype.itemsize
        rows.setdefault(key, Counter()).update(count=1, whole=whole, here=here)
    return tuple(
        Placement(name, shape, row["count"], spec, row["whole"], row["here"])
        for (name, shape, spec), row in sorted(rows.items(), key=lambda item: (item[0][1] is None, item[0][2] is None))
    )


def sharding_table(abstract_state: Any) -> str:
    """`placements` as text, with a sum."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    mesh = jax.tree.leaves(abstract_state)[0].sharding.mesh
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    table = Table(title=f"state on a mesh of {sizes}", box=box.SIMPLE_HEAD)
    for column in ("arrays", "shape", "number", "divided", "MB", "MB per device"):
        table.add_column(column, justify="left" if column in ("arrays", "divided") else "right")
    rows = placements(abstract_state)
    for row in rows:
        divided = "" if row.spec is None else "whole" if row.spec == P() else ", ".join(str(a or "-") for a in row.spec)
        shape = "" if row.shape is None else " x ".join(map(str, row.shape))
        name = row.name.replace("_", " ") if row.shape is None else row.name
        table.add_row(name, shape, f"{row.count:,}", divided, _megabytes(row.bytes), _megabytes(row.device_bytes))
    table.add_section()
    total, here = sum(row.bytes for row in rows), sum(row.device_bytes for row in rows)
    table.add_row("all", "", f"{sum(row.count for row in rows):,}", "", _megabytes(total), _megabytes(here))
    console = Console(file=io.StringIO(), width=110)
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f}"


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(f".{name}", f"*.{pattern}")


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
