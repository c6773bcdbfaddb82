import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import assert_same_rows, called, channels_last
from flax import nnx
from modules import assert_close

from ssm_jax.detection.boxes import iou
from ssm_jax.detection.matching import BELOW, match
from ssm_jax.detection.rpn import RPN

GOLDEN = ["mask_rcnn", "faster_rcnn_v2"]


@pytest.fixture(params=GOLDEN)
def golden(request):
    return request.getfixturevalue(request.param)


def outputs(detector, images):
    """Logits, deltas and anchors."""
    detector = nnx.view(detector, use_running_average=True, raise_if_not_found=False)
    pyramid = detector.fpn(detector.backbone(images))
    return *detector.rpn(pyramid), detector.rpn.anchors(pyramid, images.shape[1:3])


def test_outputs_of_all_anchors_are_torchvisions(golden):
    logits, deltas, anchors = called(outputs, golden.detector, golden.images)
    np.testing.assert_array_equal(jnp.concatenate(anchors), golden.arrays["anchors"])

    def flat(kind, size):
        maps = [channels_last(x) for x in golden.some(f"rpn/{kind}/").values()]
        return np.concatenate([x.reshape(2, -1, size) for x in maps], axis=1)

    assert_close(logits[..., None], flat("objectness", 1), 1e-4)
    assert_close(deltas, flat("deltas", 4), 1e-4)


def test_proposals_are_torchvisions_in_their_order(golden):
    def proposals(detector, images, sizes):
        logits, deltas, anchors = outputs(detector, images)
        one = functools.partial(detector.rpn.propose, training=False)
        return jax.vmap(one, in_axes=(0, 0, 0, None))(logits, deltas, sizes, anchors)

    boxes, there = called(proposals, golden.detector, golden.images, golden.sizes)
    assert there.all()
    for i in range(2):
        np.testing.assert_allclose(boxes[i], golden.arrays[f"rpn/proposals/{i}"], rtol=0, atol=1e-2)


def test_training_has_proposals_of_its_own(mask_rcnn):
    def proposals(detector, images, sizes):
        logits, deltas, anchors = outputs(detector, images)
        one = functools.partial(detector.rpn.propose, training=True)
        return jax.vmap(one, in_axes=(0, 0, 0, None))(logits, deltas, sizes, anchors)

    boxes, there = called(proposals, mask_rcnn.detector, mask_rcnn.images, mask_rcnn.sizes)
    for i in range(2):  # in any order: some scores differ by a millionth
        expected = mask_rcnn.arrays[f"train/rpn/proposals/{i}"]
        assert_same_rows(np.asarray(boxes[i][there[i]]), expected, atol=1e-2)


def test_anchors_have_torchvisions_labels(golden):
    rpn, anchors = golden.detector.rpn, jnp.asarray(golden.arrays["anchors"])
    for i in range(2):
        boxes, valid = golden.objects.boxes[i], golden.objects.valid[i]
        matched = np.asarray(match(anchors, boxes, valid, high=rpn.match_iou, low=rpn.ignore_iou, keep_best=True))
        labels = np.where(matched >= 0, 1, np.where(matched == BELOW, 0, -1))
        np.testing.assert_array_equal(labels, golden.arrays[f"train/rpn_labels/{i}"])


def small(**options):
    return RPN(4, anchor_sizes=((8,), (16,)), candidates=30, proposals=12, **options, rngs=nnx.Rngs(0))


def told(seed=0, size=(30, 40)):
    """Logits and deltas of maps of 8 x 10 and 4 x 5 positions, the size of an image, and the anchors."""
    rng = np.random.default_rng(seed)
    rpn = small()
    pyramid = (jnp.zeros((1, 8, 10, 4)), jnp.zeros((1, 4, 5, 4)))
    anchors = rpn.anchors(pyramid, (32, 40))
    n = sum(map(len, anchors))
    logits, deltas = (jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in [(n,), (n, 4)])
    return logits, deltas, jnp.asarray(size, jnp.int32), anchors


def test_proposals_are_within_the_image_and_do_not_overlap_much_on_their_map():
    rpn, inputs = small(nms_iou=0.4), told()
    boxes, there = rpn.propose(*inputs, training=False)
    assert boxes.shape == (12, 4)
    assert there.all()
    assert (boxes >= 0).all()
    assert (np.asarray(boxes[:, 2:]) <= [40, 30]).all()
    # Of a single map:
    logits, deltas, size, anchors = inputs
    n = len(anchors[0])
    boxes, there = rpn.propose(logits[:n], deltas[:n], size, anchors[:1], training=False)
    assert (np.triu(iou(boxes[there], boxes[there]), 1) <= 0.4).all()


def test_maps_do_not_suppress_each_others_proposals():
    logits, deltas, size, anchors = told()
    twice = anchors[0], anchors[0]
    n = len(anchors[0])
    logits, deltas = jnp.tile(logits[:n], 2), jnp.tile(deltas[:n], (2, 1))
    boxes, there = small().propose(logits, deltas, size, twice, training=False)
    assert there.all()
    np.testing.assert_array_equal(boxes[0::2], boxes[1::2])


def test_fewer_proposals_than_asked_for_are_marked():
    logits, deltas, _, anchors = told()
    flat = jnp.asarray([0, 0], jnp.int32)  # no box has an area within it
    _, there = small().propose(logits, deltas, flat, anchors, training=False)
    assert not there.any()
    n = len(anchors[1])
    boxes, there = small(nms_iou=0.01).propose(logits[-n:], deltas[-n:], told()[2], anchors[1:], training=False)
    assert boxes.shape == (12, 4)
    assert 0 < there.sum() < 12


def test_scores_below_the_threshold_are_not_proposed():
    logits, deltas, size, anchors = told()
    _, all_there = small().propose(logits, deltas, size, anchors, training=False)
    _, there = small(score_threshold=0.99).propose(logits, deltas, size, anchors, training=False)
    assert all_there.all()
    assert not there.any()


def test_proposals_have_no_gradient():
    logits, deltas, size, anchors = told()
    f = lambda logits, deltas: small().propose(logits, deltas, size, anchors, training=True)[0].sum()  # noqa: E731
    for gradient in jax.grad(f, argnums=(0, 1))(logits, deltas):
        assert not gradient.any()


def test_losses_are_of_as_many_samples_as_asked_for():
    rpn = small(samples=20, positive_share=0.2)
    logits, deltas, _, anchors = told()
    anchors = jnp.concatenate(anchors)
    boxes = anchors[jnp.asarray([11, 50, 130])] + 0.5
    sums_of = lambda x: rpn.loss_sums(jax.random.key(0), x, deltas, boxes, jnp.ones(3, bool), anchors)  # noqa: E731
    assert sums_of(logits)["count"] == 20
    gradient = jax.grad(lambda logits: sums_of(logits)["loss_objectness"])(logits)
    assert (gradient != 0).sum() == 20
    assert 1 <= (gradient < 0).sum() <= 4


def test_an_image_without_objects_has_negative_samples_alone():
    rpn = small(samples=20)
    logits, deltas, _, anchors = told()
    nothing = jnp.full((3, 4), jnp.nan), jnp.zeros(3, bool)
    loss = lambda *x: rpn.loss_sums(jax.random.key(0), *x, *nothing, jnp.concatenate(anchors))  # noqa: E731
    sums = loss(logits, deltas)
    assert sums["count"] == 20
    assert sums["loss_rpn_box_reg"] == 0
    gradient = jax.grad(lambda *x: sum(loss(*x).values()), argnums=(0, 1))(logits, deltas)
    assert (gradient[0] >= 0).all()
    assert not gradient[1].any()
