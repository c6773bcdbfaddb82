import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import batch, called, channels_last, detect, losses, modes, small
from flax import nnx
from modules import assert_close, drawn

from ssm_jax.detection.mask_rcnn import Doubled, MaskBranch
from ssm_jax.detection.masks import mask_targets
from ssm_jax.layers.norm import BatchNorm


def test_detections_are_torchvisions_in_their_order_and_so_are_their_masks(mask_rcnn):
    mask_rcnn.assert_detections()
    for i in range(2):
        expected = mask_rcnn.arrays[f"det_resized/{i}/masks"][:, 0]
        np.testing.assert_allclose(mask_rcnn.detections.masks[i], expected, rtol=0, atol=1e-4)


def test_features_of_boxes_are_torchvisions(mask_rcnn):
    boxes = jnp.stack([jnp.asarray(mask_rcnn.arrays[f"det_resized/{i}/boxes"]) for i in range(2)])

    def features(detector, images, boxes):
        pyramid = detector.fpn(detector.backbone(images))
        aligned = detector._aligned(pyramid, boxes, images.shape[1:3], detector.mask.size)
        x = aligned.reshape(-1, *aligned.shape[2:])
        for conv in detector.mask.convs:
            x = nnx.relu(conv(x))
        return aligned, x

    aligned, x = called(features, modes(mask_rcnn.detector)[1], mask_rcnn.images, boxes)
    pooled = channels_last(mask_rcnn.arrays["roi/mask_pool"])
    assert_close(aligned.reshape(pooled.shape), pooled, 1e-4)
    assert_close(x, channels_last(mask_rcnn.arrays["roi/mask_head"]), 1e-4)


def test_masks_of_positive_samples_are_torchvisions(mask_rcnn):
    objects = mask_rcnn.objects
    for i in range(2):
        labels = mask_rcnn.arrays[f"train/roi_labels/{i}"] > 0
        boxes, matched = (
            mask_rcnn.arrays[f"train/{name}/{i}"][labels] for name in ("roi_proposals", "roi_matched_idxs")
        )
        matched = jnp.asarray(matched, jnp.int32)
        masks = mask_targets(objects.masks[i], objects.mask_boxes[i], jnp.asarray(boxes), matched, size=28)
        np.testing.assert_allclose(masks, mask_rcnn.arrays[f"train/mask_targets/{i}"], rtol=0, atol=1e-4)


def test_losses_are_torchvisions(mask_rcnn):
    mask_rcnn.assert_losses()


def test_gradients_are_torchvisions(mask_rcnn):
    mask_rcnn.assert_gradients()


def test_the_transposed_convolution_is_pytorchs(shared):
    with np.load(shared / "golden/torchvision/unit_misc.npz") as file:
        x, weight, bias, y = (file[name] for name in ("interp/x", *(f"deconv/0/{k}" for k in ("weight", "bias", "y"))))
    layer = nnx.eval_shape(lambda: Doubled(2, 3, dtype=None, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    layer.kernel.set_value(jnp.asarray(np.moveaxis(weight, (0, 1), (-2, -1))))
    layer.bias.set_value(jnp.asarray(bias))
    assert_close(layer(jnp.asarray(channels_last(x))), channels_last(y), 1e-5)


def branch(**options):
    return drawn(lambda: MaskBranch(4, 3, size=5, widths=(6,), width=6, **options, rngs=nnx.Rngs(0)))


def test_the_mask_is_that_of_the_class():
    masks = branch()
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(2, 4, 5, 5, 4)).astype(np.float32))
    classes = jnp.asarray(rng.integers(0, 3, (2, 4)))
    there = jnp.ones((2, 4), bool)
    x = nnx.relu(masks.doubled(nnx.relu(masks.convs[0](features.reshape(8, 5, 5, 4)))))
    of_all = masks.output(x).reshape(2, 4, 10, 10, 4)  # the first of the four is the background's
    expected = jnp.take_along_axis(of_all, classes[..., None, None, None] + 1, axis=-1)[..., 0]
    assert_close(masks.logits(features, classes, there), expected, 1e-5)
    assert_close(masks.probabilities(features, classes, there), jax.nn.sigmoid(expected), 1e-5)


def test_statistics_are_those_of_samples_with_an_object():
    masks = branch(norm=BatchNorm)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5, 5, 4)).astype(np.float32))
    positive = jnp.asarray([[True, True, False, False], [True, False, False, False]])
    classes = jnp.zeros((2, 4), jnp.int32)
    logits = masks.logits(features, classes, positive)
    alone = masks.logits(features[positive][None], classes[positive][None], positive[positive][None])
    assert_close(logits[positive], alone[0], 1e-4)
    assert np.isfinite(masks.logits(features, classes, jnp.zeros_like(positive))).all()


def test_masks_do_not_change_what_is_found():
    images, sizes, _ = batch()
    with_masks, without = (detect(small(name), images, sizes) for name in ("mask_rcnn", "faster_rcnn"))
    assert without.masks is None
    assert with_masks.masks.shape == (2, 10, 28, 28)
    assert ((with_masks.masks >= 0) & (with_masks.masks <= 1)).all()


def test_objects_must_have_masks():
    images, sizes, objects = batch()
    with pytest.raises(ValueError, match="objects must have masks and mask_boxes"):
        losses(small("mask_rcnn"), images, sizes, objects)


@pytest.mark.slow
def test_in_bfloat16_losses_are_finite():
    images, sizes, objects = batch(1, side=32, masks=True)
    values, gradients, _ = losses(small("mask_rcnn", dtype=jnp.bfloat16), images, sizes, objects)
    assert values["loss_mask"].dtype == jnp.float32
    assert values["loss_mask"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((values, gradients)))
