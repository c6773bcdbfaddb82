import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import batch, called, detect, losses, modes, small
from flax import nnx
from modules import assert_close, drawn

from ssm_jax.detection import create_detector
from ssm_jax.detection.matching import match
from ssm_jax.detection.retinanet import Head, giou


def test_outputs_of_all_anchors_are_torchvisions(retinanet):
    logits, deltas, anchors = called(lambda detector, x: detector.outputs(x), retinanet.detector, retinanet.images)
    np.testing.assert_array_equal(jnp.concatenate(anchors), retinanet.arrays["anchors"])
    assert_close(logits, retinanet.arrays["head/cls_logits"], 1e-4)
    assert_close(deltas, retinanet.arrays["head/bbox_regression"], 1e-4)


def test_detections_are_torchvisions_in_their_order(retinanet):
    retinanet.assert_detections()


def test_anchors_find_torchvisions_objects(retinanet):
    detector, anchors = retinanet.detector, jnp.asarray(retinanet.arrays["anchors"])
    thresholds = {"high": detector.match_iou, "low": detector.ignore_iou, "keep_best": True}
    for i in range(2):
        boxes, valid = retinanet.objects.boxes[i], retinanet.objects.valid[i]
        matched = match(anchors, boxes, valid, **thresholds)
        np.testing.assert_array_equal(matched, retinanet.arrays[f"train/matched_idxs/{i}"])


def test_losses_are_torchvisions(retinanet):
    retinanet.assert_losses()


def test_gradients_are_torchvisions(retinanet):
    retinanet.assert_gradients()


def test_batch_norms_of_the_network_stay_as_they_are_in_training(retinanet):
    before, after = nnx.state(retinanet.detector, nnx.BatchStat), retinanet.training[2]
    for path, variable in nnx.to_flat_state(before):
        np.testing.assert_array_equal(variable[...], dict(nnx.to_flat_state(after))[path][...])


def every_pair(detector, logits, deltas, size, anchors):
    """What `_detect` finds, from all pairs of anchor and class, one after another."""
    found = []
    first = 0
    for level in anchors:
        scores = 1 / (1 + np.exp(-np.asarray(logits[first : first + len(level)], np.float64)))
        order = np.argsort(-scores.ravel(), kind="stable")[: detector.candidates]
        for pair in order:
            anchor, label = divmod(int(pair), scores.shape[1])
            if scores[anchor, label] > detector.score_threshold:
                found.append((scores[anchor, label], label, first + anchor))
        first += len(level)
    anchors = np.concatenate(anchors)
    left, top, right, bottom = anchors.T
    w, h = right - left, bottom - top
    x = left + w / 2 + deltas[:, 0] * w
    y = top + h / 2 + deltas[:, 1] * h
    w, h = w * np.exp(deltas[:, 2]), h * np.exp(deltas[:, 3])
    corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).clip(0, [*size[::-1]] * 2)
    kept = []
    for score, label, anchor in sorted(found, key=lambda row: -row[0]):
        box = corners[anchor]

        def overlap(other, box=box):
            sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
            both = np.prod(np.maximum(sides, 0))
            return both / (np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - both)

        if not any(label == other[1] and overlap(other[2]) > detector.nms_iou for other in kept):
            kept.append((score, label, box))
    return kept[: detector.detections]


@pytest.mark.parametrize("candidates", [7, 40])
def test_the_best_of_the_best_anchors_are_the_best_of_all(candidates):
    detector = small("retinanet", candidates=candidates, score_threshold=0.3)
    rng = np.random.default_rng(0)
    shapes = [(6, 8), (3, 4), (1, 2)]
    corners = [rng.uniform(0, 20, (h * w * 2, 2)).astype(np.float32) for h, w in shapes]
    anchors = [np.concatenate([a, a + rng.uniform(8, 20, a.shape).astype(np.float32)], axis=-1) for a in corners]
    n = sum(map(len, anchors))
    logits = rng.normal(size=(n, 3)).astype(np.float32)
    deltas = rng.normal(scale=0.3, size=(n, 4)).astype(np.float32)
    size = np.float32([30, 40])
    found = called(lambda detector, *told: detector._detect(*told), detector, logits, deltas, size, tuple(anchors))
    expected = every_pair(detector, logits, deltas, size, anchors)
    count = int(found.valid.sum())
    assert count == len(expected) > 5
    np.testing.assert_array_equal(found.classes[:count], [label for _, label, _ in expected])
    np.testing.assert_allclose(found.scores[:count], [score for score, _, _ in expected], rtol=1e-5)
    np.testing.assert_allclose(found.boxes[:count], [box for *_, box in expected], rtol=0, atol=1e-3)


def test_an_image_without_objects_is_background():
    images, sizes, objects = batch()
    detector = small("retinanet")
    empty = objects._replace(valid=jnp.zeros_like(objects.valid), boxes=jnp.full_like(objects.boxes, jnp.nan))
    values, grads, _ = losses(detector, images, sizes, empty)
    logits = called(lambda detector, x: detector.outputs(x)[0], modes(detector)[0], images)
    probability = jax.nn.sigmoid(logits)
    focal = (0.75 * probability**2 * jax.nn.softplus(logits)).sum((1, 2)).mean()
    assert float(values["classification"]) == pytest.approx(float(focal), rel=1e-5)
    assert values["bbox_regression"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def losses_of_outputs(boxes, classes, valid, **choice):
    """Of random outputs for one image and its objects, and the gradients."""
    rng = np.random.default_rng(0)
    logits, deltas = (jnp.asarray(rng.normal(size=(200, k)).astype(np.float32)) for k in (3, 4))
    anchors = rng.uniform(0, 50, (200, 2)).astype(np.float32)
    anchors = jnp.asarray(np.concatenate([anchors, anchors + 20], axis=1))
    detector = small("retinanet", **choice)

    @jax.jit
    def total(logits, deltas):
        losses = detector._losses(logits, deltas, boxes, classes, valid, anchors)
        return sum(losses.values()), losses

    (_, losses), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(logits, deltas)
    return losses, grads


def test_what_pads_objects_makes_no_difference():
    boxes, classes, valid = (x[0] for x in batch(1, seed=1)[2][:3])
    assert not valid.all()
    nonsense = jnp.where(valid[:, None], boxes, jnp.nan)
    twice = jnp.concatenate([nonsense, -boxes]), jnp.tile(classes, 2), jnp.concatenate([valid, jnp.zeros_like(valid)])
    expected = losses_of_outputs(boxes, classes, valid)
    jax.tree.map(np.testing.assert_array_equal, losses_of_outputs(*twice), expected)


def test_the_loss_of_boxes_is_an_argument():
    objects = [x[0] for x in batch(1)[2][:3]]
    (plain, _), (other, _) = (losses_of_outputs(*objects, **choice) for choice in ({}, {"box_loss": giou}))
    assert plain["classification"] == other["classification"]
    assert plain["bbox_regression"] != other["bbox_regression"]
    assert 0 < other["bbox_regression"] < 2


@pytest.mark.slow
def test_in_bfloat16_boxes_and_losses_are_float32():
    images, sizes, objects = batch(1, side=32)
    detector = small("retinanet", dtype=jnp.bfloat16)
    values, grads, _ = losses(detector, images, sizes, objects)
    exact, _, _ = losses(small("retinanet"), images, sizes, objects)
    for name, value in values.items():
        assert value.dtype == jnp.float32
        assert float(value) == pytest.approx(float(exact[name]), rel=0.1)
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert detect(detector, images, sizes).boxes.dtype == jnp.float32


def test_every_class_is_as_unlikely_at_the_start():
    build = functools.partial(create_detector, "retinanet", backbone="resnet18", num_classes=2)
    detector = jax.jit(lambda: nnx.state(build(rngs=nnx.Rngs(0)).classifier.output))()
    np.testing.assert_allclose(jax.nn.sigmoid(detector["bias"][...]), 0.01, rtol=1e-5)


def test_a_head_sees_every_map_alike():
    head = drawn(lambda: Head(4, 3, 2, depth=1, rngs=nnx.Rngs(0)))
    x, y = (jnp.asarray(np.random.default_rng(0).normal(size=(1, side, side, 4)), jnp.float32) for side in (4, 2))
    both, first, second = (head(maps) for maps in ((x, y), (x,), (y,)))
    np.testing.assert_allclose(both, jnp.concatenate([first, second], axis=1), rtol=1e-5)
