"""The precision that state spaces are computed in."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """`dtype` itself, or float32 for half precision: kernels, spectra and states need its digits and range."""
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32)
