"""Boxes: (left, top, right, bottom) in pixels, where a pixel is the square between two integers on each axis.

Arguments broadcast, if they have the same number of axes. A box may be empty or inverted: then its area is 0 or has a
sign, as in torchvision, and the division of 0 by 0 gives NaN.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

LARGEST_SCALE = math.log(1000 / 16)
"""The most that `decode` takes the logarithm of a box's growth for: from a cell of stride 16 to 1000 pixels."""


def area(boxes: Float[Array, "... 4"]) -> Float[Array, "..."]:
    """In square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Float[Array, "... n 4"], b: Float[Array, "... m 4"]) -> Float[Array, "... n m"]:
    """Intersection over union of all pairs; NaN for two boxes of no area."""
    intersection, union = overlap(a[..., :, None, :], b[..., None, :, :])
    return intersection / union


def giou(a: Float[Array, "... 4"], b: Float[Array, "... 4"], eps: float = 1e-7) -> Float[Array, "..."]:
    """Generalized IoU of each box with its counterpart (Rezatofighi et al., 2019, arXiv:1902.09630, algorithm 1).

    That is IoU less the part of the smallest box around both that neither covers. `eps` is added to what is divided by.
    """
    intersection, union = overlap(a, b)
    around = jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1)
    hull = area(around)
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def overlap(
    a: Float[Array, "*#batch 4"], b: Float[Array, "*#batch 4"]
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """Areas of intersection and union of each box with its counterpart, in square pixels."""
    width = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
    height = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
    intersection = jnp.maximum(width, 0) * jnp.maximum(height, 0)
    return intersection, area(a) + area(b) - intersection


def encode(
    boxes: Float[Array, "... 4"],
    anchors: Float[Array, "... 4"],
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
) -> Float[Array, "... 4"]:
    """What regression from anchors to boxes has to find (R-CNN, arXiv:1311.2524, appendix C), times `weights`.

    Shifts of the centre in x and y, as parts of the anchor's width and height, and the logarithms of how much both
    grow. Not finite where a box or an anchor has no area.
    """
    x, y, w, h = _centre_and_size(boxes)
    anchor_x, anchor_y, anchor_w, anchor_h = _centre_and_size(anchors)
    deltas = (x - anchor_x) / anchor_w, (y - anchor_y) / anchor_h, jnp.log(w / anchor_w), jnp.log(h / anchor_h)
    return jnp.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)], axis=-1)


def decode(
    deltas: Float[Array, "... 4"],
    anchors: Float[Array, "... 4"],
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
) -> Float[Array, "... 4"]:
    """The boxes that `encode` makes `deltas` of, with growth of at most exp(LARGEST_SCALE)."""
    x, y, w, h = _centre_and_size(anchors)
    dx, dy, dw, dh = (deltas[..., i] / weight for i, weight in enumerate(weights))
    x, y = dx * w + x, dy * h + y
    half_w = 0.5 * w * jnp.exp(jnp.minimum(dw, LARGEST_SCALE))
    half_h = 0.5 * h * jnp.exp(jnp.minimum(dh, LARGEST_SCALE))
    return jnp.stack([x - half_w, y - half_h, x + half_w, y + half_h], axis=-1)


def clip(boxes: Float[Array, "*n 4"], size: Num[Array, "2"]) -> Float[Array, "*n 4"]:
    """Cut at the borders of an image of `size`, height and width."""
    height, width = size.astype(boxes.dtype)
    x, y = jnp.clip(boxes[..., 0::2], 0, width), jnp.clip(boxes[..., 1::2], 0, height)
    return jnp.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], axis=-1)


def _centre_and_size(boxes: Float[Array, "... 4"]) -> tuple[Float[Array, "..."], ...]:
    """Centres in x and y, width and height."""
    left, top, right, bottom = (boxes[..., i] for i in range(4))
    w, h = right - left, bottom - top
    return left + 0.5 * w, top + 0.5 * h, w, h
