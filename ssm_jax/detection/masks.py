"""What the mask head is to find: the part of an object's mask that is in a box, on the head's grid."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def mask_targets(
    masks: UInt8[Array, "m g_y g_x"],
    mask_boxes: Float[Array, "m 4"],
    boxes: Float[Array, "n 4"],
    matched: Int[Array, " n"],
    *,
    size: int,
) -> Float[Array, "n size size"]:
    """For each box the share of its object, `matched`, in each of size x size equal parts: 0 to 1.

    A mask is a grid over `mask_boxes`, a part of the image, and 0 outside. If that is the image and the grid its
    pixels, this is torchvision's RoIAlign, of so many samples that they are at most a pixel apart, and half a pixel
    further on than the boxes say. For other grids it is the same function of the image, with samples at most a position
    apart. Always finite, also for what is no object's.
    """
    rows, columns = masks.shape[1:]
    matched = jnp.clip(matched, 0, masks.shape[0] - 1)  # where there is no object, anything
    left, top, right, bottom = mask_boxes[matched].T

    def weights(start, end, first, last, length):
        positions = length / jnp.maximum(last - first, 1e-3)  # what is no object may have a box of no size
        # Position 0 is the centre of the grid's first cell; torchvision takes the corner of a pixel for its centre.
        start, end = ((edge + 0.5 - first) * positions - 0.5 for edge in (start, end))
        return axis_weights(start, jnp.maximum(end - start, 1), length, size=size)

    y = weights(boxes[:, 1], boxes[:, 3], top, bottom, rows)
    x = weights(boxes[:, 0], boxes[:, 2], left, right, columns)
    grids = masks[matched].astype(jnp.float32)
    return jnp.einsum("nph,nhw,nqw->npq", y, grids, x, precision=jax.lax.Precision.HIGHEST)


def axis_weights(
    start: Float[Array, " n"], extent: Float[Array, " n"], length: int, *, size: int
) -> Float[Array, "n size length"]:
    """RoIAlign along one axis: weights of its `length` positions in the equal parts of boxes, which begin at `start`.

    The samples in a part are ceil(extent / size), so at most one position apart; but no more than twice those of a box
    from end to end, which boxes that have half of their object in common with it do not need.
    """
    most = 2 * -(-length // size)
    samples = jnp.clip(jnp.ceil(extent / size), 0, most)
    sample, part, position = (jnp.arange(k, dtype=start.dtype) for k in (most, size, length))
    # Axes: box, part, sample, position.
    within = (sample[None] + 0.5) / jnp.maximum(samples, 1)[:, None]
    where = start[:, None, None] + (part[None, :, None] + within[:, None, :]) * (extent / size)[:, None, None]
    counts = (where >= -1) & (where <= length) & (sample[None] < samples[:, None])[:, None, :]
    where = jnp.clip(where, 0, length - 1)
    hat = jnp.maximum(1 - jnp.abs(where[..., None] - position[None, None, None]), 0)
    weights = jnp.where(counts[..., None], hat, 0).sum(axis=2)
    return weights / jnp.maximum(samples, 1)[:, None, None]
