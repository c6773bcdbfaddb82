"""What detectors are given and what they give: fixed numbers of objects per image, of which some are padding."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8


class Objects(NamedTuple):
    """The objects of a batch of images, padded to the same number; padding has `valid` False, and else anything finite.

    Boxes are (left, top, right, bottom) in pixels of the network's input.
    """

    boxes: Float[Array, "b n 4"]
    classes: Int[Array, "b n"]
    """0 .. num_classes - 1."""
    valid: Bool[Array, "b n"]
    masks: UInt8[Array, "b n g_y g_x"] | None = None
    """1 inside of the object and 0 outside, on a grid over a part of the image: all of it, or the object's crop."""
    mask_boxes: Float[Array, "b n 4"] | None = None
    """That part, in pixels. Outside of it the mask is 0."""


def check_sizes(images: Any, sizes: Any) -> None:
    """Raises ValueError unless there are a height and a width for each image."""
    if np.shape(sizes) != (len(images), 2):
        raise ValueError(
            f"sizes must be an array of shape ({len(images)}, 2), height and width of each image without padding, got "
            f"{np.shape(sizes)}."
        )


class Detections(NamedTuple):
    """What is found in a batch of images, best first, padded to the same number with `valid` False and scores 0."""

    boxes: Float[Array, "b n 4"]
    """In pixels of the network's input."""
    scores: Float[Array, "b n"]
    classes: Int[Array, "b n"]
    valid: Bool[Array, "b n"]
    masks: Float[Array, "b n m m"] | None = None
    """Probability that a cell of a grid over the box belongs to the object."""
