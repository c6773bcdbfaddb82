import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ssm_jax.training import sharding
from ssm_jax.training.sharding import batch_sharding, make_mesh, param_spec, put_batch, replicated, state_shardings

MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": 8}, {"data": 8}),
        ({"data": -1}, {"data": 8}),
        ({"data": -1, "fsdp": 1}, {"data": 8, "fsdp": 1}),
        ({"data": -1, "fsdp": 4}, {"data": 2, "fsdp": 4}),
        ({"data": 2, "fsdp": -1}, {"data": 2, "fsdp": 4}),
        ({"fsdp": 8}, {"fsdp": 8}),
    ],
)
def test_a_mesh_uses_all_devices(sizes, shape):
    mesh = make_mesh(sizes)
    assert dict(mesh.shape) == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 8}, "unknown mesh axis ['model']; the axes are data, fsdp."),
        ({"data": -1, "tensor": 2}, "unknown mesh axis ['tensor']"),
        ({"data": 3, "fsdp": -1}, "do not fit 8 devices"),
        ({"data": 16}, "do not fit 8 devices"),
        ({"data": 0}, "do not fit 8 devices"),
        ({"data": -2, "fsdp": -4}, "do not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "-1 for at most one axis"),
        ({"data": 4}, "use 4 of 8 devices: set one axis to -1 to use all"),
    ],
)
def test_an_impossible_mesh_is_refused_with_the_remedy(sizes, message):
    with pytest.raises(ValueError, match="mesh ax") as error:
        make_mesh(sizes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1024, 512), P("fsdp")),
        ((512, 1024), P(None, "fsdp")),
        ((512, 1026), P("fsdp")),  # the largest axis is not divisible
        ((3, 3, 512, 2048), P(None, None, None, "fsdp")),
        ((1025, 1027), P()),
        ((MIB,), P("fsdp")),
    ],
)
def test_large_arrays_are_divided_along_their_largest_divisible_axis(shape, spec):
    assert param_spec(shape, 4, fsdp=4) == spec


@pytest.mark.parametrize(
    ("shape", "itemsize", "spec"),
    [
        ((512, 512), 4, P("fsdp")),  # 1 MiB
        ((512, 508), 4, P()),
        ((512, 512), 2, P()),
        ((), 4, P()),
    ],
)
def test_arrays_below_one_mebibyte_stay_whole(shape, itemsize, spec):
    assert param_spec(shape, itemsize, fsdp=4) == spec


def test_nothing_is_divided_without_fsdp():
    assert param_spec((4096, 4096), 4, fsdp=1) == P()


def test_states_are_sharded_leaf_by_leaf():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    abstract = {
        "weight": jax.ShapeDtypeStruct((512, 1024), jnp.float32),
        "moments": [jax.ShapeDtypeStruct((512, 1024), jnp.float32)],
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    shardings = state_shardings(abstract, mesh)
    assert jax.tree.map(lambda s: s.spec, shardings) == {
        "weight": P(None, "fsdp"),
        "moments": [P(None, "fsdp")],
        "count": P(),
    }
    assert all(s.mesh == mesh for s in jax.tree.leaves(shardings))


def test_a_mesh_without_fsdp_keeps_states_whole():
    shardings = state_shardings(jax.ShapeDtypeStruct((4096, 4096), jnp.float32), make_mesh({"data": 8}))
    assert shardings.spec == P()


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 8}])
def test_rows_of_a_batch_are_divided_over_all_devices_in_order(sizes):
    mesh = make_mesh(sizes)
    rows = {"image": np.arange(16 * 3).reshape(16, 3), "label": np.arange(16)}
    batch = put_batch(rows, batch_sharding(mesh))
    for name, array in batch.items():
        np.testing.assert_array_equal(array, rows[name])
        parts = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
        np.testing.assert_array_equal(np.concatenate([parts[device] for device in mesh.devices.flat]), rows[name])
        assert {len(part) for part in parts.values()} == {2}


def test_replicated_arrays_are_whole_on_every_device():
    array = jax.device_put(jnp.arange(5), replicated(make_mesh({"data": 2, "fsdp": 4})))
    assert len(array.addressable_shards) == 8
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(5))


def test_the_threshold_is_what_decides(monkeypatch):
    assert param_spec((8, 4), 4, fsdp=4) == P()
    monkeypatch.setattr(sharding, "_MIN_SHARDED_BYTES", 0)
    assert param_spec((8, 4), 4, fsdp=4) == P("fsdp")
