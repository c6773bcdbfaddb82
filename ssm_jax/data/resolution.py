"""From raw images to a model's input, at any resolution; runs on the device, inside a step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def normalize(images: UInt8[Array, "*axes c"], mean: Sequence[float], std: Sequence[float]) -> Float[Array, "*axes c"]:
    """Maps bytes to (x / 255 - mean) / std, per channel, in float32."""
    channels = (1,) * (images.ndim - 1) + (-1,)
    shift, scale = (jnp.asarray(values, jnp.float32).reshape(channels) for values in (mean, std))
    return (images.astype(jnp.float32) / 255 - shift) / scale


def resample(
    images: Float[Array, "b *frames h w c"], resolution: int
) -> Float[Array, "b *frames {resolution} {resolution} c"]:
    """Resizes to `resolution` x `resolution`, bilinearly, with antialiasing when that is smaller.

    The S4ND experiments change resolution this way, after augmentation and normalisation.
    """
    shape = (*images.shape[:-3], resolution, resolution, images.shape[-1])
    return images if shape == images.shape else jax.image.resize(images, shape, "bilinear", antialias=True)
