"""From raw images to a model's input, at any resolution; runs on the device, inside a step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def normalize(images: UInt8[Array, "b h w c"], mean: Sequence[float], std: Sequence[float]) -> Float[Array, "b h w c"]:
    """Maps bytes to (x / 255 - mean) / std, per channel, in float32."""
    x = images.astype(jnp.float32) / 255
    return (x - jnp.asarray(mean, jnp.float32)[None, None, None]) / jnp.asarray(std, jnp.float32)[None, None, None]


def resample(images: Float[Array, "b h w c"], resolution: int) -> Float[Array, "b {resolution} {resolution} c"]:
    """Resizes to `resolution` x `resolution`, bilinearly, with antialiasing when that is smaller.

    The S4ND experiments change resolution this way, after augmentation and normalisation.
    """
    shape = (images.shape[0], resolution, resolution, images.shape[3])
    return images if shape == images.shape else jax.image.resize(images, shape, "bilinear", antialias=True)
