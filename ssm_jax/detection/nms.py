"""Non-maximum suppression: of boxes that overlap, only the one of the highest score stays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ssm_jax.detection.boxes import overlap
from ssm_jax.ops.backend import target_backend

_MOST_AT_ONCE = 8192
"""Boxes whose pairs are not too many: 67 MB."""


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    *,
    threshold: float,
    valid: Bool[Array, " n"] | None = None,
    classes: Int[Array, " n"] | None = None,
    max_kept: int,
) -> tuple[Int[Array, " max_kept"], Bool[Array, " max_kept"]]:
    """Indices of the boxes that stay, by falling score, equal scores in the order of the input; and which of them are.

    A box stays if its IoU with each one before it that stays is at most `threshold`, or they differ in `classes`.
    Boxes that are not `valid` neither stay nor suppress. Scores of NaN are below all others, boxes of NaN or
    without area suppress none. There is no gradient.

    There are two ways to the same result: on CPUs, and for many boxes, one by one, elsewhere all at once.
    """
    n = boxes.shape[0]
    if n == 0:
        return jnp.zeros(max_kept, jnp.int32), jnp.zeros(max_kept, bool)
    valid = jnp.ones(n, bool) if valid is None else valid
    classes = jnp.zeros(n, jnp.int32) if classes is None else classes
    boxes, scores = jax.lax.stop_gradient((boxes, scores))
    lowest = jnp.finfo(scores.dtype).min
    scores = jnp.where(valid, jnp.where(scores > lowest, scores, lowest), -jnp.inf)
    way = one_by_one if target_backend() == "cpu" or n > _MOST_AT_ONCE else all_at_once
    return way(boxes, scores, classes, threshold, max_kept)


def one_by_one(
    boxes: Float[Array, "n 4"], scores: Float[Array, " n"], classes: Int[Array, " n"], threshold: float, max_kept: int
) -> tuple[Int[Array, " max_kept"], Bool[Array, " max_kept"]]:
    """`nms` as it is defined: max_kept times, takes the best box that is left and removes what it suppresses.

    Boxes that do not count have the score -inf. Takes no more memory than its arguments, and on GPUs the time to start
    a few kernels for each box that stays.
    """
    boxes, position = boxes.T, jnp.arange(scores.size)

    def keep_best(state):
        turn, scores, indices = state
        # argmax, in a tenth of its time on CPUs
        best = jnp.where(scores == scores.max(), position, position.size).min()
        same = classes == classes[best]
        removed = same & _suppresses(boxes[:, best, None], boxes, threshold)
        scores = jnp.where(removed, -jnp.inf, scores).at[best].set(-jnp.inf)
        return turn + 1, scores, indices.at[turn].set(best)

    def some_left(state):
        turn, scores, _ = state
        return (turn < max_kept) & (scores.max() > -jnp.inf)

    none = jnp.full_like(scores, -1, jnp.int32, shape=max_kept)
    _, _, indices = jax.lax.while_loop(some_left, keep_best, (0, scores, none))
    return jnp.maximum(indices, 0), indices >= 0


def all_at_once(
    boxes: Float[Array, "n 4"], scores: Float[Array, " n"], classes: Int[Array, " n"], threshold: float, max_kept: int
) -> tuple[Int[Array, " max_kept"], Bool[Array, " max_kept"]]:
    """`nms` as the solution of an equation: a box stays if no better one that stays suppresses it.

    Iterated from all boxes, the first k are right after k times, all of them usually after three or four. Takes n^2
    bytes.
    """
    order = jnp.argsort(-scores)  # stable
    boxes, classes, counts = boxes[order].T, classes[order], scores[order] > -jnp.inf
    position = jnp.arange(order.size)
    suppresses = _suppresses(boxes[:, :, None], boxes[:, None, :], threshold)
    suppresses &= (classes[:, None] == classes[None]) & (position[:, None] < position[None])

    def iterate(state):
        kept, _ = state
        return counts & ~(suppresses & kept[:, None]).any(axis=0), kept

    kept, _ = jax.lax.while_loop(lambda state: (state[0] != state[1]).any(), iterate, (counts, ~counts))
    slots = jnp.where(kept, kept.cumsum() - 1, max_kept)
    indices = jnp.zeros(max_kept, jnp.int32).at[slots].set(order, mode="drop")
    return indices, jnp.arange(max_kept) < kept.sum()


def _suppresses(a: Float[Array, "4 *#n"], b: Float[Array, "4 *#n"], threshold: float) -> Bool[Array, "*#n"]:
    """Whether the IoU of each box with its counterpart is above `threshold`; coordinates come first."""
    intersection, union = overlap(jnp.moveaxis(a, 0, -1), jnp.moveaxis(b, 0, -1))
    return intersection / union > threshold
