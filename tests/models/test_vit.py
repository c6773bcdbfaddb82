import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import drawn, split
from oracles import gelu, layer_norm

from ssm_jax.layers.norm import LayerNorm
from ssm_jax.layers.position import resample_positions
from ssm_jax.models.vit import Block, VisionTransformer, deit, vit, vit_s4nd
from ssm_jax.pretrained import load_torch

SIZES = {"img_size": 8, "patch_size": 4, "d_model": 6, "depth": 2}
ATTENTION = {**SIZES, "num_heads": 2}
S4ND = {**SIZES, "mixer": {"d_state": 4}}
NETWORKS = {
    "vit": functools.partial(vit, 5, **ATTENTION),
    "deit_distilled": functools.partial(deit, 5, distilled=True, **ATTENTION),
    "vit_s4nd": functools.partial(vit_s4nd, 5, **S4ND),
}


def small(name, **arguments):
    """A network whose activations keep their size, so that all of its parts show in its output."""
    model = drawn(lambda: NETWORKS[name](**arguments, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "kernel":
            variable[...] = variable[...] / np.sqrt(np.prod(variable.shape[:-1]), dtype=np.float32)
    return model


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def call(f, x, **options):
    return jax.tree.map(np.asarray, jax.jit(lambda x: f(x, **options))(x))


def close(actual, expected, relative):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


def prefixed(golden, prefix):
    return {name.removeprefix(prefix): golden[name] for name in golden.files if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (vit, 86_540_008),
        (functools.partial(deit, d_model=192, num_heads=3), 5_717_416),
        (functools.partial(deit, d_model=384, num_heads=6), 22_050_664),
        (deit, 86_567_656),
        (functools.partial(deit, d_model=192, num_heads=3, distilled=True), 5_910_800),
        (functools.partial(deit, d_model=384, num_heads=6, distilled=True), 22_436_432),
        (functools.partial(deit, distilled=True), 87_338_192),
        (vit_s4nd, 88_786_408),
    ],
)
def test_networks_of_the_papers_have_their_numbers_of_parameters(build, expected):
    model = nnx.eval_shape(lambda: build(1000, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == expected


@pytest.fixture(scope="module")
def golden_deit(shared):
    golden = np.load(shared / "golden/timm/deit.npz")
    meta = json.loads(str(golden["meta"]))["kwargs"]
    return golden, lambda: deit(
        meta["num_classes"],
        img_size=meta["img_size"],
        patch_size=meta["patch_size"],
        d_model=meta["embed_dim"],
        depth=meta["depth"],
        num_heads=meta["num_heads"],
        rngs=nnx.Rngs(0),
    )


def test_deit_is_that_of_timm(golden_deit):
    golden, build = golden_deit
    model = drawn(build)
    load_torch(model, prefixed(golden, "param/"))
    x = jnp.asarray(np.moveaxis(golden["x"], 1, -1))
    close(call(model.patch_embed, x).reshape(2, 64, 48), golden["tap/patch_embed"], 2e-6)
    close(call(model, x), golden["logits"], 2e-6)
    (last,) = call(model.features, x)
    close(last, np.moveaxis(golden["feat/2"], 1, -1), 2e-6)
    block = model.blocks.blocks[1]
    close(call(block, jnp.asarray(golden["tap/blocks.0"]), drop_path=0.0), golden["tap/blocks.1"], 2e-6)


def test_gradients_of_deit_are_those_of_timm(golden_deit):
    golden, build = golden_deit
    model, expected = drawn(build), drawn(build)
    load_torch(model, prefixed(golden, "param/"))
    load_torch(expected, prefixed(golden, "grad/"))
    f, params = split(model)
    x, w = jnp.asarray(np.moveaxis(golden["x"], 1, -1)), jnp.asarray(golden["grad_w"])
    grads, grad_x = jax.jit(jax.grad(lambda params, x: jnp.sum(f(params, x) * w), argnums=(0, 1)))(params, x)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), grads, nnx.to_pure_dict(nnx.state(expected)))
    close(grad_x, np.moveaxis(golden["grad_x"], 1, -1), 1e-5)


def test_vit_is_that_of_the_s4nd_release(shared):
    golden = np.load(shared / "golden/s4nd/model_vit_attention.npz")
    sizes = {"img_size": 32, "patch_size": 8, "d_model": 8, "depth": 2, "num_heads": 2}
    model = drawn(lambda: vit(7, **sizes, rngs=nnx.Rngs(0)))
    load_torch(model, prefixed(golden, "param/"))
    x = np.moveaxis(golden["rate1/x"], 1, -1).astype(np.float32)
    close(call(model, x), golden["rate1/y"], 2e-6)


def test_vit_s4nd_is_that_of_the_release(shared):
    golden = np.load(shared / "golden/s4nd/model_vit_s4nd_dplr.npz")
    sizes = {"img_size": 32, "patch_size": 8, "d_model": 8, "depth": 2}
    model = drawn(lambda: vit_s4nd(7, mixer={"d_state": 8}, **sizes, rngs=nnx.Rngs(0)))
    load_torch(model, prefixed(golden, "param/"))
    x = np.moveaxis(golden["rate1/x"], 1, -1).astype(np.float32)
    close(call(model, x), golden["rate1/y"], 1e-5)


def linear(x, layer):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def norm(x, layer):
    return layer_norm(x, np.asarray(layer.scale[...]), np.asarray(layer.bias[...]))


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_patches_tokens_positions_blocks_norm_and_classifiers(name):
    model, x = small(name), images(2, 8, 8, 3)
    patches = x.reshape(2, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(2, 4, -1)
    kernel, bias = (np.asarray(variable[...]) for variable in (model.patch_embed.kernel, model.patch_embed.bias))
    tokens = [patches @ kernel.reshape(-1, 6) + bias]
    if name != "vit_s4nd":
        prefix = [model.cls_token] + ([model.dist_token] if name == "deit_distilled" else [])
        tokens = [*(np.tile(np.asarray(token[...]), (2, 1, 1)) for token in prefix), *tokens]
    y = np.concatenate(tokens, axis=1)
    if name != "vit_s4nd":
        y = y + np.asarray(model.pos_embed[...])
    for block in model.blocks.blocks:
        y = y + call(block.mixer, norm(y, block.norm1).astype(np.float32))
        y = y + linear(gelu(linear(norm(y, block.norm2), block.mlp.fc1)), block.mlp.fc2)
    (last,) = call(model.features, x)
    close(last, y[:, -4:].reshape(2, 2, 2, 6), 1e-4)
    if name == "vit_s4nd":
        heads = [linear(norm(y, model.norm).mean(axis=1), model.head)]
    else:
        heads = [linear(norm(y, model.norm)[:, 0], model.head)]
    if name == "deit_distilled":
        heads.append(linear(norm(y, model.norm)[:, 1], model.head_dist))
    for actual, expected in zip(call(model.heads, x), heads, strict=True):
        close(actual, expected, 1e-4)
    close(call(model, x), np.mean(heads, axis=0), 1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_used(name):
    f, params = split(small(name))
    x = jnp.array(images(2, 8, 8, 3))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, x)))))(params)
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


def test_epsilon_of_deit_is_not_that_of_vit():
    build = lambda name: nnx.eval_shape(lambda: NETWORKS[name](rngs=nnx.Rngs(0)))  # noqa: E731
    epsilons = {
        name: {norm.epsilon for _, norm in nnx.iter_modules(build(name)) if isinstance(norm, nnx.LayerNorm)}
        for name in NETWORKS
    }
    assert epsilons == {"vit": {1e-5}, "deit_distilled": {1e-6}, "vit_s4nd": {1e-5}}


@pytest.mark.parametrize("size", [(16, 12), (4, 8)])
def test_other_images_are_seen_with_resampled_positions(size):
    model = small("deit_distilled")
    grid = (size[0] // 4, size[1] // 4)
    x = images(2, *size, 3)
    logits, (last,) = call(model, x), call(model.features, x)
    assert last.shape == (2, *grid, 6)
    model.pos_embed = nnx.Param(resample_positions(model.pos_embed[...], (2, 2), grid))
    model.grid = grid
    np.testing.assert_allclose(call(model, x), logits, rtol=1e-5)


class Told(nnx.Module):
    """A mixer that says what it was given: its rate times the length of the sequence."""

    def __init__(self, d_model, **arguments):
        pass

    def __call__(self, x, *, rate, rngs):
        return jnp.full_like(x, rate * x.shape[1])


@pytest.mark.parametrize("rate", [1.0, 2.0, 0.5])
def test_sequences_of_images_at_any_rate_last_equally_long(rate):
    told = []

    class Recorder(Told):
        def __call__(self, x, *, rate, rngs):
            told.append(rate * x.shape[1])
            return x

    arguments = {**SIZES, "patch_size": 2, "class_token": False}
    model = drawn(lambda: VisionTransformer(5, mixer=Recorder, **arguments, rngs=nnx.Rngs(0)))
    size = round(8 / rate)
    jax.eval_shape(lambda x: model(x, rate=rate), jnp.zeros((1, size, size, 3)))
    assert told == [16.0, 16.0]


def test_rate_reaches_state_spaces_and_not_attention():
    x = images(2, 8, 8, 3)
    s4nd, attention = small("vit_s4nd"), small("vit")
    assert not np.allclose(call(s4nd, x, rate=2.0), call(s4nd, x))
    np.testing.assert_array_equal(call(attention, x, rate=2.0), call(attention, x))


def test_s4nd_is_that_of_the_paper_but_for_what_is_overridden():
    build = lambda **arguments: nnx.eval_shape(lambda: vit_s4nd(5, d_model=4, depth=2, **arguments, rngs=nnx.Rngs(0)))  # noqa: E731
    for block in build().blocks.blocks:
        assert block.mixer.l_max == (196,)
        assert block.mixer.kernels[0].C.shape == (2, 2, 1, 2, 4, 32)
    other = build(img_size=64, patch_size=8, mixer={"d_state": 8, "channels": 1}).blocks.blocks[1].mixer
    assert other.l_max == (64,)
    assert other.kernels[0].C.shape == (2, 2, 1, 1, 4, 4)
    assert build(mixer={"l_max": 9}).blocks.blocks[0].mixer.l_max == (9,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("deit_distilled", {"scan": True, "remat": "dots_saveable"}),
        ("vit_s4nd", {"scan": True, "remat": "nothing_saveable"}),
    ],
)
def test_scan_and_rematerialisation_change_no_numbers(name, view):
    model = small(name, drop_path=0.3)
    x = jnp.array(images(8, 8, 8, 3))

    def value_and_gradient(model):
        f, params = split(model)
        loss = lambda params: jnp.sum(jnp.sin(f(params, x, rngs=nnx.Rngs(dropout=1))))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    expected = value_and_gradient(model)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), value_and_gradient(nnx.view(model, **view)), expected)


def test_blocks_drop_their_branches_by_example():
    block = drawn(lambda: Block(6, mixer=Told, mlp_ratio=4.0, norm=LayerNorm, rngs=nnx.Rngs(0)))
    x = jnp.zeros((64, 3, 6))
    block.mlp.fc2.kernel[...] = jnp.zeros((24, 6))
    block.mlp.fc2.bias[...] = jnp.full((6,), 7.0)
    y = np.asarray(jax.jit(lambda x: block(x, 0.5, rngs=nnx.Rngs(dropout=0)))(x))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    # The mixer gives 3 and the MLP 7, each doubled or dropped, on their own.
    assert set(y[:, 0, 0].tolist()) == {0.0, 6.0, 14.0, 20.0}
    np.testing.assert_array_equal(block(x, 0.0), np.full(x.shape, 10.0))


def test_rates_of_dropping_rise_to_that_of_the_last_block():
    model = nnx.eval_shape(lambda: NETWORKS["vit"](depth=3, drop_path=0.1, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(model.blocks.drop_path, [0, 0.05, 0.1])


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_logits_agree_with_float32_to_rounding(name):
    half, full = small(name, dtype=jnp.bfloat16), small(name)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    x = images(2, 8, 8, 3)
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm needs it
        logits, expected = call(half, x), call(full, x)
    assert logits.dtype == jnp.bfloat16
    error = np.abs(logits.astype(np.float32) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["deit_distilled", "vit_s4nd"])
def test_initial_values_are_small_normal_but_for_the_patches(name):
    build = lambda: NETWORKS[name](d_model=64, rngs=nnx.Rngs(0))  # noqa: E731
    variables = nnx.to_flat_state(jax.jit(lambda: nnx.state(build()))())
    state = {path: np.asarray(variable[...]) for path, variable in variables}
    for path, value in state.items():
        if path[0] == "patch_embed":
            bound = (3 * 4**2) ** -0.5
            assert np.abs(value).max() <= bound, path
            assert np.std(value) == pytest.approx(bound / 3**0.5, rel=0.2), path
        elif path[-1] in ("kernel", "cls_token", "dist_token", "pos_embed"):
            assert np.mean(value) == pytest.approx(0, abs=0.006), path
            assert np.std(value) == pytest.approx(0.02, rel=0.25), path
        elif path[-1] in ("scale", "bias"):
            assert np.all(value == (path[-1] == "scale")), path
        else:
            assert "mixer" in path
    kernels = [value for path, value in state.items() if path[-2:] in (("fc1", "kernel"), ("output", "kernel"))]
    assert len(np.unique([np.sum(value) for value in kernels])) == len(kernels)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (deit, {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        (deit, {"d_model": 0}, "d_model must be at least 1, got 0"),
        (deit, {"depth": 0}, "depth must be at least 1, got 0"),
        (deit, {"in_channels": 0}, "in_channels must be at least 1, got 0"),
        (deit, {"patch_size": 0}, "patch_size must be at least 1, got 0"),
        (deit, {"img_size": 30}, "img_size must be a positive multiple of patch_size=16, got 30"),
        (deit, {"img_size": 0}, "img_size must be a positive multiple of patch_size=16, got 0"),
        (deit, {"num_heads": 5}, "num_heads must divide d_model=48, got 5"),
        (deit, {"mlp_ratio": 0.01}, "mlp_ratio must leave a width of at least 1, got 0.01"),
        (deit, {"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        (deit, {"distilled": True, "class_token": False}, "distilled must be False without a class_token"),
        (deit, {"remat": "some"}, "remat must be one of"),
        (vit_s4nd, {"patch_size": 0}, "patch_size must be at least 1, got 0"),
        (vit_s4nd, {"img_size": 30}, "img_size must be a positive multiple of patch_size=16, got 30"),
        (vit_s4nd, {"mixer": {"channels": 0}}, "channels must be at least 1, got 0"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_impossible_arguments_are_rejected(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**{"num_classes": 3, "d_model": 48} | arguments, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("shape", [(2, 8, 9, 3), (2, 6, 8, 3), (2, 8, 8, 1), (2, 0, 8, 3)], ids=str)
def test_impossible_images_are_rejected(shape):
    model = small("vit")
    with pytest.raises(ValueError, match=r"images must be .* 3 channels.* multiples of 4, got shape \(2"):
        jax.eval_shape(model, jnp.zeros(shape))


def test_network_without_tokens_or_with_positions_alone_is_possible():
    x = images(2, 8, 8, 3)
    model = drawn(lambda: vit(5, class_token=False, **ATTENTION, rngs=nnx.Rngs(0)))
    assert isinstance(model, VisionTransformer)
    assert model.pos_embed.shape == (1, 4, 6)
    assert call(model, x).shape == (2, 5)
