import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from flax import nnx
from modules import assert_close, drawn, images, size, split
from oracles import gelu

from ssm_jax.models.pvt_v2 import Attention, Block, ConvMLP, PVTv2, adaptive_mean
from ssm_jax.pretrained import load_torch

SMALL: dict[str, Any] = {
    "dims": (4, 8),
    "depths": (1, 2),
    "num_heads": (1, 2),
    "sr_ratios": (4, 1),
    "mlp_ratios": (2, 2),
}
WIDE: dict[str, Any] = {"dims": (64, 128, 320, 512)}
DTYPES: dict[str, Any] = {"dtype": None, "param_dtype": jnp.float32}


def build(num_classes=3, **arguments):
    return PVTv2(num_classes, **SMALL | arguments, rngs=nnx.Rngs(0))


def small(**arguments):
    return drawn(lambda: build(**arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)}, 3_666_760),
        (WIDE | {"depths": (2, 2, 2, 2)}, 14_009_000),
        (WIDE | {"depths": (3, 4, 6, 3)}, 25_362_856),
        (WIDE | {"depths": (3, 4, 6, 3), "linear": True}, 22_553_512),
        (WIDE | {"depths": (3, 4, 18, 3)}, 45_238_696),
        (WIDE | {"depths": (3, 8, 27, 3)}, 62_556_072),
        (WIDE | {"depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4)}, 81_956_008),
    ],
    ids=["b0", "b1", "b2", "b2_li", "b3", "b4", "b5"],
)
def test_networks_of_the_paper_have_the_originals_numbers_of_parameters(arguments, expected):
    depths = arguments["depths"]
    model = nnx.eval_shape(lambda: PVTv2(1000, **arguments | {"depths": (1,) * 4}, rngs=nnx.Rngs(0)))
    more = sum((n - 1) * size(stage.blocks[0]) for n, stage in zip(depths, model.stages, strict=True))
    assert size(model) + more == expected


@pytest.fixture(scope="module", params=["pvt_v2", "pvt_v2_li"])
def golden(shared, request):
    file = np.load(shared / "golden" / "timm" / f"{request.param}.npz", allow_pickle=False)
    arguments = json.loads(str(file["meta"]))["kwargs"]
    arguments |= {"dims": arguments.pop("embed_dims"), "sr_ratios": (8, 4, 2, 1), "mlp_ratios": (8, 8, 4, 4)}
    model = nnx.eval_shape(lambda: PVTv2(**arguments, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract))
    load_torch(model, {key.removeprefix("param/"): file[key] for key in file if key.startswith("param/")})
    return model, file


def test_logits_and_stage_maps_are_the_originals(golden):
    model, file = golden
    x = jnp.asarray(np.moveaxis(file["x"], 1, -1))
    logits, maps = jax.jit(lambda x: (model(x), model.features(x)))(x)
    assert_close(logits, file["logits"], 5e-6)
    for stage, x in enumerate(maps):
        assert_close(x, np.moveaxis(file[f"feat/{stage}"], 1, -1), 5e-6)


def test_every_block_and_embedding_is_the_originals(golden):
    model, file = golden
    x, outputs = jnp.asarray(np.moveaxis(file["x"], 1, -1)), {}
    for i, (downsample, stage, norm) in enumerate(zip(model.downsamples, model.stages, model.norms, strict=True)):
        x = jax.jit(downsample)(x)
        outputs[f"stages.{i}.downsample" if i else "patch_embed"] = x
        for j, block in enumerate(stage.blocks):
            x = jax.jit(lambda x, block=block: block(x, 0.0))(x)
            outputs[f"stages.{i}.blocks.{j}"] = x.reshape(len(x), -1, x.shape[-1])
        x = jax.jit(norm)(x)
    assert {key.removeprefix("tap/") for key in file if key.startswith("tap/")} == set(outputs)
    for name, x in outputs.items():
        assert_close(x, file[f"tap/{name}"], 5e-6)


@pytest.mark.parametrize("case", range(4))
def test_adaptive_mean_is_the_originals(shared, case):
    file = np.load(shared / "golden" / "timm" / "unit_layers.npz", allow_pickle=False)
    x, expected = (np.moveaxis(file[f"adaptive_avg/{case}/{name}"], 1, -1) for name in "xy")
    assert_close(jax.jit(adaptive_mean, static_argnums=1)(x, expected.shape[1:3]), expected, 1e-6)


@pytest.mark.parametrize(("h", "w", "size"), [(7, 7, (7, 7)), (14, 21, (7, 7)), (10, 5, (7, 3)), (3, 1, (7, 2))])
def test_adaptive_mean_averages_all_positions_that_a_cell_touches(h, w, size):
    x = images(2, h, w, 3)
    expected = np.zeros((2, *size, 3))
    for i, j in np.ndindex(*size):
        # Cell i reaches from i h / m to (i + 1) h / m, position p from p to p + 1.
        rows = [p for p in range(h) if p + 1 > i * h / size[0] and p < (i + 1) * h / size[0]]
        columns = [p for p in range(w) if p + 1 > j * w / size[1] and p < (j + 1) * w / size[1]]
        expected[:, i, j] = x[:, rows][:, :, columns].mean(axis=(1, 2))
    assert_close(jax.jit(adaptive_mean, static_argnums=1)(x, size), expected, 1e-6)


def affine(x, layer):
    return x @ np.asarray(layer.kernel[...], float) + np.asarray(layer.bias[...])


def attention(x, summaries, attn):
    """Image by image, head by head and query by query."""
    q = affine(x, attn.q)
    k, v = np.split(affine(summaries, attn.kv).reshape(len(x), -1, 2 * x.shape[-1]), 2, axis=-1)
    y, d = np.zeros(x.shape), x.shape[-1] // attn.num_heads
    for b, i, j, head in np.ndindex(*x.shape[:3], attn.num_heads):
        channels = slice(head * d, (head + 1) * d)
        weights = scipy.special.softmax(k[b, :, channels] @ q[b, i, j, channels] / np.sqrt(d))
        y[b, i, j, channels] = weights @ v[b, :, channels]
    return affine(y, attn.proj)


@pytest.mark.parametrize("sr_ratio", [1, 2, 3])
def test_positions_attend_to_patches(sr_ratio):
    attn = drawn(lambda: Attention(4, num_heads=2, sr_ratio=sr_ratio, linear=False, rngs=nnx.Rngs(0), **DTYPES))
    x = images(2, 6, 5, 4)
    summaries = x
    if sr_ratio > 1:
        # Patches that do not overlap; what is left at the lower and right margins is in none.
        h, w = 6 // sr_ratio, 5 // sr_ratio
        patches = x[:, : h * sr_ratio, : w * sr_ratio].reshape(2, h, sr_ratio, w, sr_ratio, 4)
        summaries = np.einsum("bhiwjc,ijcd->bhwd", patches, np.asarray(attn.sr.kernel[...]))
        summaries = np.asarray(jax.jit(attn.norm)(summaries + np.asarray(attn.sr.bias[...])))
    np.testing.assert_allclose(jax.jit(attn)(x), attention(x, summaries, attn), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(14, 9), (3, 2)])
def test_positions_attend_linearly_to_seven_by_seven_means(size):
    attn = drawn(lambda: Attention(4, num_heads=2, sr_ratio=8, linear=True, rngs=nnx.Rngs(0), **DTYPES))
    x = images(2, *size, 4)
    means = jax.jit(adaptive_mean, static_argnums=1)(x, (7, 7))
    projected = np.asarray(means) @ np.asarray(attn.sr.kernel[...])[0, 0] + np.asarray(attn.sr.bias[...])
    summaries = gelu(np.asarray(jax.jit(attn.norm)(projected)))
    np.testing.assert_allclose(jax.jit(attn)(x), attention(x, summaries, attn), rtol=0, atol=1e-4)


@pytest.mark.parametrize("linear", [False, True])
def test_mlp_convolves_each_hidden_channel_by_itself(linear):
    mlp = drawn(lambda: ConvMLP(3, 5, linear=linear, rngs=nnx.Rngs(0), **DTYPES))
    x = images(2, 4, 3, 3)
    hidden = affine(x, mlp.fc1)
    padded = np.pad(np.maximum(hidden, 0) if linear else hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
    weights, y = np.asarray(mlp.dwconv.kernel[...]), np.zeros(hidden.shape) + np.asarray(mlp.dwconv.bias[...])
    for row, column in np.ndindex(3, 3):
        y += padded[:, row : row + 4, column : column + 3] * weights[row, column, 0]
    np.testing.assert_allclose(jax.jit(mlp)(x), affine(gelu(y), mlp.fc2), rtol=0, atol=1e-4)


def test_block_adds_attention_and_mlp_of_normed_maps():
    sizes = {"num_heads": 2, "sr_ratio": 2, "mlp_ratio": 2}
    block = drawn(lambda: Block(4, **sizes, linear=False, rngs=nnx.Rngs(0), **DTYPES))
    x = images(2, 4, 6, 4)

    def expected(x):
        x = x + block.attn(block.norm1(x))
        return x + block.mlp(block.norm2(x))

    assert_close(jax.jit(lambda x: block(x, 0.0))(x), jax.jit(expected)(x))


@pytest.mark.parametrize("linear", [False, True])
def test_stage_maps_of_images_of_any_size_are_quarters_and_halves_rounded_up(linear):
    model = small(linear=linear)
    maps = jax.eval_shape(model.features, jax.ShapeDtypeStruct((2, 33, 50, 3), jnp.float32))
    assert [x.shape for x in maps] == [(2, 9, 13, 4), (2, 5, 7, 8)]


@pytest.mark.parametrize("linear", [False, True])
def test_logits_are_the_classifier_of_the_mean_of_the_last_map(linear):
    model = small(linear=linear)
    x = images(2, 20, 40, 3)
    last = jax.jit(lambda x: model.features(x)[-1])(x)
    expected = np.asarray(last).mean(axis=(1, 2)) @ np.asarray(model.head.kernel[...]) + np.asarray(
        model.head.bias[...]
    )
    assert_close(jax.jit(lambda x: model(x, rate=2.0))(x), expected)


@pytest.mark.slow
def test_loops_and_rematerialisation_change_no_number():
    stage = {"dims": (4,), "depths": (2,), "num_heads": (2,), "sr_ratios": (2,), "mlp_ratios": (2,)}
    model = small(**stage, drop_path=0.5)
    x = jnp.asarray(images(2, 16, 24, 3))
    results = []
    for view in [{}, {"scan": True}, {"remat": "nothing_saveable"}]:
        f, params = split(nnx.view(model, **view))
        loss = lambda params, f=f: jnp.sum(jnp.sin(f(params, x, rngs=nnx.Rngs(dropout=0))))  # noqa: E731
        results.append(jax.jit(jax.value_and_grad(loss))(params))
    for result in results[1:]:
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), result, results[0])


def test_drop_path_is_that_of_the_depth_and_of_its_key():
    model = small(drop_path=0.6)
    np.testing.assert_allclose([r for stage in model.stages for r in stage.drop_path], [0, 0.3, 0.6])
    f, params = split(model)
    x = jnp.asarray(images(4, 16, 16, 3))
    train = jax.jit(lambda key: f(params, x, rngs=nnx.Rngs(dropout=key)))
    first, same, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)
    evaluate = nnx.view(model, deterministic=True)
    np.testing.assert_array_equal(jax.jit(lambda x: evaluate(x))(x), jax.jit(lambda x: small()(x))(x))


@pytest.mark.parametrize("linear", [False, True])
def test_gradients_are_finite_and_every_parameter_is_used(linear):
    f, params = split(small(depths=(1, 1), linear=linear))
    x = jnp.asarray(images(2, 32, 24, 3))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, x)))))(params)
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


@pytest.mark.parametrize("linear", [False, True])
def test_bfloat16_logits_agree_with_float32_to_rounding(linear):
    half, full = (small(depths=(1, 1), linear=linear, dtype=dtype) for dtype in (jnp.bfloat16, None))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    x = images(2, 32, 24, 3)
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm needs it
        logits, expected = (np.asarray(jax.jit(lambda x, model=model: model(x))(x)) for model in (half, full))
    assert logits.dtype == jnp.bfloat16
    error = np.abs(logits.astype(np.float32) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


def test_initial_values_are_the_originals():
    state = jax.jit(lambda: nnx.to_pure_dict(nnx.state(build(50, dims=(32, 64), mlp_ratios=(8, 8)))))()
    for path, leaf in jax.tree.leaves_with_path(state):
        name, values = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)
        if name.endswith("kernel"):
            # Outputs that an input of a convolution reaches: one channel's in a depthwise one.
            fan_out = 9 if "dwconv" in name else values.size / values.shape[-2]
            std = 0.02 if values.ndim == 2 else (2 / fan_out) ** 0.5
            assert values.std() == pytest.approx(std, rel=4 / (2 * values.size) ** 0.5), name
            assert abs(values.mean()) < 4 / values.size**0.5 * std, name
        else:
            np.testing.assert_array_equal(values, np.full(values.shape, float(name.endswith("scale"))), name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"dims": ()}, r"dims must be at least 1 for each of 0 stages, got \(\)"),
        ({"dims": (4, 0)}, r"dims must be at least 1 for each of 2 stages, got \(4, 0\)"),
        ({"depths": (1,)}, r"depths must be at least 1 for each of 2 stages, got \(1,\)"),
        ({"depths": (1, 0)}, r"depths must be at least 1 for each of 2 stages, got \(1, 0\)"),
        ({"num_heads": (0, 1)}, r"num_heads must be at least 1 for each of 2 stages, got \(0, 1\)"),
        ({"num_heads": (3, 2)}, r"num_heads must divide dims=\(4, 8\), got \(3, 2\)"),
        ({"sr_ratios": (8, 4, 2, 1)}, r"sr_ratios must be at least 1 for each of 2 stages, got \(8, 4, 2, 1\)"),
        ({"mlp_ratios": (4,)}, r"mlp_ratios must be at least 1 / width for each of dims=\(4, 8\), got \(4,\)"),
        ({"mlp_ratios": (4, 0.1)}, r"mlp_ratios must be at least 1 / width for each of dims=\(4, 8\), got \(4, 0.1\)"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
        ({"remat": "all"}, "remat must be one of .*, got 'all'"),
    ],
    ids=str,
)
def test_impossible_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**arguments))


def test_images_of_other_channels_or_without_a_patch_are_rejected():
    model = small(sr_ratios=(4, 3))
    jax.eval_shape(model, jax.ShapeDtypeStruct((1, 17, 18, 3), jnp.float32))
    for shape in [(1, 32, 32, 1), (1, 16, 32, 3), (1, 32, 16, 3)]:
        with pytest.raises(
            ValueError, match=r"images must be \(batch, height, width, 3 channels\), at least \(17, 17\), got"
        ):
            jax.eval_shape(model, jax.ShapeDtypeStruct(shape, jnp.float32))
    jax.eval_shape(small(linear=True), jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.float32))
