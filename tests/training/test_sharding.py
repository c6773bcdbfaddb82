import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssm_jax.training import sharding
from ssm_jax.training.sharding import (
    Placement,
    batch_sharding,
    gather,
    make_mesh,
    param_spec,
    placements,
    put_batch,
    replicated,
    sharding_table,
    state_shardings,
)
from ssm_jax.training.steps import TrainState

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
    assert param_spec("w", shape, 4, fsdp=4) == spec


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
    assert param_spec("w", shape, itemsize, fsdp=4) == spec


def test_nothing_is_divided_without_fsdp():
    assert param_spec("w", (4096, 4096), 4, fsdp=1, rules=[("w", 0)]) == P()


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


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("head.kernel", P()),
        ("params.head.kernel", P()),
        ("opt_state.1.inner_states.decay.inner_state.0.mu.head.kernel", P()),
        ("params.blocks.11.mlp.fc1.kernel", P("fsdp")),
        ("params.blocks.11.mlp.fc1.bias", P("fsdp")),  # smaller than 1 MiB
        ("params.other_head.kernel", P(None, "fsdp")),  # the largest axis
        ("params.head.kernel.scale", P(None, "fsdp")),
        ("params.last.mlp.fc2.bias", P(None, "fsdp")),
    ],
)
def test_rules_go_by_the_end_of_names_and_the_first_one_holds(name, spec):
    rules = [("head.kernel", None), ("head.kernel", 1), ("blocks.*.fc?.*", 0)]
    assert param_spec(name, (8, 4) if name.endswith("fc1.bias") else (512, 1024), 4, fsdp=4, rules=rules) == spec


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_an_axis_that_cannot_be_divided_is_refused(axis):
    with pytest.raises(ValueError, match=r"cannot share axis .* of params\.w, whose shape is \(8, 6\)"):
        param_spec("params.w", (8, 6), 4, fsdp=4, rules=[("w", axis)])


def test_a_rule_for_nothing_is_refused():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    abstract = {"weight": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    with pytest.raises(ValueError, match="'wieght' matches none of the parameters, such as weight"):
        state_shardings(abstract, mesh, [("wieght", None)])


class Device:
    """Of one of several slices, as far as a mesh asks."""

    platform = device_kind = "accelerator"

    def __init__(self, number):
        self.id, self.slice_index, self.process_index = number, number % 2, 0

    def __repr__(self):
        return str(self.id)


def test_gradients_alone_cross_between_slices():
    """Even devices are one slice, odd ones the other: each group of fsdp has one kind."""
    arranged = sharding._arrange((4, 2), ("data", "fsdp"), [Device(i) for i in range(8)])
    assert arranged.shape == (4, 2)
    slices = [[device.slice_index for device in group] for group in arranged]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert sorted(device.id for device in arranged.flat) == list(range(8))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 1, "fsdp": 8}])
def test_slices_do_not_share_parameters(sizes):
    with pytest.raises(ValueError, match="mesh axis data must be a multiple of 2, the slices of devices"):
        sharding._arrange(tuple(sizes.values()), tuple(sizes), [Device(i) for i in range(8)])


def collectives(compiled):
    """Numbers of elements that each kind results in."""
    found = re.findall(
        r"= f32\[(\S+?)\]\S* (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text()
    )
    return {(kind, math.prod(map(int, shape.split(",")))) for shape, kind in found}


def test_divided_parameters_are_gathered_and_their_gradients_divided_again():
    """A matrix divided by its output channels, for which the compiler might as well have gathered activations."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    divided = NamedSharding(mesh, P(None, "fsdp"))
    w = jax.device_put(jnp.linspace(-1, 1, 16 * 32).reshape(16, 32), divided)
    x = jax.device_put(jnp.linspace(-1, 1, 64 * 16).reshape(64, 16), batch_sharding(mesh))

    def loss(w, x, shardings):
        return jnp.sum(jnp.tanh(x @ gather(w, shardings)) ** 2)

    expected = jax.grad(loss)(np.asarray(w), np.asarray(x), replicated(mesh))
    compiled = jax.jit(lambda w, x: jax.grad(loss)(w, x, divided)).lower(w, x).compile()
    gradient = compiled(w, x)
    assert gradient.sharding.is_equivalent_to(divided, 2)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    whole, part = w.size, w.size // 4
    allowed = {("all-gather", whole), ("all-reduce", whole), ("reduce-scatter", part), ("all-reduce", part)}
    assert ("all-gather", whole) in collectives(compiled) <= allowed


def test_whole_parameters_are_left_alone():
    whole = replicated(make_mesh({"data": 8}))
    jaxpr = jax.make_jaxpr(lambda x: gather([x], [whole]))(jnp.ones(3))
    assert not jaxpr.jaxpr.eqns


@pytest.fixture
def state():
    """Two large parameters, one small one, and their sums of gradients."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    params = {
        "blocks": [{"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)} for _ in range(2)],
        "bias": jax.ShapeDtypeStruct((10,), jnp.float32),
    }
    abstract = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, {}, {"mu": params}, None)
    shardings = state_shardings(abstract, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def test_placements_say_what_lies_where(state):
    large = 2 * 4 * 512 * 1024
    assert placements(state) == (
        Placement("blocks.*.w", (512, 1024), 2, P(None, "fsdp"), large, large // 4),
        Placement("other parameters", None, 1, P(), 40, 40),
        Placement("opt_state", None, 3, None, large + 40, large // 4 + 40),
        Placement("step", None, 1, None, 4, 4),
    )


def test_the_table_adds_up(state):
    table = sharding_table(state).splitlines()
    assert "data 2 x fsdp 4" in table[0]
    assert next(line for line in table if "blocks.*.w" in line).split() == [
        *("blocks.*.w", "512", "x", "1024", "2", "-,", "fsdp", "4.19", "1.05")
    ]
    assert table[-1].split() == ["all", "7", "8.39", "2.10"]


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
    assert param_spec("w", (8, 4), 4, fsdp=4) == P()
    monkeypatch.setattr(sharding, "_MIN_SHARDED_BYTES", 0)
    assert param_spec("w", (8, 4), 4, fsdp=4) == P("fsdp")
