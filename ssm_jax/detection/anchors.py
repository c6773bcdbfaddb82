"""Anchors: the boxes from which detectors regress, a few shapes around each position of a map."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def cell_anchors(sizes: Sequence[float | int], aspect_ratios: Sequence[float | int]) -> Float[np.ndarray, "a 4"]:
    """Boxes around the origin: of each aspect ratio (height / width) in turn, with an area of each of sizes^2.

    Corners are whole pixels, rounded half to even, as in torchvision.
    """
    root = np.sqrt(np.asarray(aspect_ratios, np.float32))[:, None]
    side = np.asarray(sizes, np.float32)[None]
    w, h = ((1 / root) * side).ravel(), (root * side).ravel()
    return np.round(np.stack([-w, -h, w, h], axis=-1) / 2)


def grid_anchors(
    cell: Float[np.ndarray, "a 4"], shape: tuple[int, int], strides: tuple[int, int]
) -> Float[Array, "n 4"]:
    """`cell` at the upper left corner of each position of a map of `shape` (h, w), in the order (y, x, anchor).

    `strides` are the image's pixels per position in y and x; n = h w a.
    """
    y = jnp.arange(shape[0], dtype=jnp.float32) * strides[0]
    x = jnp.arange(shape[1], dtype=jnp.float32) * strides[1]
    y, x = jnp.meshgrid(y, x, indexing="ij")
    corners = jnp.stack([x, y, x, y], axis=-1)
    return (corners[:, :, None] + cell[None, None]).reshape(-1, 4)


def pyramid_anchors(
    sizes: Sequence[Sequence[float | int]],
    aspect_ratios: Sequence[float | int],
    shapes: Sequence[tuple[int, int]],
    image_shape: tuple[int, int],
) -> tuple[Float[Array, "_ 4"], ...]:
    """Of each map of a pyramid, the anchors: of `sizes` of its own, and `aspect_ratios` that all maps share.

    `shapes` are the maps' (h, w) and `image_shape` that of the image, whose quotients rounded down are the strides.
    Raises ValueError unless there are as many maps as entries of `sizes`, and equally many sizes in each.
    """
    if len(sizes) != len(shapes):
        raise ValueError(f"sizes must have an entry for each of {len(shapes)} maps, got {len(sizes)}.")
    if len({len(sides) for sides in sizes}) > 1:
        raise ValueError(f"sizes must have equally many for each map, as one head says something of all, got {sizes}.")
    height, width = image_shape
    return tuple(
        grid_anchors(cell_anchors(sides, aspect_ratios), (h, w), (height // h, width // w))
        for sides, (h, w) in zip(sizes, shapes, strict=True)
    )
