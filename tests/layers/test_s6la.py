import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import drawn, split

import ssm_jax
from ssm_jax.layers.s6la import S6LAConv, halved
from ssm_jax.models.resnet import BasicBlock, ResNet
from ssm_jax.ops import linear_recurrence

SMALL = {"depths": (2, 3, 1, 1), "dims": (8, 8, 8, 8), "stem_width": 8}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def aggregation(channels=6, **options):
    return drawn(lambda: S6LAConv(channels, **{"state_dim": 4} | options, rngs=nnx.Rngs(0)))


def network(**options):
    options = SMALL | {"aggregation": functools.partial(S6LAConv, state_dim=4)} | options
    return drawn(lambda: ResNet(5, **options, rngs=nnx.Rngs(0)), seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet50_s6la", 26.047), ("resnet101_s6la", 45.178), ("resnet152_s6la", 60.945)]
)
def test_networks_have_the_counted_parameters(name, parameters):
    model = nnx.eval_shape(lambda: ssm_jax.create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert round(count / 1e6, 3) == parameters


@pytest.mark.slow
def test_resnet50_has_the_counted_multiply_adds():
    model = nnx.eval_shape(lambda: ssm_jax.create_model("resnet50_s6la", num_classes=1000, rngs=nnx.Rngs(0)))
    assert round(ssm_jax.summary(model, (1, 224, 224, 3)).total.multiply_adds / 1e9, 3) == 4.680


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_a_write_is_the_selective_step_at_every_position(discretization):
    module = aggregation(discretization=discretization, input_norm=False)
    x, h = normal(2, 3, 5, 6), normal(2, 3, 5, 4, seed=1)
    d, B, u = np.split(np.asarray(x, float) @ np.asarray(module.project.kernel[...], float)[0, 0], 3, axis=-1)
    delta = np.log1p(np.exp(d + np.asarray(module.dt_bias[...])))
    A = -np.exp(np.asarray(module.A_log[...], float))
    gain = delta if discretization == "euler" else np.expm1(delta * A) / A
    expected = np.exp(delta * A) * np.asarray(h) + gain * B * u
    ours = module.write(module.cell(rngs=nnx.Rngs(0)), x, h)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_projections_are_normalised_by_every_block_for_itself():
    module = aggregation()
    first, second = module.cell(rngs=nnx.Rngs(0)), module.cell(rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(first, nnx.Param))
    module.write(first, normal(8, 4, 4, 6), jnp.zeros((8, 4, 4, 4)))
    assert np.all(first.mean[...] != second.mean[...])
    a, b = module.coefficients(first, 1000 * normal(8, 4, 4, 6))
    other_a, other_b = module.coefficients(second, normal(8, 4, 4, 6))
    np.testing.assert_allclose(a, other_a, rtol=1e-2, atol=1e-3)  # the size of the input is gone
    np.testing.assert_allclose(b, other_b, rtol=1e-2, atol=1e-2 * np.abs(other_b).max())


def test_states_of_a_stage_are_one_associative_scan_over_its_layers():
    """Offline, from the layers' outputs, as the network has them step by step."""
    model = network()
    stage, shared = model.stages[1], model.aggregations[1]
    x, h = normal(2, 8, 8, 32), normal(2, 8, 8, 4, seed=1)
    online, coefficients = [], []
    start = halved(h, (4, 4))
    for block in stage.blocks:
        x, h = block((x, h), aggregation=shared)
        online.append(h)
        coefficients.append(shared.coefficients(block.cell, x))
    a, b = (jnp.stack(part) for part in zip(*coefficients, strict=True))
    offline = linear_recurrence(a, b, axis=0, h0=start)
    online = np.stack(online)
    np.testing.assert_allclose(offline, online, rtol=0, atol=1e-5 * np.abs(online).max())


def test_the_branch_reads_the_state_and_the_shortcut_does_not():
    model = network()
    block, shared = model.stages[0].blocks[1], model.aggregations[0]
    x, h = jnp.abs(normal(2, 4, 4, 32)), normal(2, 4, 4, 4, seed=1)
    y, _ = block((x, h), aggregation=shared)
    other, _ = block((x, jnp.flip(h, 1)), aggregation=shared)  # batch norm would take a constant away
    assert np.abs(y - other).max() > 1e-3 * np.abs(y).max()
    block.bn3.scale[...] = jnp.zeros_like(block.bn3.scale[...])
    block.bn3.bias[...] = jnp.zeros_like(block.bn3.bias[...])
    closed, _ = block((x, h), aggregation=shared)
    np.testing.assert_array_equal(closed, x)


def test_states_are_averaged_where_maps_halve():
    h = normal(1, 4, 6, 3)
    expected = np.asarray(h).reshape(1, 2, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(halved(h, (2, 3)), expected, rtol=1e-6)
    assert halved(h, (4, 6)) is h
    odd = halved(normal(1, 5, 3, 2), (3, 2))
    np.testing.assert_allclose(odd[0, 2, 1], normal(1, 5, 3, 2)[0, 4, 2], rtol=1e-6)  # a corner of one position


def test_states_go_on_from_stage_to_stage():
    module = aggregation()
    x, h = normal(2, 3, 3, 6), normal(2, 3, 3, 4, seed=1)
    assert module.start(x, h) is h
    np.testing.assert_array_equal(module.start(x, None), np.zeros((2, 3, 3, 4)))


@pytest.mark.parametrize(
    "how", [{"scan": True}, {"remat": "nothing_saveable"}, {"scan": True, "remat": "dots_saveable"}]
)
def test_loops_and_rematerialisation_change_no_number(how):
    results = []
    for model in (network(), nnx.view(network(), **how)):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, x, graphdef=graphdef, rest=rest):
            model = nnx.merge(graphdef, params, rest, copy=True)
            y = model(x)
            return jnp.sum(y**2), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

        (value, statistics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, normal(4, 32, 32, 3))
        results.append((value, statistics, nnx.to_pure_dict(grads)))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(results[0][2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), *results)


@pytest.mark.slow
def test_every_parameter_is_used():
    f, params = split(network(depths=(2, 1, 1, 1)))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, normal(4, 32, 32, 3))))))(params)
    weights = {name: grads[name] for name in ("aggregations", "stages")}
    # The last block's state is read by nobody, and with it the last stage's projection.
    del weights["aggregations"][3]
    for path, gradient in jax.tree.leaves_with_path(weights):
        assert np.isfinite(gradient).all(), path
        if path[-1].key not in ("mean", "var"):
            assert np.any(gradient), path


def test_basic_blocks_can_be_aggregated_too():
    model = network(block=BasicBlock)
    assert model.stages[0].blocks[0].conv1.kernel.shape[2] == 8 + 4
    assert model.features(normal(2, 32, 32, 3))[3].shape == (2, 1, 1, 8)


def test_half_precision_keeps_the_state_in_float32():
    module = aggregation(dtype=jnp.bfloat16)
    cell = module.cell(rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    h = module.write(cell, normal(2, 3, 3, 6).astype(jnp.bfloat16), module.start(normal(2, 3, 3, 6), None))
    assert h.dtype == jnp.float32
    assert module.read(normal(2, 3, 3, 6).astype(jnp.bfloat16), h).dtype == jnp.bfloat16


def test_dynamics_start_as_mambas():
    module = S6LAConv(8, state_dim=1000, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(-jnp.exp(module.A_log[...]), -np.arange(1.0, 1001.0), rtol=1e-5)
    dt = np.log1p(np.exp(np.asarray(module.dt_bias[...], float)))
    assert 1e-3 <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 0.1001
    assert np.median(dt) == pytest.approx(1e-2, rel=0.2)  # uniform in the logarithm


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "state_dim must be at least 1, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"discretization": "tustin"}, "discretization must be 'euler' or 'zoh', got 'tustin'"),
    ],
    ids=str,
)
def test_impossible_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        aggregation(**options)
