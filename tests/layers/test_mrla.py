import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import assert_close, drawn, images, size
from oracles import sigmoid

import ssm_jax
from ssm_jax.layers.aggregation import Stage
from ssm_jax.layers.mrla import MRLABase, MRLALight
from ssm_jax.layers.stack import Stack
from ssm_jax.models.convnext import ConvNeXt
from ssm_jax.models.pvt_v2 import PVTv2
from ssm_jax.models.resnet import Residual, ResNet
from ssm_jax.models.swin import SwinTransformer
from ssm_jax.models.vit import deit
from ssm_jax.ops import linear_recurrence

C, D = 8, 4  # channels of a map, and of a head


def normal(*shape, seed=0):
    return jnp.asarray(images(*shape, seed=seed))


def counted(name):
    return nnx.eval_shape(lambda: ssm_jax.create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))


class Wave(nnx.Module):
    """A block that is easy to follow, of a transformer."""

    def __call__(self, x, drop_path, *, rngs=None):
        return x + jnp.sin(x)


class ResidualWave(Residual):
    """A block that is easy to follow, of a ResNet."""

    conv1 = None

    def branch(self, x, first):
        del first
        return jnp.sin(x)


def stage_form(kind, depth=1, *, residual=True, prefix=0, **options):
    """MRLA of a stage, and its blocks."""
    blocks = [ResidualWave(C, C, rngs=nnx.Rngs(0)) if residual else Wave() for _ in range(depth)]
    stage = Stage(blocks, C, prefix=prefix)
    return drawn(lambda: kind(stage, **{"head_dim": D} | options, rngs=nnx.Rngs(0))), blocks


def layers(module, blocks, x, **arguments):
    """Outputs and memories after all blocks."""
    h, results = module.start(x, None), []
    for block, cell in zip(blocks, module.cells, strict=True):
        x, h = module(block, cell, x, h, 0.0, **arguments)
        results.append((x, h))
    return results


def values(parameter):
    return np.asarray(parameter[...], float)


def layer_norm(norm, x):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return y * values(norm.scale) + values(norm.bias)


def batch_norm(norm, x):
    axes = tuple(range(x.ndim - 1))
    y = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
    return y * values(norm.scale) + values(norm.bias)


def projected(cell, x):
    """Queries and keys (b, heads, d) and the value of a map, by the equations."""
    x = x if cell.before is None else layer_norm(cell.before, x)
    h, w = x.shape[1:3]

    def along_channels(conv):
        taps = values(conv.kernel)[:, 0, 0]
        padded = np.pad(x.mean((1, 2)), ((0, 0), (len(taps) // 2,) * 2))
        return sum(tap * padded[:, i : i + C] for i, tap in enumerate(taps)).reshape(-1, C // D, D)

    kernel, padded = values(cell.value.kernel)[:, :, 0], np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    value = sum(kernel[i, j] * padded[:, i : i + h, j : j + w] for i, j in np.ndindex(3, 3))
    return along_channels(cell.query), along_channels(cell.key), value


def spread(weights):
    """(b, heads) for all positions and channels of a map."""
    return np.repeat(weights, D, axis=-1)[:, None, None]


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / 2**0.5))


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "parameters"), [(50, 25.738), (101, 44.940), (152, 60.768)])
def test_resnets_have_the_counted_parameters(depth, parameters):
    assert round(size(counted(f"resnet{depth}_mrla_light")) / 1e6, 3) == parameters


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "multiply_adds"), [(50, 4.139), (101, 7.882)])
def test_resnets_have_the_counted_multiply_adds(depth, multiply_adds):
    model = counted(f"resnet{depth}_mrla_light")
    assert round(ssm_jax.summary(model, (1, 224, 224, 3)).total.multiply_adds / 1e9, 3) == multiply_adds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("resnet50_mrla_base", lambda c, k: 2 * k + 9 * c + 2 * c),  # queries and keys, values, batch norm
        ("deit_tiny_mrla_base", lambda c, k: 2 * k + 9 * c + 2 * c),  # layer norm
        ("deit_tiny_mrla_light", lambda c, k: 2 * k + 9 * c + 2 * c + c),
    ],
)
def test_networks_have_the_parameters_of_the_equations(name, each):
    plain, method = name.split("_mrla")[0], counted(name)
    resnet = [(256, 5)] * 3 + [(512, 5)] * 4 + [(1024, 5)] * 6 + [(2048, 7)] * 3
    widths = resnet if "resnet" in name else [(192, 5)] * 12
    assert size(method) - size(counted(plain)) == sum(each(c, k) for c, k in widths)


@pytest.mark.parametrize("residual", [True, False])
def test_base_attends_to_all_layers_of_a_stage(residual):
    module, blocks = stage_form(MRLABase, 3, residual=residual)
    expected, memory = np.asarray(normal(2, 4, 3, C), float), []
    for cell, (y, _) in zip(module.cells, layers(module, blocks, normal(2, 4, 3, C)), strict=True):
        expected = np.maximum(expected + np.sin(expected), 0) if residual else expected + np.sin(expected)
        query, key, value = projected(cell, expected)
        memory.append((key, value))
        weights = np.exp([(query * key).sum(-1) / D**0.5 for key, _ in memory])
        weights = weights / weights.sum(0)
        o = sum(spread(weight) * value for weight, (_, value) in zip(weights, memory, strict=True))
        expected = expected + (np.maximum(batch_norm(cell.after, o), 0) if residual else o)
        assert_close(y, expected)


@pytest.mark.parametrize("residual", [True, False])
def test_light_adds_what_the_layer_before_retrieved(residual):
    module, blocks = stage_form(MRLALight, 3, residual=residual)
    expected, o = np.asarray(normal(2, 4, 3, C), float), 0
    for cell, (y, h) in zip(module.cells, layers(module, blocks, normal(2, 4, 3, C)), strict=True):
        expected = np.maximum(expected + np.sin(expected), 0) if residual else expected + np.sin(expected)
        query, key, value = projected(cell, expected)
        gate = sigmoid((query * key).sum(-1) / D**0.5)
        o = spread(gate) * (value if residual else gelu(value)) + values(cell.decay) * o
        expected = expected + (batch_norm(cell.after, o) if residual else o)
        assert_close(h[0], o)
        assert_close(y, expected)


def test_what_light_retrieves_in_all_layers_is_one_linear_recurrence_over_them():
    """Offline, from the layers' outputs, as the network has them step by step."""
    module, blocks = stage_form(MRLALight, 6)
    outputs, memories = zip(*layers(module, blocks, normal(2, 4, 3, C)), strict=True)
    inputs = normal(2, 4, 3, C), *outputs[:-1]
    coefficients = []
    for block, cell, x in zip(blocks, module.cells, inputs, strict=True):
        coefficients.append(module.coefficients(*module.project(cell, block(x, 0.0)), cell))
    a, b = (jnp.stack(part) for part in zip(*coefficients, strict=True))
    offline = linear_recurrence(jnp.broadcast_to(a, b.shape), b, axis=0)
    assert_close(offline, np.stack([o for o, _ in memories]))


@pytest.mark.parametrize("kind", [MRLABase, MRLALight])
def test_tokens_are_a_map_and_those_of_no_position_pass_through(kind):
    as_tokens, blocks = stage_form(kind, 3, residual=False, prefix=2)
    as_map, _ = stage_form(kind, 3, residual=False)
    x = normal(2, 2 + 12, C)
    tokens = layers(as_tokens, blocks, x, size=(4, 3))
    maps = layers(as_map, blocks, x[:, 2:].reshape(2, 4, 3, C))
    passed = x[:, :2]
    for (y, _), (expected, _) in zip(tokens, maps, strict=True):
        assert_close(y[:, 2:].reshape(2, 4, 3, C), np.asarray(expected))
        passed = passed + jnp.sin(passed)
        np.testing.assert_array_equal(y[:, :2], passed)


@pytest.mark.parametrize("kind", [MRLABase, MRLALight])
def test_memory_starts_anew(kind):
    module, blocks = stage_form(kind, 5, residual=False, restart=2)
    results = layers(module, blocks, normal(2, 4, 3, C))
    later, _ = stage_form(kind, 3, residual=False, restart=2)
    later.cells = nnx.List(module.cells[2:])
    for (y, _), (again, _) in zip(results[2:], layers(later, blocks[2:], results[1][0]), strict=True):
        np.testing.assert_array_equal(y, again)
    x, h = results[0]
    remembered, _ = module(blocks[1], module.cells[1], x, h, 0.0)
    forgotten, _ = module(blocks[1], module.cells[1], x, module.start(x, None), 0.0)
    assert np.abs(remembered - forgotten).max() > 0.01


def test_memory_lasts_for_a_stage_and_in_token_networks_for_four_layers():
    assert stage_form(MRLALight)[0].restart is None
    assert stage_form(MRLALight, prefix=1)[0].restart == 4
    assert stage_form(MRLALight, prefix=1, restart=12)[0].restart == 12


@pytest.mark.parametrize("kind", [MRLABase, MRLALight])
def test_a_stage_remembers_no_other_and_its_first_block_may_change_the_map(kind):
    first, second = network("resnet", kind, depths=(1, 2), dims=(4, 4)).stages
    x, h = first(jnp.abs(normal(2, 6, 5, 8)))
    jax.tree.map(np.testing.assert_array_equal, second.aggregation.start(x, h), second.aggregation.start(x, None))
    assert second(x, h)[0].shape == (2, 3, 3, 16)


def test_dropping_paths_leaves_the_block():
    module, (block,) = stage_form(MRLABase, drop_path=0.5, residual=False)
    x = normal(64, 2, 2, C)
    y, _ = module(block, module.cells[0], x, (), 0.0, rngs=nnx.Rngs(dropout=0))
    full, _ = stage_form(MRLABase, residual=False)
    kept, _ = full(block, full.cells[0], x, (), 0.0)
    plain = block(x, 0.0)
    dropped = np.all(y == plain, axis=(1, 2, 3))
    assert 16 < dropped.sum() < 48
    assert_close(y[~dropped], np.asarray(plain + 2 * (kept - plain))[~dropped])


def network(family, kind, **options):
    aggregation = functools.partial(kind, head_dim=8)
    sizes = {"img_size": (8, 8), "patch_size": 4, "d_model": 8}
    make = {
        "resnet": lambda **o: ResNet(5, **{"depths": (3,), "dims": (4,), "stem_width": 8} | o),
        "deit": lambda **o: deit(5, img_size=16, patch_size=4, d_model=8, num_heads=2, depth=2, distilled=True, **o),
        "swin": lambda **o: SwinTransformer(5, **sizes, depths=(2, 1), num_heads=(1, 2), window_size=2, **o),
        "pvt_v2": lambda **o: PVTv2(5, depths=(1, 2), dims=(8, 16), num_heads=(1, 2), sr_ratios=(2, 1), **o),
        "convnext": lambda **o: ConvNeXt(5, img_size=32, depths=(1, 1, 2, 1), dims=(8, 8, 8, 8), **o),
    }[family]
    if family == "pvt_v2":
        options = {"mlp_ratios": (2, 2)} | options
    return drawn(lambda: make(**{"aggregation": aggregation} | options, rngs=nnx.Rngs(0)), seed=3)


@pytest.mark.parametrize("kind", [MRLABase, MRLALight])
@pytest.mark.parametrize("family", ["deit", "swin", "pvt_v2", "convnext"])
def test_networks_of_maps_of_any_shape_have_it(family, kind):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: network(family, kind)))
    f = lambda state, x: nnx.merge(graphdef, state, copy=True)(x)  # noqa: E731
    x = jax.ShapeDtypeStruct((2, 32, 64, 3), jnp.float32)
    assert jax.eval_shape(f, state, x).shape == (2, 5)


@functools.cache
def trained(kind, residual, **how):
    """A loss, batch statistics and gradients of a stage of a ResNet, or of class token and patches."""
    options = {"residual": True} if residual else {"residual": False, "prefix": 1, "restart": 2}
    module, blocks = stage_form(kind, 4, **options)
    stage = Stack(blocks, drop_path=[0.0] * 4, aggregation=module, **how)
    graphdef, params, rest = nnx.split(stage, nnx.Param, ...)
    x, arguments = (normal(4, 3, 5, C), {}) if residual else (normal(4, 16, C), {"size": (3, 5)})

    def loss(params, x):
        stage = nnx.merge(graphdef, params, rest, copy=True)
        y, _ = stage(x, **arguments)
        return jnp.sum(jnp.sin(y)), nnx.to_pure_dict(nnx.state(stage, nnx.BatchStat))

    (value, statistics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
    return value, statistics, nnx.to_pure_dict(grads)


@pytest.mark.parametrize(
    ("kind", "residual", "how"),
    [
        (MRLALight, True, {"scan": True, "remat": "nothing_saveable"}),
        (MRLALight, False, {"scan": True}),
        (MRLABase, True, {"remat": "nothing_saveable"}),
    ],
)
def test_loops_and_rematerialisation_change_no_number(kind, residual, how):
    plain, other = trained(kind, residual), trained(kind, residual, **how)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain[2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), plain, other)


def test_a_memory_that_grows_is_carried_by_no_loop():
    message = "scan must be False with MRLABase, whose state grows from block to block, got True"
    with pytest.raises(ValueError, match=message):
        network("resnet", MRLABase, scan=True)
    with pytest.raises(ValueError, match=message):
        nnx.view(network("resnet", MRLABase), scan=True)


@pytest.mark.parametrize(("kind", "residual"), [(MRLABase, True), (MRLALight, True), (MRLALight, False)])
def test_every_parameter_is_used(kind, residual):
    for path, gradient in jax.tree.leaves_with_path(trained(kind, residual)[2]):
        *_, cell, which = [key.key for key in path[:4]]
        assert np.isfinite(gradient).all(), path
        # A first layer has nothing to choose from, and nothing to forget.
        first = cell == 0 if residual else cell % 2 == 0
        assert np.any(gradient) != (first and which == {MRLABase: "query", MRLALight: "decay"}[kind]), path


def test_half_precision_keeps_the_state_in_float32():
    module, blocks = stage_form(MRLALight, 2, dtype=jnp.bfloat16)
    ((_, _), (y, (o, _))) = layers(module, blocks, normal(2, 3, 3, C).astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert o.dtype == jnp.float32
    module, blocks = stage_form(MRLABase, 2, dtype=jnp.bfloat16)
    ((_, _), (y, ((key, value), _))) = layers(module, blocks, normal(2, 3, 3, C).astype(jnp.bfloat16))
    assert (y.dtype, key.dtype, value.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


def test_parameters_start_as_the_authors():
    stages = {True: Stage([ResidualWave(512, 512, rngs=nnx.Rngs(0))], 512), False: Stage([Wave()], 512)}
    for residual, stage in stages.items():
        module = MRLALight(stage, rngs=nnx.Rngs(0))
        (cell,) = module.cells
        assert module.head_dim == (32 if residual else 16)
        assert MRLABase(stage, rngs=nnx.Rngs(0)).head_dim == 16
        assert cell.query.kernel.shape == cell.key.kernel.shape == (5, 1, 1)
        assert np.abs(cell.query.kernel[...]).max() <= 5**-0.5
        assert values(cell.decay).std() == pytest.approx(1, rel=0.1)
        value = values(cell.value.kernel)
        assert value.std() == pytest.approx((2 / (9 * 512)) ** 0.5 if residual else 3**-0.5 / 3, rel=0.05)
        assert residual or np.abs(value).max() <= 1 / 3
        np.testing.assert_array_equal((cell.after if residual else cell.before).scale[...], np.ones(512))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 3}, "head_dim must divide the stage's 8 channels, got 3"),
        ({"head_dim": 16}, "head_dim must divide the stage's 8 channels, got 16"),
        ({"head_dim": 0}, "head_dim must divide the stage's 8 channels, got 0"),
        ({"kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"restart": 0}, "restart must be at least 1, got 0"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_impossible_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        stage_form(MRLALight, **options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 12, C), "size must be given for a sequence of positions"),
        ((2, 2, 3, 2, C), r"x must be a map of height and width, got shape \(2, 2, 3, 2, 8\)"),
    ],
)
def test_positions_are_those_of_a_map(shape, message):
    module, (block,) = stage_form(MRLALight, residual=False)
    x = normal(*shape)
    with pytest.raises(ValueError, match=message):
        module(block, module.cells[0], x, module.start(x, None), 0.0)
