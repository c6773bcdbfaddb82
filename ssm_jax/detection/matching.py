"""Which object each anchor or proposal is to find in training, and a random choice of those that count in the loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ssm_jax.detection.boxes import iou

BELOW, BETWEEN = -1, -2
"""What `match` returns for boxes without an object."""


def check_options(*, match_iou: float, ignore_iou: float, samples: int = 1, share: float = 1.0, **numbers: int) -> None:
    """Raises ValueError for options of a head, by their names, that it cannot be trained or used with."""
    if not 0 <= ignore_iou <= match_iou <= 1:
        raise ValueError(
            f"ignore_iou must be in [0, match_iou], and match_iou at most 1, got {ignore_iou} and {match_iou}."
        )
    if not (0 < share <= 1 and samples * share >= 1):
        raise ValueError(
            f"positive_share must be in (0, 1], and at least one of samples, got {share} of samples={samples}."
        )
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")


def match(
    boxes: Float[Array, "n 4"],
    objects: Float[Array, "m 4"],
    valid: Bool[Array, " m"],
    *,
    high: float,
    low: float,
    keep_best: bool,
) -> Int[Array, " n"]:
    """The object of the largest IoU with each box: its index, the first of equals, if that IoU is at least `high`.

    Else BELOW if it is less than `low`, or if no object is `valid`, and BETWEEN if it is neither. With `keep_best`, a
    box also keeps its object if some object has no larger IoU with any other box, as in torchvision: so each object has
    a box, usually. Faster R-CNN, arXiv:1506.01497, section 3.1.2.

    Takes n m floats of memory. Raises ValueError if `high` is less than `low`.
    """
    if high < low:
        raise ValueError(f"high must be at least low = {low}, got {high}.")
    overlaps = iou(objects, boxes)
    # Two boxes without area have NaN. The barrier keeps XLA from computing it once more for each use, as it might with
    # another rounding: `keep_best` compares for equality.
    overlaps = jax.lax.optimization_barrier(jnp.where(valid[:, None] & (overlaps >= 0), overlaps, -1))
    best, nearest = overlaps.max(axis=0), overlaps.argmax(axis=0).astype(jnp.int32)
    matches = best >= high
    if keep_best:
        of_object = overlaps.max(axis=1, keepdims=True)
        matches |= ((overlaps == of_object) & (of_object >= 0)).any(axis=0)
    return jnp.where(matches, nearest, jnp.where(best < low, BELOW, BETWEEN))


def sample(
    key: PRNGKeyArray, labels: Int[Array, " n"], count: int, positive_share: float
) -> tuple[Int[Array, " count"], Bool[Array, " count"]]:
    """Indices of `count` random entries of `labels`, and which of these are chosen: the others are to be ignored.

    Labels of 1 and more are positive, 0 is negative, less is never chosen. At most `count * positive_share`, rounded
    down, are positive, which come first, and as many negative as `count` leaves room for; where there are fewer, fewer
    are chosen.
    """
    order = jax.random.uniform(key, labels.shape)
    most = int(count * positive_share)
    positive, n_positive = _first(order, labels >= 1, most)
    negative, n_negative = _first(order, labels == 0, count)
    slot = jnp.arange(count)
    indices = jnp.where(
        slot < n_positive,
        positive.take(slot, mode="clip") if most else 0,
        negative.take(slot - n_positive, mode="clip"),
    )
    return indices, slot < n_positive + n_negative


def _first(
    order: Float[Array, " n"], candidates: Bool[Array, " n"], most: int
) -> tuple[Int[Array, " k"], Int[Array, ""]]:
    """Indices of at most `most` candidates, by falling `order`, and how many of these are some."""
    most = min(most, order.size)
    found, indices = jax.lax.top_k(jnp.where(candidates, order, -1), most)
    return indices, (found >= 0).sum()
