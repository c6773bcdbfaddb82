"""Learned embeddings of positions."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def resample_positions(
    pos_embed: Float[Array, "one n d"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "one n2 d"]:
    """Position embeddings of a transformer's patches for another size of images, as timm and DeiT do it.

    The embeddings of the `grid` are read as an image with d channels and resized, by cubic interpolation that also
    smooths where the new grid is coarser.

    Args:
        pos_embed: one embedding for each token that is not a patch (class, distillation), which stay as they are,
            and then one for each patch, row by row.
        grid: patches in (height, width) now.
        new_grid: patches wanted.

    Raises:
        ValueError: if there are fewer embeddings than patches.
    """
    one, n, d = pos_embed.shape
    prefix = n - math.prod(grid)
    if prefix < 0:
        raise ValueError(f"pos_embed must have an embedding for each patch of grid={grid}, got {n}.")
    if grid == new_grid:
        return pos_embed
    patches = pos_embed[:, prefix:].reshape(one, *grid, d)
    resized = jax.image.resize(patches, (one, *new_grid, d), "cubic").reshape(one, -1, d)
    return jnp.concatenate([pos_embed[:, :prefix], resized], axis=1)
