import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from flax import nnx
from modules import assert_close, drawn, images, size, split

from ssm_jax.models.swin import (
    Block,
    PatchMerging,
    SwinTransformer,
    relative_position_index,
    resample_relative_positions,
    shift_mask,
)
from ssm_jax.pretrained import load_torch

SMALL: dict[str, Any] = {"depths": (2, 2), "num_heads": (1, 2), "d_model": 8, "img_size": 32, "window_size": 2}


def build(num_classes=3, **arguments):
    return SwinTransformer(num_classes, **SMALL | arguments, rngs=nnx.Rngs(0))


def small(**arguments):
    return drawn(lambda: build(**arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"d_model": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}, 28_288_354),
        ({"d_model": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}, 49_606_258),
        ({"d_model": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}, 87_768_224),
    ],
    ids=["tiny", "small", "base"],
)
def test_networks_of_the_paper_have_the_originals_numbers_of_parameters(arguments, expected):
    depths = arguments["depths"]
    model = nnx.eval_shape(lambda: SwinTransformer(1000, **arguments | {"depths": (1,) * 4}, rngs=nnx.Rngs(0)))
    more = sum((n - 1) * size(stage.blocks[0]) for n, stage in zip(depths, model.stages, strict=True))
    assert size(model) + more == expected


@pytest.fixture(scope="module")
def golden(shared):
    file = np.load(shared / "golden" / "timm" / "swin_w4.npz", allow_pickle=False)
    arguments = json.loads(str(file["meta"]))["kwargs"]
    arguments["d_model"] = arguments.pop("embed_dim")
    model = nnx.eval_shape(lambda: SwinTransformer(**arguments, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract))
    load_torch(model, {key.removeprefix("param/"): file[key] for key in file if key.startswith("param/")})
    return model, file


def test_logits_and_stage_maps_are_the_originals(golden):
    model, file = golden
    x = jnp.asarray(np.moveaxis(file["x"], 1, -1))
    logits, maps = jax.jit(lambda x: (model(x), model.features(x)))(x)
    assert_close(logits, file["logits"], 2e-6)
    for stage, x in enumerate(maps):
        assert_close(x, np.moveaxis(file[f"feat/{stage}"], 1, -1), 2e-6)


def test_every_block_and_merging_is_the_originals(golden):
    model, file = golden
    taps = {"patch_embed": model.patch_embed}
    for i, stage in enumerate(model.stages):
        if i:
            taps[f"layers.{i}.downsample"] = model.downsamples[i - 1]
        taps |= {f"layers.{i}.blocks.{j}": block for j, block in enumerate(stage.blocks)}
    x, outputs = jnp.asarray(np.moveaxis(file["x"], 1, -1)), {}
    for name, module in taps.items():
        f = (lambda x, block=module: block(x, 0.0)) if isinstance(module, Block) else module
        x = jax.jit(f)(x)
        outputs[name] = x
    assert {key.removeprefix("tap/") for key in file if key.startswith("tap/")} == set(outputs)
    for name, x in outputs.items():
        assert_close(x, file[f"tap/{name}"], 2e-6)


def test_index_and_mask_are_the_originals(golden):
    _, file = golden
    for key in file:
        expected = file[key]
        if key.endswith("relative_position_index"):
            side = round(len(expected) ** 0.5)
            np.testing.assert_array_equal(relative_position_index((side, side)), expected)
        if key.endswith("attn_mask"):
            side = 4 * round(len(expected) ** 0.5)
            np.testing.assert_array_equal(shift_mask((side, side), (4, 4), (2, 2)), expected)


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (4, 2)])
def test_pairs_of_positions_have_the_same_row_where_their_difference_is_the_same(window):
    positions = list(np.ndindex(window))
    index = relative_position_index(window)
    rows = {}
    for (i, query), (j, key) in ((a, b) for a in enumerate(positions) for b in enumerate(positions)):
        rows.setdefault((query[0] - key[0], query[1] - key[1]), set()).add(index[i, j])
    assert all(len(row) == 1 for row in rows.values())
    # From the least difference to the greatest, row by row: the layout of the original's tables.
    assert [row for difference in sorted(rows) for row in rows[difference]] == list(range(len(rows)))


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((8, 8), (4, 4), (2, 2)), ((9, 6), (3, 3), (1, 1)), ((4, 6), (4, 2), (0, 1)), ((6, 4), (3, 4), (0, 0))],
)
def test_positions_see_each_other_where_the_shifted_grid_has_them_in_one_cell(size, window, shift):
    # Cells of the image itself, before it is rolled: the grid begins `shift` inside, with cut cells at the margin.
    def cell(position):
        return tuple((p - s) // w for p, s, w in zip(position, shift, window, strict=True))

    mask = shift_mask(size, window, shift)
    origins = [(i, j) for i in range(0, size[0], window[0]) for j in range(0, size[1], window[1])]
    assert mask.shape == (len(origins), np.prod(window), np.prod(window))
    for seen, (top, left) in zip(mask, origins, strict=True):
        rolled = [(top + i, left + j) for i, j in np.ndindex(*window)]
        image = [tuple((p + s) % n for p, s, n in zip(at, shift, size, strict=True)) for at in rolled]
        expected = [[0.0 if cell(query) == cell(key) else -100.0 for key in image] for query in image]
        np.testing.assert_array_equal(seen, expected)


def attention(x, attn, window, shift):
    """Window by window, head by head and query by query; numpy, float64."""
    qkv, proj = ([np.asarray(layer.kernel[...], float), np.asarray(layer.bias[...])] for layer in (attn.qkv, attn.proj))
    table = np.asarray(attn.relative_position_bias_table[...], float)
    table = table.reshape(2 * window[0] - 1, 2 * window[1] - 1, -1)
    _, h, w, c = x.shape
    x = np.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = np.pad(x, ((0, 0), (0, -h % window[0]), (0, -w % window[1]), (0, 0)))
    height, width = x.shape[1:3]
    rows, columns = np.arange(height) >= height - shift[0], np.arange(width) >= width - shift[1]
    q, k, v = np.split(x @ qkv[0] + qkv[1], 3, axis=-1)
    y, d = np.zeros(x.shape), c // attn.num_heads
    for b, i, j, head in np.ndindex(len(x), height, width, attn.num_heads):
        channels = slice(head * d, (head + 1) * d)
        top, left = i - i % window[0], j - j % window[1]
        keys = [(top + m, left + n) for m, n in np.ndindex(*window)]
        logits = [
            q[b, i, j, channels] @ k[b, m, n, channels] / np.sqrt(d)
            + table[i - m + window[0] - 1, j - n + window[1] - 1, head]
            - 100.0 * (rows[i] != rows[m] or columns[j] != columns[n])
            for m, n in keys
        ]
        weights = scipy.special.softmax(logits)
        y[b, i, j, channels] = sum(weight * v[b, m, n, channels] for weight, (m, n) in zip(weights, keys, strict=True))
    return np.roll((y @ proj[0] + proj[1])[:, :h, :w], shift, (1, 2))


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((4, 6), (2, 3), (0, 0)),
        ((4, 6), (2, 3), (1, 1)),
        ((6, 4), (3, 4), (1, 0)),
        ((5, 4), (2, 3), (0, 0)),
        ((5, 4), (2, 3), (1, 1)),
        ((1, 2), (2, 3), (0, 0)),
    ],
    ids=str,
)
def test_block_attends_within_windows(size, window, shift):
    sizes = {"num_heads": 2, "window": window, "shift": shift, "mlp_ratio": 1}
    block = drawn(lambda: Block(4, **sizes, rngs=nnx.Rngs(0), dtype=None, param_dtype=jnp.float32))
    x = images(2, *size, 4)
    actual = jax.jit(lambda x: (block._attention(x), block.norm1(x), block(x, 0.0)))(x)
    np.testing.assert_allclose(actual[0], attention(x, block.attn, window, shift), rtol=0, atol=1e-4)
    update = attention(np.asarray(actual[1]), block.attn, window, shift).astype(np.float32)
    after = jax.jit(lambda x: x + block.mlp(block.norm2(x)))(x + update)
    np.testing.assert_allclose(actual[2], after, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("h", "w"), [(4, 6), (3, 4), (5, 3), (1, 1)])
def test_merging_joins_four_positions_and_halves_their_channels(h, w):
    merging = drawn(lambda: PatchMerging(2, rngs=nnx.Rngs(0)))
    x = images(2, h, w, 2)
    padded = np.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    corners = [padded[:, i::2, j::2] for i, j in [(0, 0), (1, 0), (0, 1), (1, 1)]]
    expected = jax.jit(lambda x: merging.norm(x) @ merging.reduction.kernel[...])(np.concatenate(corners, axis=-1))
    assert_close(jax.jit(merging)(x), expected)


@pytest.mark.parametrize(
    ("arguments", "windows", "shifts"),
    [
        ({"img_size": 224}, [(7, 7)] * 4, [(3, 3)] * 3 + [(0, 0)]),
        ({"img_size": 64, "window_size": 4}, [(4, 4)] * 3 + [(2, 2)], [(2, 2)] * 2 + [(0, 0)] * 2),
        ({"img_size": (112, 36)}, [(7, 7), (7, 5), (7, 3), (4, 2)], [(3, 3), (3, 0), (0, 0), (0, 0)]),
        ({"img_size": (32, 800), "patch_size": 2}, [(7, 7), (7, 7), (4, 7), (2, 7)], [(3, 3), (3, 3), (0, 3), (0, 3)]),
    ],
    ids=str,
)
def test_a_window_that_holds_the_map_is_the_map_and_does_not_shift(arguments, windows, shifts):
    model = nnx.eval_shape(
        lambda: SwinTransformer(3, depths=(2, 2, 2, 2), num_heads=(1,) * 4, d_model=1, **arguments, rngs=nnx.Rngs(0))
    )
    assert [stage.blocks[0].window for stage in model.stages] == windows
    assert [stage.blocks[1].window for stage in model.stages] == windows
    assert [stage.blocks[0].shift for stage in model.stages] == [(0, 0)] * 4
    assert [stage.blocks[1].shift for stage in model.stages] == shifts


def test_stage_maps_of_images_of_any_size_are_halves_rounded_up():
    model = small(depths=(1, 1, 1), num_heads=(1, 1, 1))
    maps = jax.eval_shape(model.features, jax.ShapeDtypeStruct((2, 20, 44, 3), jnp.float32))
    assert [x.shape for x in maps] == [(2, 5, 11, 8), (2, 3, 6, 16), (2, 2, 3, 32)]


def test_logits_are_the_classifier_of_the_mean_of_the_normed_last_map():
    model = small()
    x = images(2, 24, 40, 3)
    last = jax.jit(lambda x: model.norm(model.features(x)[-1]))(x)
    expected = np.asarray(last).mean(axis=(1, 2)) @ np.asarray(model.head.kernel[...]) + np.asarray(
        model.head.bias[...]
    )
    assert_close(jax.jit(lambda x: model(x, rate=2.0))(x), expected)


@pytest.mark.parametrize("window", [4, (4, 4)])
def test_tables_resampled_to_their_own_window_stay(window):
    table = images(49, 3)
    np.testing.assert_allclose(resample_relative_positions(table, window), table, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [1, 2, 6, (3, 7)])
def test_resampled_tables_keep_constants_and_symmetry(window):
    constant = resample_relative_positions(np.full((25, 2), 0.75, np.float32), window)
    np.testing.assert_allclose(constant, 0.75, rtol=1e-6)
    table = images(25, 2)
    table += table[::-1]  # the bias of a difference is that of its negative
    resampled = resample_relative_positions(table, window)
    height, width = (window, window) if isinstance(window, int) else window
    assert resampled.shape == ((2 * height - 1) * (2 * width - 1), 2)
    assert resampled.dtype == np.float32
    np.testing.assert_allclose(resampled, resampled[::-1], rtol=0, atol=1e-5)


def test_resampling_is_the_bicubic_interpolation_of_pytorch():
    # torch.nn.functional.interpolate(table as (1, 1, 5, 5), size=..., mode="bicubic")
    table = np.zeros((25, 1), np.float32)
    table[7], table[20] = 1.0, 2.0
    coarse = resample_relative_positions(table, 2).reshape(3, 3)
    fine = resample_relative_positions(table, 4).reshape(7, 7)
    expected = [[-0.02057605, 0.3703704, -0.02057623], [0, 0, 0], [0.93895704, 0, 0]]
    np.testing.assert_allclose(coarse, expected, rtol=0, atol=1e-5)
    expected = [0, -0.07190873, 0.21073289, 0.6851312, 0.21073265, -0.07190873, 0]
    np.testing.assert_allclose(fine[1], expected, rtol=0, atol=1e-5)
    expected = [2.3272638, 0.90574473, -0.23587127, 0, 0, 0, 0]
    np.testing.assert_allclose(fine[6], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 1), (16, 1), (25,), (0, 1)])
def test_tables_of_no_square_window_are_rejected(shape):
    with pytest.raises(ValueError, match="table must have shape"):
        resample_relative_positions(np.zeros(shape, np.float32), 3)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        resample_relative_positions(np.zeros((9, 1), np.float32), 0)


@pytest.mark.slow
def test_loops_and_rematerialisation_change_no_number():
    model = small(depths=(4,), num_heads=(2,), drop_path=0.5)
    x = jnp.asarray(images(2, 16, 16, 3))
    results = []
    for view in [{}, {"scan": True}, {"remat": "nothing_saveable"}]:
        f, params = split(nnx.view(model, **view))
        loss = lambda params, f=f: jnp.sum(jnp.sin(f(params, x, rngs=nnx.Rngs(dropout=0))))  # noqa: E731
        results.append(jax.jit(jax.value_and_grad(loss))(params))
    for result in results[1:]:
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), result, results[0])


def test_pairs_of_plain_and_shifted_blocks_are_one_loop():
    f, params = split(small(depths=(2, 6), scan=True))
    jaxpr = jax.make_jaxpr(lambda params, x: f(params, x, rngs=nnx.Rngs(dropout=0)))(params, images(1, 64, 64, 3))
    assert [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"] == [3]


def test_drop_path_is_that_of_the_depth_and_of_its_key():
    model = small(drop_path=0.5)
    np.testing.assert_allclose([r for stage in model.stages for r in stage.drop_path], np.linspace(0, 0.5, 4))
    f, params = split(model)
    x = jnp.asarray(images(4, 32, 32, 3))
    train = jax.jit(lambda key: f(params, x, rngs=nnx.Rngs(dropout=key)))
    first, same, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)
    evaluate = nnx.view(model, deterministic=True)
    np.testing.assert_array_equal(jax.jit(lambda x: evaluate(x))(x), jax.jit(lambda x: small()(x))(x))


def test_gradients_are_finite_and_every_parameter_is_used():
    f, params = split(small())
    x = jnp.asarray(images(2, 32, 32, 3))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, x)))))(params)
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


def test_bfloat16_logits_agree_with_float32_to_rounding():
    half, full = small(dtype=jnp.bfloat16), small()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    x = images(2, 32, 32, 3)
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm needs it
        logits, expected = (np.asarray(jax.jit(lambda x, model=model: model(x))(x)) for model in (half, full))
    assert logits.dtype == jnp.bfloat16
    error = np.abs(logits.astype(np.float32) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


def test_initial_values_are_the_originals():
    state = jax.jit(lambda: nnx.to_pure_dict(nnx.state(build(50, d_model=32, window_size=4))))()
    bound = 48**-0.5
    for path, leaf in jax.tree.leaves_with_path(state):
        name, values = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)
        if "patch_embed/proj" in name:
            assert 0.9 * bound < np.abs(values).max() <= bound
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.2 if values.ndim == 1 else 0.05)
        elif name.endswith(("kernel", "table")):
            assert values.std() == pytest.approx(0.02, rel=4 / (2 * values.size) ** 0.5), name
            assert abs(values.mean()) < 4 / values.size**0.5 * 0.02, name
        else:
            np.testing.assert_array_equal(values, np.full(values.shape, float(name.endswith("scale"))), name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"img_size": 0}, "img_size must be at least 1, got 0"),
        ({"img_size": 30}, r"img_size must be a multiple of patch_size=4, got \(30, 30\)"),
        ({"img_size": (32, 31)}, r"img_size must be a multiple of patch_size=4, got \(32, 31\)"),
        ({"depths": ()}, r"depths must be at least 1 for each stage, got \(\)"),
        ({"depths": (2, 0)}, r"depths must be at least 1 for each stage, got \(2, 0\)"),
        ({"num_heads": (1,)}, r"num_heads must divide the stages' widths \(8, 16\), got \(1,\)"),
        ({"num_heads": (3, 2)}, r"num_heads must divide the stages' widths \(8, 16\), got \(3, 2\)"),
        ({"num_heads": (1, 0)}, r"num_heads must divide the stages' widths \(8, 16\), got \(1, 0\)"),
        ({"mlp_ratio": 0.1}, "mlp_ratio must be at least 1 / d_model = 1 / 8, got 0.1"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"remat": "all"}, "remat must be one of .*, got 'all'"),
    ],
    ids=str,
)
def test_impossible_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: build(**arguments))


@pytest.mark.parametrize("shape", [(1, 32, 32, 4), (1, 30, 32, 3), (1, 32, 34, 3)])
def test_images_of_other_channels_or_broken_patches_are_rejected(shape):
    with pytest.raises(ValueError, match=r"images must be \(batch, height, width, 3 channels\).* multiples of 4"):
        jax.eval_shape(small(), jax.ShapeDtypeStruct(shape, jnp.float32))
