import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_jax.detection.anchors import pyramid_anchors
from ssm_jax.detection.boxes import iou
from ssm_jax.detection.matching import match, sample


def matched(quality, valid, high, low, keep_best):
    """`match` by its definition, in loops over a matrix of IoUs (objects, boxes)."""
    n_objects, n_boxes = quality.shape
    objects = [j for j in range(n_objects) if valid[j]]
    result = []
    for i in range(n_boxes):
        if not objects:
            result.append(-1)
            continue
        nearest = max(objects, key=lambda j: (quality[j, i], -j))
        best = quality[nearest, i]
        index = nearest if best >= high else -1 if best < low else -2
        if keep_best and any(quality[j, i] == quality[j].max() for j in objects):
            index = nearest
        result.append(index)
    return np.array(result)


def integer_boxes(rng, n, side):
    """With many equal IoUs."""
    corner, size = rng.integers(0, side, (n, 2)), rng.integers(1, side, (n, 2))
    return jnp.asarray(np.concatenate([corner, corner + size], axis=-1), jnp.float32)


@pytest.mark.parametrize("keep_best", [False, True])
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_match_does_what_it_says(keep_best, seed):
    rng = np.random.default_rng(seed)
    boxes, objects = integer_boxes(rng, 40, 8), integer_boxes(rng, 5, 8)
    valid = rng.random(5) < 0.7
    expected = matched(np.asarray(iou(objects, boxes)), valid, 0.5, 0.25, keep_best)
    found = match(boxes, objects, jnp.asarray(valid), high=0.5, low=0.25, keep_best=keep_best)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_thresholds_themselves_are_above():
    boxes = jnp.array([[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 1], [0, 0, 4, 0.5]])
    objects = boxes[:1]
    found = match(boxes, objects, jnp.array([True]), high=0.5, low=0.25, keep_best=False)
    np.testing.assert_array_equal(found, [0, 0, -2, -1])


def test_keep_best_keeps_all_boxes_that_tie_and_only_those():
    boxes = jnp.array([[0.0, 0, 4, 1], [0, 1, 4, 2], [0, 0, 4, 0.9], [9, 9, 10, 10]])
    found = match(boxes, jnp.array([[0.0, 0, 4, 8]]), jnp.array([True]), high=0.7, low=0.3, keep_best=True)
    np.testing.assert_array_equal(found, [0, 0, -1, -1])


def test_a_kept_box_goes_to_its_own_nearest_object_as_in_torchvision():
    """The second object is best covered by a box that covers the first one better."""
    objects = jnp.array([[0.0, 0, 10, 10], [0, 0, 2, 2]])
    found = match(jnp.array([[0.0, 0, 10, 6]]), objects, jnp.array([True, True]), high=0.9, low=0.3, keep_best=True)
    np.testing.assert_array_equal(found, [0])


@pytest.mark.parametrize("keep_best", [False, True])
def test_without_objects_all_boxes_are_below(keep_best):
    boxes = integer_boxes(np.random.default_rng(0), 20, 8)
    for objects in (boxes[:3], jnp.full((3, 4), jnp.nan), jnp.zeros((3, 4))):
        found = match(boxes, objects, jnp.zeros(3, bool), high=0.5, low=0.4, keep_best=keep_best)
        np.testing.assert_array_equal(found, [-1] * 20)


@pytest.mark.parametrize("keep_best", [False, True])
def test_what_is_not_an_object_changes_nothing(keep_best):
    rng = np.random.default_rng(0)
    boxes, objects = integer_boxes(rng, 40, 8), integer_boxes(rng, 3, 8)
    expected = match(boxes, objects, jnp.ones(3, bool), high=0.5, low=0.4, keep_best=keep_best)
    padded = jnp.concatenate([objects, boxes[:2], jnp.full((1, 4), jnp.nan)])
    found = match(boxes, padded, jnp.arange(6) < 3, high=0.5, low=0.4, keep_best=keep_best)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("network", ["retinanet", "maskrcnn", "fasterrcnn_v2"])
def test_anchors_of_torchvisions_detectors_match_as_there(shared, network):
    golden = np.load(shared / f"golden/torchvision/{network}.npz")
    images = np.load(shared / "golden/torchvision/images_targets.npz")
    arguments = json.loads(str(golden["meta"]))["kwargs"]
    kind = "" if network == "retinanet" else "rpn_"
    high, low = (arguments[f"{kind}{name}_iou_thresh"] for name in ("fg", "bg"))
    for image in range(2):
        objects = jnp.asarray(images[f"resized_target/{image}/boxes"])
        padded, valid = jnp.concatenate([objects, objects[:1]]), jnp.arange(len(objects) + 1) < len(objects)
        anchors = jnp.asarray(golden["anchors"])
        found = jax.jit(functools.partial(match, high=high, low=low, keep_best=True))(anchors, padded, valid)
        assert (found >= 0).any()
        if network == "retinanet":
            np.testing.assert_array_equal(found, golden[f"train/matched_idxs/{image}"])
        else:  # 1 is an object, 0 none, -1 neither
            labels = np.select([found >= 0, found == -1], [1, 0], -1)
            np.testing.assert_array_equal(labels, golden[f"train/rpn_labels/{image}"])


def test_memory_is_one_matrix_of_ious():
    shapes = [(25, 42), (13, 21)]
    boxes = jnp.concatenate(pyramid_anchors([[32], [64]], (0.5, 1, 2), shapes, (200, 336)))
    arguments = boxes, jnp.zeros((100, 4)), jnp.ones(100, bool)
    compiled = jax.jit(lambda *a: match(*a, high=0.7, low=0.3, keep_best=True)).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * len(boxes) * 100


def test_high_below_low_is_an_error():
    with pytest.raises(ValueError, match=r"high must be at least low = 0\.5, got 0\.4"):
        match(jnp.zeros((1, 4)), jnp.zeros((1, 4)), jnp.ones(1, bool), high=0.4, low=0.5, keep_best=False)


@pytest.mark.parametrize(
    ("n_positive", "n_negative", "expected"),
    [
        (20, 60, (8, 24)),  # enough of both
        (3, 60, (3, 29)),  # negatives take the place of positives that are missing
        (20, 10, (8, 10)),  # but not the other way around
        (0, 60, (0, 32)),
        (0, 0, (0, 0)),
        (2, 3, (2, 3)),
    ],
)
def test_sample_is_balanced_distinct_and_positives_come_first(n_positive, n_negative, expected):
    rng = np.random.default_rng(0)
    labels = np.array([-1] * 20 + [1, 7] * (n_positive // 2) + [1] * (n_positive % 2) + [0] * n_negative)
    rng.shuffle(labels)
    indices, chosen = sample(jax.random.key(0), jnp.asarray(labels), 32, 0.25)
    assert indices.shape == chosen.shape == (32,)
    taken = np.asarray(indices)[np.asarray(chosen)]
    assert len(set(taken)) == len(taken) == sum(expected)
    assert (labels[taken[: expected[0]]] >= 1).all()
    assert (labels[taken[expected[0] :]] == 0).all()
    assert chosen[: sum(expected)].all()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_sample_takes_fewer_labels_than_it_could(share):
    indices, chosen = sample(jax.random.key(0), jnp.array([1, 0, -1, 1, 0]), 8, share)
    labels = np.array([1, 0, -1, 1, 0])[np.asarray(indices)[np.asarray(chosen)]]
    np.testing.assert_array_equal(labels, [1, 1, 0, 0] if share else [0, 0])
    assert ((indices >= 0) & (indices < 5)).all()


def test_every_candidate_is_as_likely_as_the_others():
    labels = jnp.array([0, 1, -1, 1, 0, 1, 0, 1, 0, 0, 0, 0] * 2)
    draws = 4000
    keys = jax.random.split(jax.random.key(0), draws)
    indices, chosen = jax.jit(jax.vmap(lambda key: sample(key, labels, 8, 0.5)))(keys)
    counts = np.bincount(np.asarray(indices)[np.asarray(chosen)], minlength=24) / draws
    expected = np.where(labels == 1, 4 / 8, np.where(labels == 0, 4 / 14, 0))
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts - expected) <= 4 * deviation).all()


def test_positives_and_negatives_are_drawn_independently():
    """Whether a positive is drawn says nothing about whether some negative is."""
    labels = jnp.array([1] * 4 + [0] * 4)
    draws = 4000
    keys = jax.random.split(jax.random.key(1), draws)
    indices, _ = jax.jit(jax.vmap(lambda key: sample(key, labels, 4, 0.5)))(keys)
    taken = (np.asarray(indices)[:, :, None] == np.arange(8)).any(axis=1)
    correlation = np.corrcoef(taken[:, :4].T, taken[:, 4:].T)[:4, 4:]
    assert np.abs(correlation).max() < 4 / np.sqrt(draws)
