"""Faster R-CNN (Ren et al., 2015, arXiv:1506.01497) on feature pyramids, as torchvision has it.

    images -> backbone, C2 to C5 -> FPN, P2 to P6 -> RPN -> proposals
           -> for each proposal: RoIAlign of P2 to P5, 7 x 7 -> head -> logits of the classes, and the way to a box

Class 0 of the logits is the background: an object of class c has the label c + 1. With a branch for masks, it is Mask
R-CNN: see mask_rcnn.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from ssm_jax.detection.boxes import clip, decode, encode
from ssm_jax.detection.fpn import FPN, ConvNorm, Pyramid, map_size
from ssm_jax.detection.losses import smooth_l1
from ssm_jax.detection.matching import BELOW, check_options, match, sample
from ssm_jax.detection.roi_align import pyramid_roi_align
from ssm_jax.detection.rpn import RPN
from ssm_jax.detection.selection import best_detections, of_images
from ssm_jax.detection.structures import Detections, Objects, check_sizes
from ssm_jax.layers.conv import kaiming_normal
from ssm_jax.layers.linear import linear, uniform_init

SMALLEST = 1e-2
"""Width and height of a detection in pixels, at least."""


class Samples(NamedTuple):
    """Proposals that the losses of a batch are taken of, those with an object first."""

    boxes: Float[Array, "b n 4"]
    matched: Int[Array, "b n"]
    """Which object each is to find; where there is none, negative."""
    labels: Int[Array, "b n"]
    """The object's class + 1, or 0."""
    chosen: Bool[Array, "b n"]
    """The others are padding."""
    targets: Float[Array, "b n 4"]
    """The way from the proposal to its object; 0 without one."""

    @property
    def positive(self) -> Bool[Array, "..."]:
        """Those with an object."""
        return self.chosen & (self.labels > 0)


def flattened(channels: int, size: int, features: int, *, rngs: nnx.Rngs, **dtypes: Any) -> nnx.LinearGeneral:
    """A linear map of a whole map of `size` x `size` positions, which starts as PyTorch's."""
    init = uniform_init(size * size * channels)
    return nnx.LinearGeneral(
        (size, size, channels), features, axis=(-3, -2, -1), kernel_init=init, bias_init=init, **dtypes, rngs=rngs
    )


class TwoLinear(nnx.Module):
    """Two linear maps, with ReLU."""

    def __init__(self, channels: int, size: int, *, features: int = 1024, rngs: nnx.Rngs, **dtypes: Any):
        """Builds them for maps of `size` x `size` positions."""
        self.fc6 = flattened(channels, size, features, **dtypes, rngs=rngs)
        self.fc7 = linear(features, features, **dtypes, rngs=rngs)
        self.features = features

    def __call__(self, x: Float[Array, "n s s c"], where: Bool[Array, " n"]) -> Float[Array, "n d"]:
        """Features of each map."""
        return nnx.relu(self.fc7(nnx.relu(self.fc6(x))))


class ConvsLinear(nnx.Module):
    """3 x 3 convolutions and a linear map, with ReLU after each."""

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        widths: Sequence[int] = (256, 256, 256, 256),
        features: int = 1024,
        norm: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds them for maps of `size` x `size` positions.

        `norm`, called as `norm(width, ...)`, makes batch norms after the convolutions.
        """
        self.convs = nnx.List(
            ConvNorm(c, width, norm=norm, kernel_init=kaiming_normal, **dtypes, rngs=rngs)
            for c, width in zip((channels, *widths), widths, strict=False)
        )
        self.fc = flattened(widths[-1], size, features, **dtypes, rngs=rngs)
        self.features = features

    def __call__(self, x: Float[Array, "n s s c"], where: Bool[Array, " n"]) -> Float[Array, "n d"]:
        """Features of each map; `where` says which of them count for statistics."""
        for conv in self.convs:
            x = nnx.relu(conv(x, where))
        return nnx.relu(self.fc(x))


class BoxBranch(nnx.Module):
    """Classifies proposals, and finds the way from each to a box, of each class."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        head: Callable[..., Any] = TwoLinear,
        size: int = 7,
        match_iou: float = 0.5,
        ignore_iou: float = 0.5,
        samples: int = 512,
        positive_share: float = 0.25,
        weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
        detections: int = 100,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds the head; the defaults are torchvision's.

        Args:
            channels: of the pyramid's maps.
            num_classes: number of classes of objects.
            head: makes what comes before the outputs, called as `head(channels, size, ...)`; it says its `features`.
            size: positions of a proposal's map in height and width.
            match_iou: IoU of a proposal from which on it is to find the object.
            ignore_iou: from which on it is not told that it is background.
            samples: proposals of an image that the losses are taken of.
            positive_share: how many of these at most are to find an object.
            weights: of the four numbers that are the way to a box, see `encode`.
            score_threshold: what the scores of detections are above.
            nms_iou: what the IoUs of detections of a class are at most.
            detections: the number of detections for an image.
            rngs: source of the `params` stream.
            **dtypes: `dtype` and `param_dtype`.

        Raises:
            ValueError: for options that cannot be.
        """
        check_options(
            match_iou=match_iou, ignore_iou=ignore_iou, samples=samples, share=positive_share, detections=detections
        )
        self.head = head(channels, size, **dtypes, rngs=rngs)
        self.classes = linear(self.head.features, num_classes + 1, **dtypes, rngs=rngs)
        self.deltas = linear(self.head.features, 4 * (num_classes + 1), **dtypes, rngs=rngs)
        self.num_classes, self.size, self.weights = num_classes, size, weights
        self.match_iou, self.ignore_iou = match_iou, ignore_iou
        self.samples, self.positive_share = samples, positive_share
        self.most_positive = int(samples * positive_share)
        self.score_threshold, self.nms_iou, self.detections = score_threshold, nms_iou, detections

    def __call__(
        self, features: Float[Array, "b n s s c"], where: Bool[Array, "b n"]
    ) -> tuple[Float[Array, "b n k"], Float[Array, "b n k 4"]]:
        """Logits and deltas in float32; `where` says which of the maps count for statistics."""
        b, n = where.shape
        where = (where | ~where.any()).ravel()  # there are no statistics of none
        x = self.head(features.reshape(-1, *features.shape[2:]), where)
        logits, deltas = self.classes(x).astype(jnp.float32), self.deltas(x).astype(jnp.float32)
        return logits.reshape(b, n, -1), deltas.reshape(b, n, -1, 4)

    def sample(
        self,
        key: PRNGKeyArray,
        proposals: Float[Array, "p 4"],
        there: Bool[Array, " p"],
        boxes: Float[Array, "m 4"],
        classes: Int[Array, " m"],
        valid: Bool[Array, " m"],
    ) -> Samples:
        """Of one image, samples of the proposals that are `there` and the boxes of objects that are `valid`."""
        there = jnp.concatenate([there, valid])
        proposals = jnp.where(there[:, None], jnp.concatenate([proposals, boxes]), 0)
        matched = match(proposals, boxes, valid, high=self.match_iou, low=self.ignore_iou, keep_best=False)
        labels = jnp.where(matched >= 0, classes[matched] + 1, jnp.where(matched == BELOW, 0, -1))
        index, chosen = sample(key, jnp.where(there, labels, -1), self.samples, self.positive_share)
        proposals, matched, labels = proposals[index], matched[index], jnp.where(chosen, labels[index], 0)
        targets = jnp.where((labels > 0)[:, None], encode(boxes[matched], proposals, self.weights), 0)
        return Samples(proposals, matched, labels, chosen, targets)

    def loss_sums(
        self, logits: Float[Array, "n k"], deltas: Float[Array, "n k 4"], samples: Samples
    ) -> dict[str, Float[Array, ""]]:
        """For one image, `loss_classifier` and `loss_box_reg` times `count`, the samples chosen."""
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, samples.labels)
        deltas = jnp.take_along_axis(deltas, samples.labels[:, None, None], axis=1)[:, 0]
        distance = smooth_l1(deltas, samples.targets, beta=1 / 9).sum(-1)
        return {
            "loss_classifier": jnp.where(samples.chosen, entropy, 0).sum(),
            "loss_box_reg": jnp.where(samples.positive, distance, 0).sum(),
            "count": samples.chosen.sum().astype(jnp.float32),
        }

    def detect(
        self,
        logits: Float[Array, "n k"],
        deltas: Float[Array, "n k 4"],
        proposals: Float[Array, "n 4"],
        there: Bool[Array, " n"],
        size: Num[Array, "2"],
    ) -> Detections:
        """Those of one image of this `size`: every proposal may be an object of every class."""
        scores = jax.nn.softmax(logits)[:, 1:]
        boxes = clip(decode(deltas[:, 1:], proposals[:, None], self.weights), size)
        sides = boxes[..., 2:] - boxes[..., :2]
        valid = there[:, None] & (scores > self.score_threshold) & (sides >= SMALLEST).all(-1)
        classes = jnp.broadcast_to(jnp.arange(self.num_classes)[None], scores.shape)
        flat = boxes.reshape(-1, 4), scores.ravel(), classes.ravel(), valid.ravel()
        return best_detections(*flat, nms_iou=self.nms_iou, count=self.detections)


class FasterRCNN(nnx.Module):
    """Finds objects of `num_classes` classes, and with a `mask` branch their masks."""

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: Callable[..., Any],
        fpn: Callable[..., FPN] = FPN,
        rpn: Callable[..., RPN] = RPN,
        box: Callable[..., BoxBranch] = BoxBranch,
        mask: Callable[..., Any] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the network.

        Args:
            num_classes: number of classes of objects.
            backbone: makes what has maps, called as `backbone(...)`: `functools.partial(Backbone, "resnet50")`.
            fpn: makes the pyramid, called as `fpn(channels, ...)`.
            rpn: makes what proposes, called as `rpn(channels, ...)`.
            box: makes what classifies proposals, called as `box(channels, num_classes, ...)`.
            mask: makes what finds masks, called as `mask(channels, num_classes, ...)`: `MaskBranch`.
            dtype: dtype of convolutions and activations; boxes and losses are float32.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for less than one class, or as the parts do.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.backbone = backbone(**options)
        self.fpn = fpn(self.backbone.channels, **options)
        self.rpn = rpn(self.fpn.channels, **options)
        self.box = box(self.fpn.channels, num_classes, **options)
        self.mask = None if mask is None else mask(self.fpn.channels, num_classes, **options)

    def __call__(self, images: Float[Array, "b h w 3"], sizes: Num[Array, "b 2"]) -> Detections:
        """Detections in images whose parts of `sizes`, height and width, are no padding."""
        check_sizes(images, sizes)
        sizes = jnp.asarray(sizes)
        pyramid = self.fpn(self.backbone(images))
        shape = map_size(images)
        propose = functools.partial(self.rpn.propose, training=False)
        boxes, there = of_images(propose, (*self.rpn(pyramid), sizes), self.rpn.anchors(pyramid, shape))
        logits, deltas = self.box(self._aligned(pyramid, boxes, shape, self.box.size), there)
        found = of_images(self.box.detect, (logits, deltas, boxes, there, sizes))
        if self.mask is None:
            return found
        features = self._aligned(pyramid, found.boxes, shape, self.mask.size)
        return found._replace(masks=self.mask.probabilities(features, found.classes, found.valid))

    def losses(
        self,
        images: Float[Array, "b h w 3"],
        sizes: Num[Array, "b 2"],
        objects: Objects,
        *,
        key: PRNGKeyArray,
    ) -> dict[str, Float[Array, ""]]:
        """The losses of the RPN and of each branch, by torchvision's names; means over the samples of all images."""
        rows = len(images)
        for_backbone, for_rpn, for_box = jax.random.split(key, 3)
        pyramid = self.fpn(self.backbone(images, rngs=nnx.Rngs(dropout=for_backbone)))
        shape = map_size(images)
        logits, deltas = self.rpn(pyramid)
        anchors = self.rpn.anchors(pyramid, shape)
        told = jax.random.split(for_rpn, rows), logits, deltas, objects.boxes, objects.valid
        losses = _means(of_images(self.rpn.loss_sums, told, jnp.concatenate(anchors)))

        propose = functools.partial(self.rpn.propose, training=True)
        proposals = of_images(propose, (logits, deltas, sizes), anchors)
        samples = of_images(self.box.sample, (jax.random.split(for_box, rows), *proposals, *objects[:3]))
        logits, deltas = self.box(self._aligned(pyramid, samples.boxes, shape, self.box.size), samples.chosen)
        losses |= _means(of_images(self.box.loss_sums, (logits, deltas, samples)))
        if self.mask is not None:
            # Those with an object come first.
            samples = jax.tree.map(lambda x: x[:, : self.box.most_positive], samples)
            features = self._aligned(pyramid, samples.boxes, shape, self.mask.size)
            losses["loss_mask"] = self.mask.loss(features, samples, objects)
        return losses

    def _aligned(
        self, pyramid: Pyramid, boxes: Float[Array, "b n 4"], image_shape: tuple[int, int], size: int
    ) -> Float[Array, "b n s s c"]:
        """Maps of `size` x `size` positions of the boxes, from the maps that the network has too."""
        align = functools.partial(pyramid_roi_align, image_size=image_shape, output_size=size)
        return of_images(align, (pyramid[: len(self.backbone.channels)], boxes))


def _means(sums: dict[str, Float[Array, "b"]]) -> dict[str, Float[Array, ""]]:
    """Losses of a batch, of the sums in its images and the `count` of what is summed there."""
    totals = {name: x.sum() for name, x in sums.items()}
    count = jnp.maximum(totals.pop("count"), 1)
    return {name: total / count for name, total in totals.items()}
