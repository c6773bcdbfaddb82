"""RetinaNet: every anchor is classified (Lin et al., 2017, arXiv:1708.02002), as torchvision has it.

    images -> backbone, C3 to C5 -> FPN, P3 to P7 -> for each of 9 anchors at each position: logits of the classes
                                                  -> and the way from the anchor to a box

Two heads of the same kind do that, each the same on all maps.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from ssm_jax.detection.anchors import pyramid_anchors
from ssm_jax.detection.boxes import clip, decode, encode
from ssm_jax.detection.fpn import FPN, P6P7, ConvNorm, Pyramid, map_size
from ssm_jax.detection.losses import giou_loss, smooth_l1
from ssm_jax.detection.matching import BETWEEN, check_options, match
from ssm_jax.detection.selection import best_detections, best_of_maps, of_images, of_maps
from ssm_jax.detection.structures import Detections, Objects, check_sizes

normal_init = jax.nn.initializers.normal(0.01)

_FPN = functools.partial(FPN, extra=P6P7)

ANCHOR_SIZES = tuple(tuple(int(size * 2 ** (third / 3)) for third in range(3)) for size in (32, 64, 128, 256, 512))
"""Three for each map, an octave apart from map to map (section 4)."""

PRIOR = 0.01
"""Probability of every class at the start (section 4.1)."""


def l1(deltas: Float[Array, "n 4"], anchors: Float[Array, "n 4"], boxes: Float[Array, "n 4"]) -> Float[Array, " n"]:
    """Distance of `deltas` to those that lead from the anchors to the boxes."""
    return smooth_l1(deltas, encode(boxes, anchors), beta=0.0).sum(-1)


def giou(deltas: Float[Array, "n 4"], anchors: Float[Array, "n 4"], boxes: Float[Array, "n 4"]) -> Float[Array, " n"]:
    """What is missing of the generalized IoU of the boxes and those that `deltas` lead to."""
    return giou_loss(decode(deltas, anchors), boxes)


class Head(nnx.Module):
    """3 x 3 convolutions with ReLU, and one to the outputs of each anchor; the same for all maps."""

    def __init__(
        self,
        channels: int,
        num_anchors: int,
        outputs: int,
        *,
        depth: int = 4,
        norm: Callable[..., nnx.Module] | None = None,
        bias: float = 0.0,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds `depth` convolutions, each followed by what `norm(channels, ...)` makes, and that of the outputs.

        Its biases start as `bias`.
        """
        self.convs = nnx.List(
            ConvNorm(channels, channels, norm=norm, kernel_init=normal_init, **dtypes, rngs=rngs) for _ in range(depth)
        )
        bias_init = jax.nn.initializers.constant(bias)
        self.output = nnx.Conv(
            channels, num_anchors * outputs, (3, 3), kernel_init=normal_init, bias_init=bias_init, **dtypes, rngs=rngs
        )
        self.outputs = outputs

    def __call__(self, pyramid: Pyramid) -> Float[Array, "b n outputs"]:
        """Outputs in float32 for all anchors, map after map, in the order (y, x, anchor)."""
        return of_maps(Head._outputs, self, pyramid)

    def _outputs(self, pyramid: Pyramid) -> Float[Array, "b n outputs"]:
        rows = []
        for x in pyramid:
            for conv in self.convs:
                x = nnx.relu(conv(x))
            rows.append(self.output(x).astype(jnp.float32).reshape(x.shape[0], -1, self.outputs))
        return jnp.concatenate(rows, axis=1)


class RetinaNet(nnx.Module):
    """Finds objects of `num_classes` classes."""

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: Callable[..., Any],
        fpn: Callable[..., FPN] = _FPN,
        head: Callable[..., nnx.Module] = Head,
        box_loss: Callable[[Array, Array, Array], Array] = l1,
        anchor_sizes: Sequence[Sequence[float | int]] = ANCHOR_SIZES,
        aspect_ratios: Sequence[float | int] = (0.5, 1.0, 2.0),
        match_iou: float = 0.5,
        ignore_iou: float = 0.4,
        candidates: int = 1000,
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
        detections: int = 300,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the network; the defaults are torchvision's.

        Args:
            num_classes: number of classes of objects.
            backbone: makes what has maps, called as `backbone(maps=(1, 2, 3), ...)`: `functools.partial(Backbone,
                "resnet50")`.
            fpn: makes the pyramid, called as `fpn(channels, ...)`.
            head: makes each head, called as `head(channels, anchors, outputs, bias=..., ...)`.
            box_loss: of (deltas, anchors, boxes), one number for each: `l1` or `giou`.
            anchor_sizes: roots of areas of the anchors, in pixels, for each map of the pyramid.
            aspect_ratios: height / width of the anchors.
            match_iou: IoU of an anchor from which on it is to find the object.
            ignore_iou: from which on it is not told that it is background.
            candidates: most pairs of anchor and class that each map brings.
            score_threshold: what their scores are above.
            nms_iou: what the IoUs of detections of a class are at most.
            detections: the number of detections for an image.
            dtype: dtype of convolutions and activations; boxes and losses are float32.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for less than one class, or as the parts do.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        check_options(match_iou=match_iou, ignore_iou=ignore_iou, candidates=candidates, detections=detections)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.num_classes = num_classes
        self.backbone = backbone(maps=(1, 2, 3), **dtypes, rngs=rngs)
        self.fpn = fpn(self.backbone.channels, **dtypes, rngs=rngs)
        head = functools.partial(head, self.fpn.channels, len(anchor_sizes[0]) * len(aspect_ratios), **dtypes)
        self.classifier = head(num_classes, bias=-math.log((1 - PRIOR) / PRIOR), rngs=rngs)
        self.regressor = head(4, bias=0.0, rngs=rngs)
        self.box_loss = box_loss
        self.anchor_sizes = tuple(tuple(map(float, sides)) for sides in anchor_sizes)
        self.aspect_ratios = tuple(map(float, aspect_ratios))
        self.match_iou, self.ignore_iou = match_iou, ignore_iou
        self.candidates, self.score_threshold = candidates, score_threshold
        self.nms_iou, self.detections = nms_iou, detections

    def outputs(
        self, images: Float[Array, "b h w 3"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b n k"], Float[Array, "b n 4"], tuple[Float[Array, "_ 4"], ...]]:
        """Logits and deltas of all anchors, and the anchors of each map."""
        pyramid = self.fpn(self.backbone(images, rngs=rngs))
        shapes = [map_size(x) for x in pyramid]
        anchors = pyramid_anchors(self.anchor_sizes, self.aspect_ratios, shapes, map_size(images))
        return self.classifier(pyramid), self.regressor(pyramid), anchors

    def __call__(self, images: Float[Array, "b h w 3"], sizes: Num[Array, "b 2"]) -> Detections:
        """Detections in images whose parts of `sizes`, height and width, are no padding."""
        check_sizes(images, sizes)
        logits, deltas, anchors = self.outputs(images)
        return of_images(self._detect, (logits, deltas, jnp.asarray(sizes)), anchors)

    def losses(
        self,
        images: Float[Array, "b h w 3"],
        sizes: Num[Array, "b 2"],
        objects: Objects,
        *,
        key: PRNGKeyArray,
    ) -> dict[str, Float[Array, ""]]:
        """The focal loss of the classes and the loss of the boxes, of each image by its number of matched anchors."""
        del sizes  # anchors in the padding are background
        logits, deltas, anchors = self.outputs(images, rngs=nnx.Rngs(dropout=key))
        losses = of_images(self._losses, (logits, deltas, *objects[:3]), jnp.concatenate(anchors))
        return {name: loss.mean() for name, loss in losses.items()}

    def _losses(
        self,
        logits: Float[Array, "n k"],
        deltas: Float[Array, "n 4"],
        boxes: Float[Array, "m 4"],
        classes: Int[Array, " m"],
        valid: Bool[Array, " m"],
        anchors: Float[Array, "n 4"],
    ) -> dict[str, Float[Array, ""]]:
        """Those of one image."""
        matched = match(anchors, boxes, valid, high=self.match_iou, low=self.ignore_iou, keep_best=True)
        found = matched >= 0
        count = jnp.maximum(found.sum(), 1).astype(jnp.float32)
        targets = found[:, None] & (classes[matched][:, None] == jnp.arange(self.num_classes)[None])
        focal = optax.sigmoid_focal_loss(logits, targets.astype(logits.dtype), alpha=0.25, gamma=2.0)
        distance = self.box_loss(deltas, anchors, jnp.where(found[:, None], boxes[matched], anchors))
        return {
            "classification": jnp.where((matched != BETWEEN)[:, None], focal, 0).sum() / count,
            "bbox_regression": jnp.where(found, distance, 0).sum() / count,
        }

    def _detect(
        self,
        logits: Float[Array, "n k"],
        deltas: Float[Array, "n 4"],
        size: Num[Array, "2"],
        anchors: tuple[Float[Array, "_ 4"], ...],
    ) -> Detections:
        """Those of one image."""
        counts = [len(a) for a in anchors]
        # The best k pairs of anchor and class are of the k anchors whose best classes are best: no sorting of all.
        k = min(self.candidates, max(counts))
        index, there = best_of_maps(logits.max(-1), counts, k)
        scores = jnp.where(there[..., None], jax.nn.sigmoid(logits[index]), 0)
        scores = scores.reshape(len(counts), -1)
        scores, pair = jax.lax.top_k(scores, min(self.candidates, scores.shape[1]))
        anchor = jnp.take_along_axis(index, pair // self.num_classes, axis=1).ravel()
        scores, classes = scores.ravel(), (pair % self.num_classes).ravel()
        boxes = clip(decode(deltas[anchor], jnp.concatenate(anchors)[anchor]), size)
        return best_detections(
            boxes, scores, classes, scores > self.score_threshold, nms_iou=self.nms_iou, count=self.detections
        )
