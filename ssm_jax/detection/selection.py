"""What heads say of anchors and proposals, and choosing from it, image by image, with results of fixed size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ssm_jax.detection.nms import nms
from ssm_jax.detection.structures import Detections
from ssm_jax.ops.batch_local import batch_local


def of_images(function: Callable[..., Any], images: tuple[Any, ...], *shared: Any) -> Any:
    """`function(*image, *shared)` of each image of a batch, on the device that has it."""
    run = jax.vmap(lambda image, *shared: function(*image, *shared), in_axes=(0, *[None] * len(shared)))
    return batch_local(run)(images, *shared)


def of_maps(function: Callable[[Any, Any], Any], head: nnx.Module, maps: Sequence[Array]) -> Any:
    """`function(head, maps)` of each device's part of a batch.

    What devices then sum is the gradient of the head's parameters. It would be that of each map else, five times as
    much.
    """
    graphdef, state = nnx.split(head)
    run = lambda maps, state: function(nnx.merge(graphdef, state), maps)  # noqa: E731
    return batch_local(run)(tuple(maps), state)


def best_of_maps(
    scores: Float[Array, " n"], counts: Sequence[int], k: int
) -> tuple[Int[Array, "maps k"], Bool[Array, "maps k"]]:
    """Indices of the k largest scores of each map, best first, and which of them there are.

    `counts` says how many of the scores, one after another, are each map's; the smallest maps may have less than k.
    """
    indices, first = [], 0
    for count in counts:
        _, best = jax.lax.top_k(scores[first : first + count], min(k, count))
        indices.append(jnp.pad(best + first, (0, k - best.size), constant_values=-1))
        first += count
    index = jnp.stack(indices)
    return index, index >= 0


def best_detections(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    classes: Int[Array, " n"],
    valid: Bool[Array, " n"],
    *,
    nms_iou: float,
    count: int,
) -> Detections:
    """The `count` best of the `valid` boxes whose IoU with better ones of their class is at most `nms_iou`."""
    chosen, kept = nms(boxes, scores, threshold=nms_iou, valid=valid, classes=classes, max_kept=count)
    boxes = jnp.where(kept[:, None], boxes[chosen], 0)
    return Detections(boxes, jnp.where(kept, scores[chosen], 0), jnp.where(kept, classes[chosen], 0), kept)
