"""RoIAlign: features of boxes, on a grid of the same size for all (Mask R-CNN, arXiv:1703.06870, section 3)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ssm_jax.detection.boxes import area
from ssm_jax.ops.backend import target_backend

_TAPS = 16 * 28**2
"""How many positions of the maps are read at a time on CPUs, whose caches these fit: of 16 boxes of 7 x 7 parts."""


def roi_align(
    maps: Float[Array, "h w c"],
    boxes: Float[Array, "n 4"],
    *,
    output_size: int,
    scale: float,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> Float[Array, "n s s c"]:
    """Means of `sampling_ratio`^2 bilinear samples of a map in each of s x s equal parts of each box, as torchvision.

    `boxes` are in pixels of the image, `scale` is the map's positions per pixel and s is `output_size`. The value of a
    position is taken to be at its upper left corner or, with `aligned`, at its centre; without, boxes count as at least
    one position wide and high. Samples within one position outside of the map are those of its border, others 0.
    There is no gradient to the boxes.
    """
    levels = jnp.zeros(boxes.shape[0], jnp.int32)
    return _align((maps,), (scale,), boxes, levels, output_size, sampling_ratio, aligned)


def pyramid_roi_align(
    maps: Sequence[Float[Array, "_ _ c"]],
    boxes: Float[Array, "n 4"],
    *,
    image_size: tuple[int, int],
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_size: int = 224,
    canonical_level: int = 4,
) -> Float[Array, "n s s c"]:
    """`roi_align` of each box on one map of a pyramid, whose maps halve from each to the next.

    On the map of level k, of 2^-k positions per pixel: k is `canonical_level` for a box of `canonical_size` pixels
    squared and one more for each doubling of its sides, as far as there are such maps (FPN, arXiv:1612.03144, equation
    1). `image_size` is the height and width of the image of the maps, whose quotient counts as the nearest power of 2.
    """
    scales = tuple(2.0 ** round(math.log2(m.shape[0] / image_size[0])) for m in maps)
    levels = assigned_levels(boxes, scales, canonical_size=canonical_size, canonical_level=canonical_level)
    return _align(tuple(maps), scales, boxes, levels, output_size, sampling_ratio, aligned)


def assigned_levels(
    boxes: Float[Array, "n 4"], scales: Sequence[float], *, canonical_size: int, canonical_level: int
) -> Int[Array, " n"]:
    """Which of the maps of `scales` `pyramid_roi_align` takes for each box: 0 is the first."""
    first, last = (-round(math.log2(scale)) for scale in (scales[0], scales[-1]))
    side = jnp.sqrt(jnp.maximum(area(boxes), 0))
    level = jnp.floor(canonical_level + jnp.log2(side / canonical_size) + 1e-6)
    return jnp.clip(level, first, last).astype(jnp.int32) - first


def _align(
    maps: Sequence[Float[Array, "_ _ c"]],
    scales: Sequence[float],
    boxes: Float[Array, "n 4"],
    levels: Int[Array, " n"],
    size: int,
    ratio: int,
    aligned: bool,
) -> Float[Array, "n s s c"]:
    """`roi_align` of each box on one of the maps."""
    heights, widths = np.array([m.shape[:2] for m in maps]).T
    first = np.cumsum([0, *(heights * widths)[:-1]])
    channels = maps[0].shape[-1]
    rows = jnp.concatenate([m.reshape(-1, channels) for m in maps])

    def of_level(numbers):
        return jnp.asarray(numbers, jnp.int32)[levels]

    scale = jnp.asarray(scales, boxes.dtype)[levels]
    boxes = jax.lax.stop_gradient(boxes) * scale[:, None] - (0.5 if aligned else 0.0)
    y, weight_y = _taps(boxes[:, 1], boxes[:, 3], of_level(heights), size, ratio, aligned)
    x, weight_x = _taps(boxes[:, 0], boxes[:, 2], of_level(widths), size, ratio, aligned)
    y = of_level(first)[:, None, None] + y * of_level(widths)[:, None, None]

    def features(taps: tuple[Array, ...]) -> Float[Array, "s s c"]:
        y, x, weight_y, weight_x = taps
        weight = weight_y[:, :, None, None, None] * weight_x[None, None, :, :, None]
        return (rows.at[y[:, :, None, None] + x[None, None]].get(mode="clip") * weight.astype(rows.dtype)).sum((1, 3))

    # What is read is 16 times the result, so not all of it at once; accelerators need more to be busy with.
    taps = _TAPS if target_backend() == "cpu" else 4 * _TAPS
    together = max(1, taps // (2 * ratio * size) ** 2)
    return jax.lax.map(features, (y, x, weight_y, weight_x), batch_size=together)


def _taps(
    start: Float[Array, " n"], end: Float[Array, " n"], length: Int[Array, " n"], size: int, ratio: int, aligned: bool
) -> tuple[Int[Array, "n s t"], Float[Array, "n s t"]]:
    """Along one axis, the positions that each of the parts of a box is a sum over, and their weights in it.

    `start`, `end` and the map's `length` are in positions.
    """
    extent = end - start if aligned else jnp.maximum(end - start, 1)
    parts = (jnp.arange(size * ratio, dtype=start.dtype) + 0.5) / (size * ratio)
    where = start[:, None] + parts[None] * extent[:, None]
    last = length[:, None].astype(start.dtype) - 1
    inside = (where >= -1) & (where <= last + 1)
    where = jnp.clip(where, 0, last)
    low = jnp.floor(where)
    share = where - low
    index = jnp.stack([low, jnp.minimum(low + 1, last)], axis=-1).astype(jnp.int32)
    weight = jnp.where(inside[..., None], jnp.stack([1 - share, share], axis=-1), 0) / ratio
    return index.reshape(-1, size, 2 * ratio), weight.reshape(-1, size, 2 * ratio)
