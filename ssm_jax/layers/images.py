"""Checking what a network is called with."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

_AXES = {2: ("height", "width"), 3: ("time", "height", "width")}


def check_images(
    images: Array, channels: int, *, axes: int = 2, multiple: int = 1, least: Sequence[int] | int = 1
) -> None:
    """Raises ValueError for images that a network cannot take, by what it can.

    Args:
        images: what it was called with.
        channels: of its images.
        axes: two for images, three for video.
        multiple: what height and width must be multiples of.
        least: least size, for all axes or for each.
    """
    sizes = (least,) * axes if isinstance(least, int) else tuple(least)
    given = getattr(images, "shape", None)
    fits = (
        given is not None
        and len(given) == axes + 2
        and given[-1] == channels
        and given[0] > 0
        and all(n >= size and n % multiple == 0 for n, size in zip(given[1:-1], sizes, strict=True))
    )
    if not fits:
        least_said = f", at least {sizes}" if max(sizes) > 1 else ", not empty"
        multiple_said = f", height and width multiples of {multiple}" if multiple > 1 else ""
        raise ValueError(
            f"images must be (batch, {', '.join(_AXES[axes])}, {channels} channels){least_said}{multiple_said}, got "
            f"{f'shape {tuple(given)}' if given is not None else repr(images)}."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be floating-point, got {images.dtype}; for bytes: x.astype(jnp.float32) / 255.")
