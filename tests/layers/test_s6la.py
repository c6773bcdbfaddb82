import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import assert_close, drawn, images, size, split, together

import ssm_jax
from ssm_jax.layers.aggregation import Stage, halved
from ssm_jax.layers.s6la import S6LAConv
from ssm_jax.layers.s6la_token import S6LAToken, normalize
from ssm_jax.layers.ssm_kernel import SSMParam
from ssm_jax.models.convnext import ConvNeXt
from ssm_jax.models.pvt_v2 import PVTv2
from ssm_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from ssm_jax.models.swin import SwinTransformer
from ssm_jax.models.vit import deit, vit
from ssm_jax.ops import linear_recurrence


def normal(*shape, seed=0):
    return jnp.asarray(images(*shape, seed=seed))


def counted(name, **options):
    return nnx.eval_shape(lambda: ssm_jax.create_model(name, num_classes=1000, rngs=nnx.Rngs(0), **options))


def run(f, module, *args):
    """`f(module, *args)`, compiled."""
    graphdef, state = nnx.split(module)
    return jax.jit(lambda state, *args: f(nnx.merge(graphdef, state, copy=True), *args))(state, *args)


# The form for residual networks.

SMALL = {"depths": (2, 3, 1, 1), "dims": (8, 8, 8, 8), "stem_width": 8}


def conv_form(channels=6, depth=1, **options):
    """S6LA of a stage, and its blocks."""
    dtypes = {name: options[name] for name in ("dtype",) if name in options}
    blocks = [drawn(lambda: Bottleneck(4 * channels, channels, **dtypes, rngs=nnx.Rngs(0))) for _ in range(depth)]
    stage = Stage(blocks, 4 * channels)
    return drawn(lambda: S6LAConv(stage, **{"state_dim": 4} | options, rngs=nnx.Rngs(0))), blocks


def network(**options):
    aggregation = functools.partial(S6LAConv, **{"state_dim": 4} | options.pop("s6la", {}))
    return drawn(lambda: ResNet(5, **SMALL | {"aggregation": aggregation} | options, rngs=nnx.Rngs(0)), seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet50_s6la", 26.047), ("resnet101_s6la", 45.178), ("resnet152_s6la", 60.945)]
)
def test_resnets_have_the_counted_parameters(name, parameters):
    assert round(size(counted(name)) / 1e6, 3) == parameters


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "multiply_adds"), [(50, 4.680), (101, 8.747)])
def test_resnets_have_the_counted_multiply_adds(depth, multiply_adds):
    model = counted(f"resnet{depth}_s6la")
    assert round(ssm_jax.summary(model, (1, 224, 224, 3)).total.multiply_adds / 1e9, 3) == multiply_adds


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("selective", ["both", "delta", "b", "none"])
def test_the_state_takes_the_selective_step_at_every_position(discretization, selective):
    module, _ = conv_form(discretization=discretization, selective=selective, input_norm=False)
    x, h = normal(2, 3, 5, 24), normal(2, 3, 5, 4, seed=1)
    y = np.asarray(x, float) @ np.asarray(module.dynamics.project.kernel[...], float)[0, 0]
    d, B, u = {
        "both": lambda: np.split(y, 3, axis=-1),
        "delta": lambda: (y[..., :4], np.asarray(module.dynamics.B[...]), y[..., 4:]),
        "b": lambda: (0, y[..., :4], y[..., 4:]),
        "none": lambda: (0, np.asarray(module.dynamics.B[...]), y),
    }[selective]()
    delta = np.log1p(np.exp(d + np.asarray(module.dynamics.decay.dt_bias[...])))
    A = -np.exp(np.asarray(module.dynamics.decay.A_log[...], float))
    gain = delta if discretization == "euler" else np.expm1(delta * A) / A
    a, b = module.coefficients(module.cells[0], x)
    assert_close(a * h + b, np.exp(delta * A) * np.asarray(h) + gain * B * u, 1e-4)


def test_projections_are_normalised_by_every_block_for_itself():
    module, _ = conv_form(depth=2)
    first, second = module.cells
    for cell in (first, second):
        assert not jax.tree.leaves(nnx.state(cell.norm, nnx.Param))
        cell.norm.mean[...], cell.norm.var[...] = jnp.zeros(12), jnp.ones(12)
    a, b = module.coefficients(first, 1000 * normal(8, 4, 4, 24))
    other_a, other_b = module.coefficients(second, normal(8, 4, 4, 24))
    assert np.all(first.norm.mean[...] != second.norm.mean[...])
    np.testing.assert_allclose(a, other_a, rtol=1e-2, atol=1e-3)  # the size of the input is gone
    assert_close(b, other_b, 1e-2)


def test_the_branch_begins_with_a_convolution_of_map_and_state_together():
    module, (block,) = conv_form()
    x, h = jnp.abs(normal(2, 4, 4, 24)), normal(2, 4, 4, 4, seed=1)
    expected, _ = block.residual(x, first=together(block, module.cells[0].read, h))
    ours, _ = module(block, module.cells[0], x, h, 0.0)
    assert_close(ours, expected)


def test_add_reads_what_the_state_is_mapped_to():
    module, (block,) = conv_form(fuse="add")
    x, h = jnp.abs(normal(2, 4, 4, 24)), normal(2, 4, 4, 4, seed=1)
    expected, _ = block.residual(x, first=lambda x: block.conv1(x + h @ module.cells[0].read.kernel[0, 0]))
    ours, _ = module(block, module.cells[0], x, h, 0.0)
    assert_close(ours, expected)


def test_the_shortcut_does_not_read_the_state():
    module, (block,) = conv_form()
    block.bn3.scale[...] = block.bn3.bias[...] = jnp.zeros(24)
    x = jnp.abs(normal(2, 4, 4, 24))
    y, _ = module(block, module.cells[0], x, normal(2, 4, 4, 4, seed=1), 0.0)
    np.testing.assert_array_equal(y, x)


def test_the_source_may_be_the_branch_alone():
    module, (block,) = conv_form(state_source="branch_out")
    x, h = jnp.abs(normal(2, 4, 4, 24)), normal(2, 4, 4, 4, seed=1)
    cell = module.cells[0]
    y, state = module(block, cell, x, h, 0.0)
    _, branch = block.residual(x, first=lambda x: block.conv1(x) + cell.read(h))
    a, b = module.coefficients(cell, branch)
    assert_close(state, a * h + b)
    other, _ = module.coefficients(cell, y)
    assert np.abs(a - other).max() > 0.01


def test_states_of_a_stage_are_one_associative_scan_over_its_layers():
    """Offline, from the layers' outputs, as the network has them step by step."""
    stage = network().stages[1]
    shared = stage.aggregation
    x, h = normal(2, 8, 8, 32), normal(2, 8, 8, 4, seed=1)
    online, coefficients = [], []
    start = halved(h, (4, 4))
    for block, cell in zip(stage.blocks, shared.cells, strict=True):
        x, h = shared(block, cell, x, h, 0.0)
        online.append(h)
        coefficients.append(shared.coefficients(cell, x))
    a, b = (jnp.stack(part) for part in zip(*coefficients, strict=True))
    assert_close(linear_recurrence(a, b, axis=0, h0=start), np.stack(online))


def test_maps_states_go_on_from_stage_to_stage():
    module, _ = conv_form()
    x, h = normal(2, 3, 3, 24), normal(2, 3, 3, 4, seed=1)
    assert module.start(x, h) is h
    np.testing.assert_array_equal(module.start(x, None), np.zeros((2, 3, 3, 4)))


def test_the_classifier_may_see_the_state():
    model = nnx.view(network(s6la={"head_state": True}), use_running_average=True)
    assert [stage.head_channels for stage in model.stages] == [0, 0, 0, 4]
    maps, h = model._encode(normal(2, 32, 32, 3), None)
    norm = model.stages[3].aggregation.head_norm
    seen = np.concatenate([maps[3].mean((1, 2)), np.maximum(norm(h), 0).mean((1, 2))], axis=-1)
    assert_close(model(normal(2, 32, 32, 3)), seen @ model.head.kernel[...] + np.asarray(model.head.bias[...])[None])


def test_a_stage_shares_its_dynamics_or_every_block_has_its_own():
    shared, _ = conv_form(depth=3)
    own, _ = conv_form(depth=3, share="block")
    assert own.dynamics is None
    assert all(cell.dynamics is None for cell in shared.cells)
    assert size(own) - size(shared) == 2 * size(shared.dynamics)


def test_dropping_paths_hides_the_state():
    module, (block,) = conv_form(drop_path=0.5)
    for norm in (block.bn1, block.bn2, block.bn3):
        norm.var[...] = jnp.ones_like(norm.var[...])
    block, cell = nnx.view(block, use_running_average=True), module.cells[0]
    x, h = jnp.abs(normal(1, 4, 4, 24)), normal(1, 4, 4, 4, seed=1)
    kept, hidden = (block.residual(x, first=lambda x, h=h: block.conv1(x) + cell.read(h))[0] for h in (2 * h, 0 * h))
    assert np.abs(kept - hidden).max() > 0.1
    seen = set()
    for seed in range(8):
        y, _ = module(block, cell, x, h, 0.0, rngs=nnx.Rngs(dropout=seed))
        seen.add(tuple(bool(np.abs(y - expected).max() < 1e-3 * np.abs(y).max()) for expected in (kept, hidden)))
    assert seen == {(True, False), (False, True)}


def test_basic_blocks_can_be_aggregated_too():
    assert network(block=BasicBlock).features(normal(2, 32, 32, 3))[3].shape == (2, 1, 1, 8)


def test_dynamics_start_as_mambas():
    block = Bottleneck(4, 1, rngs=nnx.Rngs(0))
    stage = Stage([block], 4)
    decay = S6LAConv(stage, state_dim=1000, rngs=nnx.Rngs(0)).dynamics.decay
    np.testing.assert_allclose(decay.A, -np.arange(1.0, 1001.0), rtol=1e-5)
    dt = np.log1p(np.exp(np.asarray(decay.dt_bias[...], float)))
    assert 1e-3 <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 0.1001
    assert np.median(dt) == pytest.approx(1e-2, rel=0.2)  # uniform in the logarithm
    constant = S6LAConv(stage, state_dim=8, a_init="constant", rngs=nnx.Rngs(0)).dynamics.decay
    np.testing.assert_array_equal(constant.A, -np.ones(8))
    random = -S6LAConv(stage, state_dim=1000, a_init="random", rngs=nnx.Rngs(0)).dynamics.decay.A
    assert 1 <= random.min() < 1.1
    assert 900 < random.max() <= 1000
    assert np.median(random) == pytest.approx(1000**0.5, rel=0.2)


# The form for transformers.

TOKENS, D = 7, 6


class Increase(nnx.Module):
    """A block that is easy to follow."""

    def __init__(self, by):
        self.by = nnx.Param(jnp.asarray(by))

    def __call__(self, x, drop_path, *, rngs=None):
        return x + self.by[...] * jnp.roll(x, 1, axis=1)


def token_form(depth=1, *, prefix=1, previous=None, last=True, **options):
    blocks = [Increase(0.5 + i) for i in range(depth)]
    stage = Stage(blocks, D, prefix=prefix, previous=previous, last=last)
    return drawn(lambda: S6LAToken(stage, **{"state_dim": 4} | options, rngs=nnx.Rngs(0))), blocks


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def increment(dynamics, seen, h):
    """What tokens read of a state, by the equation."""
    read = np.einsum("btd,bdn->btn", layer_norm(seen), h) / D**0.5
    return read @ np.asarray(dynamics.output.kernel[...]) + np.asarray(dynamics.output.bias[...])


def updated(dynamics, s, h):
    """The state after one more layer, by the equation."""
    d = s @ np.asarray(dynamics.delta1.kernel[...]) @ np.asarray(dynamics.delta2.kernel[...])
    delta = np.log1p(np.exp(d + np.asarray(dynamics.decay.dt_bias[...])))
    B = s @ np.asarray(dynamics.to_b.kernel[...])
    A = -np.exp(np.asarray(dynamics.decay.A_log[...]))
    return np.exp(delta[:, :, None] * A) * h + delta[:, :, None] * B[:, None] * s[:, :, None]


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_positions_read_what_the_selecting_tokens_left(prefix):
    module, blocks = token_form(2, prefix=prefix)
    x = np.asarray(normal(3, TOKENS, D))
    h = np.zeros((3, D, 4))
    ours, state = jnp.asarray(x), module.start(jnp.asarray(x), None)
    for block, cell in zip(blocks, module.cells, strict=True):
        ours, state = module(block, cell, ours, state, 0.0)
        x = x + np.asarray(block.by[...]) * np.roll(x, 1, axis=1)
        s = layer_norm(x[:, 0] if prefix else x.mean(1))
        h = updated(cell.dynamics, s, h)
        x[:, prefix:] += increment(cell.dynamics, x[:, prefix:], h)
        assert_close(state, h)
        assert_close(ours, x)


def test_the_mean_is_that_of_positions_without_the_class_token():
    module, _ = token_form(prefix=2, token="mean")
    x = normal(3, TOKENS, D)
    assert_close(module.select(x), layer_norm(np.asarray(x)[:, 2:].mean(1)))


def test_maps_are_sequences_of_positions():
    module, _ = token_form(prefix=0)
    x = normal(2, 3, 4, 2, D)
    block = lambda x, drop_path, rngs=None: jnp.sin(x)  # noqa: E731
    as_map, h = module(block, module.cells[0], x, module.start(x, None), 0.0)
    as_tokens, same = module(block, module.cells[0], x.reshape(2, 24, D), h * 0, 0.0)
    assert_close(as_map, as_tokens.reshape(x.shape))
    assert_close(h, same)


def test_reading_is_decayed_linear_attention_over_layers():
    """X_p h^t = sum over s <= t of < X_p, exp(A sum of Delta_r for r in s+1 .. t) Delta_s x_c^s > B_s."""
    module, _ = token_form(5, input_norm=False)
    x_p, layers = np.asarray(normal(2, TOKENS, D)), np.asarray(normal(5, 2, D, seed=1))
    h, deltas, Bs = module.start(jnp.asarray(x_p), None), [], []
    shared = module.cells[0].dynamics
    for s in layers:
        h = module.update(module.cells[0], jnp.asarray(s), h)
        delta, B = shared.inputs(jnp.asarray(s))
        deltas.append(np.asarray(delta, float))
        Bs.append(np.asarray(B, float))
    A, expected = np.asarray(shared.decay.A, float), 0
    for s in range(5):
        later = sum(deltas[s + 1 :], np.zeros((2, D)))
        key = np.exp(A * later[:, :, None]) * (deltas[s] * layers[s])[:, :, None]
        expected += np.einsum("bld,bdn->bln", x_p, key) * Bs[s][:, None]
    assert_close(np.einsum("bld,bdn->bln", x_p, h), expected)


def test_other_ways_to_read():
    x, h = np.asarray(normal(2, TOKENS, D)), np.asarray(normal(2, D, 4, seed=1))
    block = lambda x, drop_path, rngs=None: x  # noqa: E731
    s = layer_norm(x[:, 0])
    results = {}
    for fuse in ("multiply", "add", "gate"):
        module, _ = token_form(fuse=fuse)
        y, state = module(block, module.cells[0], jnp.asarray(x), jnp.asarray(h), 0.0)
        results[fuse] = np.asarray(y), np.asarray(state), module.cells[0].dynamics
    y, state, dynamics = results["add"]
    read = np.einsum("bd,bdn->bn", s, state) / D**0.5
    read = read @ np.asarray(dynamics.output.kernel[...]) + np.asarray(dynamics.output.bias[...])
    assert_close(y[:, 1:], x[:, 1:] + read[:, None])
    y, state, dynamics = results["gate"]
    read = increment(dynamics, x[:, 1:], state)
    assert_close(y[:, 1:], x[:, 1:] * 2 / (1 + np.exp(-read)))
    for y, _, _ in results.values():
        np.testing.assert_array_equal(y[:, 0], x[:, 0])


def test_literal_has_no_stabiliser():
    module, _ = token_form(**S6LAToken.presets["literal"])
    x, h = np.asarray(normal(2, TOKENS, D)), np.asarray(normal(2, D, 4, seed=1))
    block = lambda x, drop_path, rngs=None: x  # noqa: E731
    y, state = module(block, module.cells[0], jnp.asarray(x), jnp.asarray(h), 0.0)
    dynamics = module.cells[0].dynamics
    expected = updated(dynamics, x[:, 0], h)
    assert_close(state, expected)
    read = np.einsum("btd,bdn->btn", x[:, 1:], expected)
    assert_close(
        y[:, 1:], x[:, 1:] + read @ np.asarray(dynamics.output.kernel[...]) + np.asarray(dynamics.output.bias[...])
    )


def test_the_source_may_be_what_the_block_adds():
    module, (block,) = token_form(state_source="branch_out")
    x = normal(2, TOKENS, D)
    _, h = module(block, module.cells[0], x, module.start(x, None), 0.0)
    added = 0.5 * np.roll(x, 1, axis=1)[:, 0]
    assert_close(h, updated(module.cells[0].dynamics, layer_norm(added), np.zeros((2, D, 4))))


@pytest.mark.parametrize(("selective", "dependent"), [("both", "dB"), ("delta", "d"), ("b", "B"), ("none", "")])
def test_selection_is_of_what_it_says(selective, dependent):
    module, _ = token_form(selective=selective)
    delta, B = module.cells[0].dynamics.inputs(normal(2, D))
    assert np.any(delta[0] != delta[1]) == ("d" in dependent)
    assert np.any(B[0] != B[1]) == ("B" in dependent)


def test_a_stage_starts_with_nothing_or_with_the_last_state_in_its_channels():
    h = normal(2, 3, 4)
    reset, _ = token_form(previous=3)
    np.testing.assert_array_equal(reset.start(normal(2, TOKENS, D), h), np.zeros((2, D, 4)))
    project, _ = token_form(previous=3, stage_state="project")
    expected = np.einsum("bcn,cd->bdn", h, np.asarray(project.carry.kernel[...]))
    assert_close(project.start(normal(2, TOKENS, D), h), expected)
    np.testing.assert_array_equal(project.start(normal(2, TOKENS, D), None), np.zeros((2, D, 4)))


def test_the_classifier_may_see_what_it_classifies_read_from_the_state():
    module, _ = token_form(head_state=True)
    x, h = normal(2, D), normal(2, D, 4)
    expected = np.concatenate([x, np.einsum("bd,bdn->bn", layer_norm(np.asarray(x)), h) / D**0.5], axis=-1)
    assert_close(module.readout(x, h), expected)
    assert token_form(head_state=True, last=False)[0].head_channels == 0


def test_training_of_a_can_be_switched_off():
    for module in (conv_form(train_a=False)[0], token_form(train_a=False)[0]):
        decay = (module.dynamics or module.cells[0].dynamics).decay
        graphdef, state = nnx.split(decay)
        grads = jax.grad(lambda state, graphdef=graphdef: nnx.merge(graphdef, state).A.sum())(state)
        assert not np.any(grads["A_log"][...])


def test_normalize_is_layer_normalisation():
    x = normal(4, 9) * 3 + 2
    assert_close(normalize(x), layer_norm(np.asarray(x)))
    assert normalize(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    far = x + 3000  # where squares have no digits left for the variance
    np.testing.assert_allclose(normalize(far), layer_norm(np.asarray(far, float)), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "thousands"),
    [
        *[("deit_tiny", 170), ("deit_small", 452), ("deit_base", 1346)],
        *[("swin_tiny", 490), ("swin_small", 942), ("swin_base", 1474)],
        *[("pvt_v2_b0", 75), ("pvt_v2_b1", 199), ("pvt_v2_b2", 393)],
    ],
)
def test_transformers_have_the_counted_parameters(name, thousands):
    extra = size(counted(f"{name}_s6la")) - size(counted(name))
    assert round(extra / 1e3) == thousands


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_small", "swin_tiny", "pvt_v2_b1"])
def test_reading_costs_less_than_the_counted_multiply_adds(name):
    plain, aggregated = (
        ssm_jax.summary(counted(each), (1, 224, 224, 3)).total.multiply_adds for each in (name, f"{name}_s6la")
    )
    assert 0 < aggregated - plain < 0.11e9


def small(family, **options):
    """A small network of a family, with S6LA."""
    aggregation = functools.partial(S6LAToken, **{"state_dim": 4} | options.pop("s6la", {}))
    sizes = {"img_size": 16, "patch_size": 4, "d_model": 8, "num_heads": 2, "depth": 2}
    convnext = {"img_size": 32, "depths": (1, 1, 2, 1), "dims": (4, 4, 8, 8)}
    swin = {"img_size": 16, "patch_size": 4, "d_model": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 2}
    pvt = {"depths": (1, 2), "dims": (8, 16), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (2, 2)}
    make = {
        "deit": lambda **o: deit(5, **{**sizes, "distilled": True} | o),
        "vit": lambda **o: vit(5, **{**sizes, "class_token": False} | o),
        "swin": lambda **o: SwinTransformer(5, **swin | o),
        "pvt_v2": lambda **o: PVTv2(5, **pvt | o),
        "convnext": lambda **o: ConvNeXt(5, **convnext | o),
    }[family]
    return (
        lambda **o: make(**o, **options, rngs=nnx.Rngs(0)),
        aggregation,
        (2, *((32, 32) if family == "convnext" else (16, 16)), 3),
    )


FAMILIES = ["deit", "vit", "swin", "pvt_v2", "convnext"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_starts_as_its_backbone(family):
    make, aggregation, shape = small(family)
    model = make(aggregation=aggregation)
    plain = drawn(make)
    values = nnx.to_pure_dict(nnx.state(plain))
    state = nnx.to_pure_dict(nnx.state(model))

    def put(into, values):
        for name, value in values.items():
            if isinstance(value, dict):
                put(into[name], value)
            else:
                into[name] = value

    put(state, values)
    nnx.update(model, state)
    x = normal(*shape)
    np.testing.assert_array_equal(run(lambda m, x: m(x), model, x), run(lambda m, x: m(x), plain, x))
    assert size(model) > size(plain)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_used_after_the_first_step(family):
    options = {"s6la": {"head_state": True, "stage_state": "project"}}
    make, aggregation, shape = small(family, **options)
    f, params = split(drawn(lambda: make(aggregation=aggregation)))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, normal(*shape))))))(params)
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.isfinite(gradient).all(), path
        name = jax.tree_util.keystr(path)
        unused = "['cells'][0]['dynamics']['decay']['A_log']" in name  # decays a state of zeros
        unused |= family == "deit" and "['cells'][1]['dynamics']['output']" in name  # only class tokens are classified
        assert np.any(gradient) or unused or "aggregation" not in name, path


def step(model, shape):
    """Loss, batch statistics and gradients."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        y = model(x, rngs=nnx.Rngs(dropout=1))
        return jnp.sum(y**2), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    (value, statistics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, normal(*shape))
    return value, statistics, nnx.to_pure_dict(grads)


@functools.cache
def plain_step(form):
    """A network, the shape of its images, and its step."""
    if form == "conv":
        model, shape = network(depths=(1, 3), dims=(8, 8)), (4, 16, 16, 3)
    else:
        make, aggregation, shape = small("deit", s6la={"drop_path": 0.5}, depth=3)
        model = drawn(lambda: make(aggregation=aggregation))
    return model, shape, step(model, shape)


@pytest.mark.parametrize("how", [{"remat": "nothing_saveable"}, {"scan": True, "remat": "dots_saveable"}], ids=str)
@pytest.mark.parametrize("form", ["conv", "token"])
def test_loops_and_rematerialisation_change_no_number(how, form):
    model, shape, expected = plain_step(form)
    result = step(nnx.view(model, **how), shape)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), expected, result)


def test_half_precision_keeps_the_state_in_float32():
    half = jnp.bfloat16
    module, (block,) = conv_form(dtype=half)
    x = normal(2, 3, 3, 24).astype(half)
    y, h = module(block, module.cells[0], x, module.start(x, None), 0.0)
    assert (y.dtype, h.dtype) == (half, jnp.float32)
    assert module.cells[0].norm(x[..., :12]).dtype == jnp.float32
    module, _ = token_form(dtype=half)
    x = normal(2, TOKENS, D).astype(half)
    y, h = module(lambda x, drop_path, rngs=None: x, module.cells[0], x, module.start(x, None), 0.0)
    assert (y.dtype, h.dtype) == (half, jnp.float32)


def test_dynamics_are_parameters_of_their_own_kind():
    """So that the optimizer decays none of them."""
    for module in (conv_form(selective="none")[0], token_form(selective="none")[0]):
        kinds = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(module, SSMParam))}
        assert kinds == {"A_log", "dt_bias", "B"}


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (conv_form, {"state_dim": 0}, "state_dim must be a whole number of at least 1, got 0"),
        (conv_form, {"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        (conv_form, {"discretization": "tustin"}, "discretization must be one of euler, zoh, got 'tustin'"),
        (conv_form, {"selective": "c"}, "selective must be one of both, delta, b, none, got 'c'"),
        (conv_form, {"a_init": "hippo"}, "a_init must be one of s4d_real, constant, random, got 'hippo'"),
        (conv_form, {"share": "network"}, "share must be one of stage, block .stages are of different widths., got"),
        (conv_form, {"state_source": "x"}, "state_source must be one of block_out, branch_out, got 'x'"),
        (conv_form, {"fuse": "gate"}, "fuse must be one of concat, add, got 'gate'"),
        (token_form, {"state_dim": True}, "state_dim must be a whole number of at least 1, got True"),
        (token_form, {"fuse": "concat"}, "fuse must be one of multiply, add, gate, got 'concat'"),
        (token_form, {"stage_state": "keep"}, "stage_state must be one of reset, project, got 'keep'"),
        (token_form, {"token": "all"}, "token must be one of class, mean, got 'all'"),
        (token_form, {"token": "class", "prefix": 0}, "token must be 'mean' in a network without a class token, got"),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_impossible_arguments_are_rejected(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_form_for_residual_networks_needs_their_blocks():
    with pytest.raises(ValueError, match="S6LAConv is for the blocks of a ResNet, which have a `residual`; S6LAToken"):
        S6LAConv(Stage([Increase(1.0)], D), rngs=nnx.Rngs(0))


def test_the_form_for_transformers_cannot_see_the_branches_of_residual_blocks():
    block = nnx.eval_shape(lambda: Bottleneck(8, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="state_source must be 'block_out' in a ResNet, got 'branch_out'"):
        S6LAToken(Stage([block], 8), state_source="branch_out", rngs=nnx.Rngs(0))
