"""Losses of boxes, element by element or box by box; nothing is reduced. Focal loss is `optax.sigmoid_focal_loss`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.detection.boxes import giou


def smooth_l1(pred: Float[Array, "*n"], target: Float[Array, "*n"], beta: float) -> Float[Array, "*n"]:
    """|pred - target| - beta / 2, and up to `beta` the parabola that goes on smoothly to 0 (arXiv:1504.08083, eq. 3).

    With `beta` 0, the L1 loss. Raises ValueError for a negative one.
    """
    if beta < 0:
        raise ValueError(f"beta must be at least 0, got {beta}.")
    difference = pred - target
    distance = difference * jnp.sign(difference)  # the gradient of which, unlike that of jnp.abs, is 0 at 0
    if beta == 0:
        return distance
    return jnp.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2)


def giou_loss(a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """1 - generalized IoU of each box with its counterpart, 0 to 2 (arXiv:1902.09630)."""
    return 1 - giou(a, b)
