import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.detection.masks import axis_weights, mask_targets


def whole(masks):
    """Boxes of masks over a whole image."""
    return jnp.broadcast_to(jnp.array([0.0, 0, masks.shape[2], masks.shape[1]]), (masks.shape[0], 4))


def test_targets_are_torchvisions(shared):
    golden = np.load(shared / "golden/torchvision/unit_losses.npz")
    masks = jnp.asarray(golden["mask/gt_masks"])
    matched = jnp.asarray(golden["mask/matched_idxs"], jnp.int32)
    targets = mask_targets(masks, whole(masks), jnp.asarray(golden["mask/proposals"]), matched, size=14)
    np.testing.assert_allclose(targets, golden["mask/targets"], atol=1e-5)


def test_targets_of_training_are_torchvisions(shared):
    golden = np.load(shared / "golden/torchvision/maskrcnn.npz")
    images = np.load(shared / "golden/torchvision/images_targets.npz")
    for i in range(2):
        count, h, w = images[f"resized_target/{i}/masks_shape"]
        masks = jnp.asarray(np.unpackbits(images[f"resized_target/{i}/masks_bits"], axis=-1, count=w))
        assert masks.shape == (count, h, w)
        positive = golden[f"train/roi_labels/{i}"] > 0
        boxes, matched = (jnp.asarray(golden[f"train/roi_{k}/{i}"][positive]) for k in ("proposals", "matched_idxs"))
        targets = mask_targets(masks, whole(masks), boxes, matched.astype(jnp.int32), size=28)
        np.testing.assert_allclose(targets, golden[f"train/mask_targets/{i}"], atol=1e-4)


def test_weights_of_the_axes_make_torchvisions_adaptive_roi_align(shared):
    golden = np.load(shared / "golden/torchvision/unit_roi_align.npz")
    cases = json.loads(str(golden["meta"]))["cases"]
    cases = {name: case for name, case in cases.items() if case["sampling_ratio"] <= 0}
    assert len(cases) == 3
    for name, case in cases.items():
        x, rois = golden[f"{name}/x"], golden[f"{name}/rois"]
        rows, columns = np.broadcast_to(case["output_size"], 2).tolist()
        left, top, right, bottom = jnp.asarray(rois[:, 1:]).T * case["spatial_scale"] - 0.5 * case["aligned"]
        least = -np.inf if case["aligned"] else 1
        weights_y = axis_weights(top, jnp.maximum(bottom - top, least), x.shape[2], size=rows)
        weights_x = axis_weights(left, jnp.maximum(right - left, least), x.shape[3], size=columns)
        maps = jnp.asarray(x)[rois[:, 0].astype(int)]
        y, pull = jax.vjp(lambda m, wy=weights_y, wx=weights_x: jnp.einsum("nph,nchw,nqw->ncpq", wy, m, wx), maps)
        np.testing.assert_allclose(y, golden[f"{name}/y"], atol=1e-5)
        (gradient,) = pull(jnp.asarray(golden[f"{name}/w"]))
        for image in range(2):
            total = gradient[rois[:, 0] == image].sum(axis=0)
            np.testing.assert_allclose(total, golden[f"{name}/grad_x"][image], atol=1e-5)


def test_crops_give_what_whole_masks_do():
    """An ellipse, sampled as pixels of the image, and as a grid over it with a border of one empty cell."""
    box = np.array([20.0, 12.0, 76.0, 68.0])
    cells = 112

    def ellipse(y, x):
        return ((x - 48) / 28) ** 2 + ((y - 40) / 28) ** 2 <= 1

    y, x = np.mgrid[:100, :120] + 0.5
    image = jnp.asarray(ellipse(y, x)[None], jnp.uint8)
    cell = (box[2:] - box[:2]) / cells
    y, x = np.mgrid[: cells + 2, : cells + 2] - 0.5
    crop = jnp.asarray(ellipse(box[1] + y * cell[1], box[0] + x * cell[0])[None], jnp.uint8)
    around = jnp.asarray(np.concatenate([box[:2] - cell, box[2:] + cell])[None], jnp.float32)
    boxes = jnp.array([[20.0, 12, 76, 68], [30, 20, 60, 60], [5, 1, 90, 99], [50, 30, 119, 80], [0, 0, 15, 9]])
    matched = jnp.zeros(5, jnp.int32)
    expected = mask_targets(image, whole(image), boxes, matched, size=28)
    found = mask_targets(crop, around, boxes, matched, size=28)
    assert jnp.abs(found - expected).mean() < 0.01
    np.testing.assert_allclose(found[4], 0)
    # The border between inside and outside is the same up to half a pixel of the image.
    np.testing.assert_allclose(found.mean(axis=(1, 2)), expected.mean(axis=(1, 2)), atol=0.006)


def test_a_mask_full_of_ones_fills_its_box_and_nothing_else():
    masks = jnp.ones((1, 10, 10), jnp.uint8)
    targets = mask_targets(
        masks, jnp.array([[10.0, 20, 30, 40]]), jnp.array([[0.0, 10, 40, 50]]), jnp.zeros(1, jnp.int32), size=4
    )
    np.testing.assert_allclose(targets[0, 1:3, 1:3], 1)
    assert targets[0].sum() < 4 + 12 * 0.3


def test_each_box_takes_the_mask_of_its_object_and_any_where_there_is_none():
    masks = jnp.stack([jnp.zeros((8, 8), jnp.uint8), jnp.ones((8, 8), jnp.uint8)])
    masks, around = jnp.concatenate([masks, masks[1:]]), jnp.concatenate([whole(masks), jnp.zeros((1, 4))])
    boxes = jnp.tile(jnp.array([[1.0, 1, 6, 6]]), (5, 1))
    targets = mask_targets(masks, around, boxes, jnp.array([1, 0, 1, -1, 2]), size=3)
    np.testing.assert_allclose(targets.mean(axis=(1, 2))[:3], [1, 0, 1], rtol=1e-6)
    assert jnp.isfinite(targets).all()


@pytest.mark.parametrize("extent", [1.0, 7.0, 13.0, 28.0])
def test_weights_of_a_part_inside_sum_to_one(extent):
    weights = axis_weights(jnp.array([0.5]), jnp.array([extent]), 30, size=7)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    middle = (weights * jnp.arange(30.0)[None, None]).sum(axis=-1)
    np.testing.assert_allclose(middle[0], 0.5 + extent * (np.arange(7) + 0.5) / 7, rtol=1e-4)
