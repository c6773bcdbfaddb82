import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_jax.detection.roi_align import assigned_levels, pyramid_roi_align, roi_align


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden/torchvision/unit_roi_align.npz")


def slow_weights(shape, boxes, *, output_size, scale, sampling_ratio=2, aligned=False):
    """RoIAlign is linear: its matrix (boxes * s * s, h * w) by the definition, sample by sample."""
    h, w = shape

    def sample(y, x):
        if not (-1 <= y <= h and -1 <= x <= w):
            return np.zeros(h * w)
        y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
        hats = (np.maximum(1 - np.abs(at - np.arange(length)), 0) for at, length in ((y, h), (x, w)))
        return np.outer(*hats).ravel()

    rows = []
    for left, top, right, bottom in np.asarray(boxes, np.float64) * scale - (0.5 if aligned else 0):
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        offsets = (np.arange(sampling_ratio) + 0.5) / sampling_ratio
        for i in range(output_size):
            for j in range(output_size):
                ys, xs = (top + (i + offsets) * height / output_size, left + (j + offsets) * width / output_size)
                rows.append(np.mean([sample(y, x) for y in ys for x in xs], axis=0))
    return np.array(rows)


def map_and_boxes(seed, n, shape=(5, 6), channels=2):
    """Boxes that reach beyond the map, and some of no size."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(*shape, channels)).astype(np.float32)
    boxes = np.sort(rng.uniform(-8, 20, (n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32)
    boxes[: n // 4, 2:] = boxes[: n // 4, :2]
    return jnp.asarray(maps), jnp.asarray(boxes)


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_are_those_of_the_definition(seed, aligned):
    maps, boxes = map_and_boxes(seed, 8)
    options = {"output_size": 2, "scale": 0.5, "sampling_ratio": 2, "aligned": aligned}
    matrix = slow_weights((5, 6), boxes, **options)
    y, pull = jax.vjp(functools.partial(roi_align, boxes=boxes, **options), maps)
    np.testing.assert_allclose(y.reshape(-1, 2), matrix @ maps.reshape(-1, 2), atol=1e-5)
    np.testing.assert_allclose(pull(y)[0].reshape(-1, 2), matrix.T @ y.reshape(-1, 2), atol=1e-4)


def test_torchvisions_cases_with_their_gradients(golden):
    cases = json.loads(str(golden["meta"]))["cases"]
    cases = {name: case for name, case in cases.items() if case["sampling_ratio"] > 0 and "spatial_scale" in case}
    assert len(cases) == 6
    for name, case in cases.items():
        x, y, w = (np.moveaxis(golden[f"{name}/{part}"], 1, -1) for part in "xyw")
        rois = golden[f"{name}/rois"]
        boxes = jnp.asarray(rois[:, 1:])
        options = {part: case[part] for part in ("output_size", "sampling_ratio", "aligned")}

        @jax.jit
        def of_image(maps, w, options=options, scale=case["spatial_scale"], boxes=boxes):
            y, pull = jax.vjp(lambda m, b: roi_align(m, b, scale=scale, **options), maps, boxes)
            return y, pull(w)

        for image in range(2):
            there = rois[:, 0] == image
            found, (gradient, of_boxes) = of_image(x[image], w * there[:, None, None, None])
            np.testing.assert_allclose(found[there], y[there], atol=1e-5)
            np.testing.assert_allclose(gradient, np.moveaxis(golden[f"{name}/grad_x"][image], 0, -1), atol=1e-5)
            assert not of_boxes.any()


def test_torchvisions_pyramid(golden):
    cases = json.loads(str(golden["meta"]))["cases"]
    for name in ("multiscale/box", "multiscale/small_canonical"):
        case = cases[name]
        image_size = tuple(np.max(case["image_sizes"], axis=0).tolist())
        canonical = {"canonical_size": case["canonical_scale"], "canonical_level": case["canonical_level"]}
        options = {"output_size": case["output_size"], "sampling_ratio": case["sampling_ratio"], **canonical}
        for image in range(2):
            maps = [jnp.moveaxis(jnp.asarray(golden[f"multiscale/feat/{i}"][image]), 0, -1) for i in range(4)]
            boxes = jnp.asarray(golden[f"multiscale/boxes/{image}"])
            there = slice(10 * image, 10 * image + 10)
            np.testing.assert_array_equal(
                assigned_levels(boxes, case["scales"], **canonical), golden[f"{name}/levels"][there]
            )
            y = pyramid_roi_align(maps, boxes, image_size=image_size, **options)
            np.testing.assert_allclose(y, np.moveaxis(golden[f"{name}/y"][there], 1, -1), atol=1e-5)


def test_of_a_pyramid_each_box_gets_its_level_and_that_the_gradient():
    shapes = [(16, 24), (8, 12), (4, 6)]
    maps = [jax.random.normal(jax.random.key(i), (*shape, 3)) for i, shape in enumerate(shapes)]
    side = jnp.array([5.0, 15, 16, 31, 33, 300])
    boxes = jnp.stack([side * 0, side * 0, side, side], axis=-1)
    levels = assigned_levels(boxes, (1 / 4, 1 / 8, 1 / 16), canonical_size=16, canonical_level=3)
    np.testing.assert_array_equal(levels, [0, 0, 1, 1, 2, 2])
    together = functools.partial(
        pyramid_roi_align, image_size=(64, 96), output_size=3, canonical_size=16, canonical_level=3
    )

    def one_by_one(maps, boxes):
        level = zip(levels.tolist(), boxes, strict=True)
        return jnp.concatenate([roi_align(maps[k], b[None], output_size=3, scale=2.0 ** -(k + 2)) for k, b in level])

    expected, slow = jax.vjp(lambda maps: one_by_one(maps, boxes), maps)
    found, fast = jax.vjp(lambda maps: together(maps, boxes), maps)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), fast(found)[0], slow(found)[0])


def test_levels_of_empty_inverted_and_unbounded_boxes_exist():
    boxes = jnp.array([[1.0, 1, 1, 1], [5, 5, 1, 9], [0, 0, jnp.inf, jnp.inf]])
    levels = assigned_levels(boxes, (1 / 4, 1 / 8), canonical_size=224, canonical_level=4)
    np.testing.assert_array_equal(levels, [0, 0, 1])


def test_a_linear_map_is_averaged_exactly():
    """Wherever boxes are, as long as they are inside."""
    y, x = jnp.meshgrid(jnp.arange(9.0), jnp.arange(11.0), indexing="ij")
    boxes = jnp.array([[4.0, 8, 36, 24], [2, 2, 30, 31]])
    found = roi_align(jnp.stack([y, x], axis=-1), boxes, output_size=2, scale=0.25, sampling_ratio=3)
    for box, features in zip(boxes / 4, found, strict=True):
        left, top, right, bottom = box
        np.testing.assert_allclose(features[:, 0, 0], top + (bottom - top) * jnp.array([0.25, 0.75]), rtol=1e-5)
        np.testing.assert_allclose(features[0, :, 1], left + (right - left) * jnp.array([0.25, 0.75]), rtol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 7, 37])
def test_any_number_of_boxes_gives_one_result_each(n):
    maps, boxes = map_and_boxes(0, 37)
    options = {"output_size": 3, "scale": 0.5}
    every = roi_align(maps, boxes, **options)
    np.testing.assert_allclose(roi_align(maps, boxes[:n], **options), every[:n], atol=1e-6)


def test_half_precision_stays_and_is_near():
    maps, boxes = map_and_boxes(0, 8)
    options = {"output_size": 3, "scale": 0.5}
    half = roi_align(maps.astype(jnp.bfloat16), boxes, **options)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), roi_align(maps, boxes, **options), atol=0.05)


def test_memory_of_the_gradient_does_not_grow_with_the_taps_of_all_boxes():
    """The taps of 512 boxes are 1.6 GB for maps of 256 channels; here there are fewer."""
    channels, n = 32, 512
    maps = [jnp.zeros((h, 2 * h, channels)) for h in (32, 16, 8, 4)]
    boxes = jnp.zeros((n, 4))

    def loss(maps, boxes):
        y = pyramid_roi_align(maps, boxes, image_size=(128, 256), output_size=7)
        return (y**2).sum()

    memory = jax.jit(jax.grad(loss)).lower(maps, boxes).compile().memory_analysis()
    taps, features = (4 * n * channels * positions for positions in (28 * 28, 7 * 7))
    assert memory.temp_size_in_bytes < min(taps / 3, 6 * features)
