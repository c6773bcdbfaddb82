import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import assert_same_rows, batch, called, detect, loss_of, losses, modes, small
from flax import nnx
from modules import assert_close, drawn

from ssm_jax import compiled
from ssm_jax.detection.faster_rcnn import BoxBranch, ConvsLinear, TwoLinear
from ssm_jax.detection.structures import Detections
from ssm_jax.layers.norm import BatchNorm
from ssm_jax.pretrained.save import torch_state
from ssm_jax.training.sharding import batch_sharding, make_mesh, replicated


def test_features_and_outputs_of_proposals_are_torchvisions(faster_rcnn_v2):
    golden = faster_rcnn_v2
    boxes = jnp.stack([jnp.asarray(golden.arrays[f"rpn/proposals/{i}"]) for i in range(2)])

    def outputs(detector, images, boxes):
        pyramid = detector.fpn(detector.backbone(images))
        features = detector._aligned(pyramid, boxes, images.shape[1:3], detector.box.size)
        return features, *detector.box(features, jnp.ones(boxes.shape[:2], bool))

    features, logits, deltas = called(outputs, modes(golden.detector)[1], golden.images, boxes)
    pooled = np.moveaxis(golden.arrays["roi/box_pool"], 1, -1)
    assert_close(features.reshape(pooled.shape), pooled, 1e-4)
    assert_close(logits.reshape(-1, 8), golden.arrays["roi/class_logits"], 1e-4)
    assert_close(deltas.reshape(-1, 32), golden.arrays["roi/box_regression"], 1e-4)


def test_detections_are_torchvisions_in_their_order(faster_rcnn_v2):
    faster_rcnn_v2.assert_detections()


@pytest.mark.parametrize("name", ["faster_rcnn_v2", "mask_rcnn"])
def test_samples_are_torchvisions(request, name):
    golden = request.getfixturevalue(name)
    for i in range(2):
        proposals = jnp.asarray(golden.arrays[f"train/rpn/proposals/{i}"])
        there, objects = jnp.ones(len(proposals), bool), (x[i] for x in golden.objects[:3])
        samples = jax.jit(golden.detector.box.sample)(jax.random.key(0), proposals, there, *objects)
        kind = {"roi_proposals": samples.boxes, "roi_matched_idxs": samples.matched, "roi_labels": samples.labels}
        rows = {name: np.asarray(x[samples.chosen], np.float32) for name, x in kind.items()}
        expected = {name: golden.arrays[f"train/{name}/{i}"] for name in rows}
        # Background's matches, and targets of thin boxes, are of no account.
        rows["roi_matched_idxs"] = np.where(rows["roi_labels"] > 0, rows["roi_matched_idxs"], 0)
        expected["roi_matched_idxs"] = np.where(expected["roi_labels"] > 0, expected["roi_matched_idxs"], 0)
        columns = lambda told: np.concatenate([x.reshape(len(x), -1) for x in told.values()], axis=1)  # noqa: E731
        assert_same_rows(columns(rows), columns(expected), atol=1e-2)
        targets = golden.arrays[f"train/roi_regression_targets/{i}"][expected["roi_labels"] > 0]
        assert_same_rows(np.asarray(samples.targets[samples.positive]), targets, atol=1e-2)


def test_losses_are_torchvisions(faster_rcnn_v2):
    faster_rcnn_v2.assert_losses()


def test_gradients_are_torchvisions(faster_rcnn_v2):
    faster_rcnn_v2.assert_gradients(absolute=1e-3 * faster_rcnn_v2.meta["grad_total_norm"])


def test_running_statistics_after_are_torchvisions_also_those_of_padded_samples(faster_rcnn_v2):
    golden = faster_rcnn_v2
    state = nnx.to_flat_state(golden.training[2])
    ours = torch_state(golden.detector, {path: variable[...] for path, variable in state})
    expected = golden.some("buffer_after/")
    assert {name for name in ours if name.startswith("roi_heads")}
    for name in ours:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("make", [TwoLinear, functools.partial(ConvsLinear, widths=(3, 3), norm=BatchNorm)])
def test_padding_among_samples_makes_no_difference(make):
    head = drawn(lambda: make(4, 3, features=5, rngs=nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 3, 4)).astype(np.float32))
    some = jnp.asarray([True, True, False, True, False, False])
    np.testing.assert_allclose(head(x, some)[some], head(x[some], some[:3] | True), rtol=1e-4, atol=1e-4)


def box_branch(**options):
    return drawn(lambda: BoxBranch(4, 3, head=functools.partial(TwoLinear, features=5), **options, rngs=nnx.Rngs(0)))


def test_detections_are_of_every_class_that_is_likely_enough():
    branch = box_branch(score_threshold=0.2, detections=4)
    logits = jnp.log(jnp.asarray([[0.1, 0.3, 0.6, 1e-9], [0.55, 0.1, 0.1, 0.25], [1e-9, 0.1, 0.1, 0.8]]))
    boxes = jnp.asarray([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 60, 60]])
    there = jnp.asarray([True, True, False])
    size = jnp.asarray([100, 100], jnp.int32)
    found = branch.detect(logits, jnp.zeros((3, 4, 4)), boxes, there, size)
    assert isinstance(found, Detections)
    np.testing.assert_array_equal(found.valid, [True, True, True, False])
    np.testing.assert_array_equal(found.classes[:3], [1, 0, 2])
    np.testing.assert_allclose(found.scores, [0.6, 0.3, 0.25, 0], rtol=1e-5)
    np.testing.assert_allclose(found.boxes[:3], boxes[jnp.asarray([0, 0, 1])], atol=1e-4)


def test_objects_are_among_the_proposals_and_found_in_training():
    branch = box_branch(samples=8, positive_share=0.5)
    boxes, classes = jnp.asarray([[0.0, 0, 10, 10], [20, 20, 40, 40], [1, 1, 2, 2]]), jnp.asarray([2, 0, 1])
    proposals = jnp.asarray([[21.0, 20, 40, 40], [60, 60, 70, 70], [0, 0, 10, 9]])
    there, valid = jnp.asarray([True, True, False]), jnp.asarray([True, True, False])
    samples = branch.sample(jax.random.key(0), proposals, there, boxes, classes, valid)
    positive = samples.positive
    np.testing.assert_array_equal(positive, jnp.arange(8) < 3)  # they come first
    assert sorted(np.asarray(samples.labels[positive]).tolist()) == [1, 1, 3]
    assert samples.chosen.sum() == 4
    np.testing.assert_array_equal(samples.targets[~positive], 0)


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
def test_a_batch_without_objects_has_losses_of_the_background_alone(name):
    images, sizes, objects = batch(masks=name == "mask_rcnn")
    none = objects._replace(valid=jnp.zeros_like(objects.valid), boxes=jnp.full_like(objects.boxes, jnp.nan))
    values, gradients, _ = losses(small(name), images, sizes, none)
    zero = {"loss_box_reg", "loss_rpn_box_reg", "loss_mask"} & values.keys()
    assert {name for name, value in values.items() if value == 0} == zero
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((values, gradients)))


@pytest.mark.slow
def test_in_bfloat16_boxes_and_losses_are_float32():
    images, sizes, objects = batch(1, side=32)
    detector = small("faster_rcnn", dtype=jnp.bfloat16)
    values, gradients, _ = losses(detector, images, sizes, objects)
    assert {value.dtype for value in values.values()} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((values, gradients)))
    found = detect(detector, images, sizes)
    assert found.boxes.dtype == found.scores.dtype == jnp.float32


def divided(f, mesh, whole, rows):
    """`f(whole, rows)` compiled for rows that the devices of a mesh share, and run; and what they exchange."""
    shardings = replicated(mesh), batch_sharding(mesh)
    whole, rows = (
        jax.device_put(jax.tree.map(np.asarray, x), s) for x, s in zip((whole, rows), shardings, strict=True)
    )
    with jax.set_mesh(mesh):
        program = jax.jit(f, in_shardings=shardings).lower(whole, rows).compile()
        return program(whole, rows), compiled.collectives(program.as_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])
def test_losses_and_gradients_of_eight_devices_are_those_of_one_and_only_sums_are_exchanged(name):
    loss, params = loss_of(small(name))
    images, sizes, objects = batch(8, side=32, masks=name == "mask_rcnn")
    f = lambda params, rows: loss(params, *rows, jax.random.key(0))  # noqa: E731
    (expected, _), expected_gradients = jax.jit(f)(params, (images, sizes, objects))
    ((value, _), gradients), exchanged = divided(f, make_mesh({"data": 8}), params, (images, sizes, objects))
    assert {collective.kind for collective in exchanged} == {"all-reduce"}
    summed = sum(collective.count * collective.bytes for collective in exchanged)
    of_losses = 200
    assert summed < 4 * sum(leaf.size for leaf in jax.tree.leaves(params)) + of_losses
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert_close(np.asarray(ours), np.asarray(theirs), 1e-4)


def test_detections_of_eight_devices_are_found_where_the_images_are():
    graphdef, state = nnx.split(modes(small("mask_rcnn"))[1])
    images, sizes, _ = batch(8, side=32)
    f = lambda state, rows: nnx.merge(graphdef, state, copy=True)(*rows)  # noqa: E731
    expected = jax.jit(f)(state, (images, sizes))
    found, exchanged = divided(f, make_mesh({"data": 8}), state, (images, sizes))
    assert not exchanged
    np.testing.assert_array_equal(found.classes, expected.classes)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=1e-3)
