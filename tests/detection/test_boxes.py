import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.detection import boxes


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden/torchvision/unit_boxes.npz")


def random_boxes(n, seed, *, side=100.0):
    corners = np.random.default_rng(seed).uniform(0, side, (n, 2, 2)).astype(np.float32)
    return jnp.asarray(np.sort(corners, axis=1).reshape(n, 4))


def test_area_and_iou_of_all_pairs_are_torchvisions_with_nan_for_two_empty_boxes(golden):
    a, b = golden["pair/a"], golden["pair/b"]
    np.testing.assert_array_equal(boxes.area(jnp.asarray(a)), golden["area"])
    expected = golden["pair/iou"]
    assert np.isnan(expected).sum() == 2
    np.testing.assert_allclose(boxes.iou(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-6)


def test_giou_is_torchvisions_wherever_that_is_a_number_and_always_a_number(golden):
    a, b, expected = golden["pair/a"], golden["pair/b"], golden["pair/giou"]
    rows, columns = np.indices(expected.shape)
    giou = np.asarray(boxes.giou(jnp.asarray(a[rows]), jnp.asarray(b[columns])))
    there = np.isfinite(expected)
    np.testing.assert_allclose(giou[there], expected[there], rtol=1e-5, atol=1e-6)
    assert np.isfinite(giou).all()


def test_iou_counts_pixels():
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 12, (2, 20, 2, 2)), axis=2)
    corners[:, :, 1] += 1
    y, x = np.mgrid[:13, :13]

    def covered(box):
        (left, top), (right, bottom) = box
        return (x >= left) & (x < right) & (y >= top) & (y < bottom)

    a, b = ([covered(box) for box in side] for side in corners)
    expected = [[(one & other).sum() / (one | other).sum() for other in b] for one in a]
    a, b = jnp.asarray(corners.reshape(2, 20, 4), jnp.float32)
    np.testing.assert_allclose(boxes.iou(a, b), expected, rtol=1e-6)


def test_iou_of_batches_is_that_of_each():
    a, b = random_boxes(12, 0).reshape(2, 6, 4), random_boxes(10, 1).reshape(2, 5, 4)
    np.testing.assert_array_equal(boxes.iou(a, b), jax.vmap(boxes.iou)(a, b))


def test_encode_and_decode_are_torchvisions(golden):
    a, b = jnp.asarray(golden["a"]), jnp.asarray(golden["b"])
    for name, case in json.loads(str(golden["meta"]))["cases"].items():
        weights = tuple(case["weights"])
        np.testing.assert_allclose(boxes.encode(b, a, weights), golden[f"encode/{name}"], rtol=1e-5, atol=1e-5)
        codes = jnp.asarray(golden[f"decode/{name}/codes"])
        np.testing.assert_allclose(
            boxes.decode(codes, a, weights), golden[f"decode/{name}/boxes"], rtol=1e-5, atol=1e-3
        )
        codes = jnp.asarray(golden[f"decode_multi/{name}/codes"]).reshape(30, 5, 4)
        decoded = boxes.decode(codes, a[:, None], weights)
        np.testing.assert_allclose(decoded, golden[f"decode_multi/{name}/boxes"], rtol=1e-5, atol=1e-3)
        assert case["bbox_xform_clip"] == boxes.LARGEST_SCALE


def test_decode_inverts_encode():
    a, b = random_boxes(50, 0), random_boxes(50, 1)
    a, b = (jnp.concatenate([box[:, :2], box[:, 2:] + 8], axis=-1) for box in (a, b))
    weights = (10.0, 10.0, 5.0, 5.0)
    np.testing.assert_allclose(boxes.decode(boxes.encode(b, a, weights), a, weights), b, atol=1e-3)


def test_decode_lets_a_box_grow_to_1000_pixels_from_16_at_most():
    anchor = jnp.array([[0.0, 0, 16, 16]])
    for weight in (1.0, 5.0):
        box = boxes.decode(jnp.array([[0.0, 0, 100, 100]]), anchor, (1.0, 1.0, weight, weight))
        np.testing.assert_allclose(box, [[-492, -492, 508, 508]], rtol=1e-5)


def test_clip_is_torchvisions_for_float_and_whole_sizes(golden):
    for dtype in (jnp.float32, jnp.int32):
        clipped = boxes.clip(jnp.asarray(golden["clip/in"]), jnp.array([90, 120], dtype))
        np.testing.assert_array_equal(clipped, golden["clip/out"])
