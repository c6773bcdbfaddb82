"""Linear layers with the initial values of the papers' PyTorch code."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def uniform_init(fan_in: int) -> jax.nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in): PyTorch's default for weights and biases of linear and convolution layers."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0, out_sharding=out_sharding) * fan_in**-0.5

    return init


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """An `nnx.Linear` that starts as PyTorch's does."""
    init = uniform_init(in_features)
    return nnx.Linear(
        in_features, out_features, kernel_init=init, bias_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


# The originals cut the normal distribution at +-2, a hundred standard deviations away.
normal_init = jax.nn.initializers.normal(0.02)

normal_linear = functools.partial(nnx.Linear, kernel_init=normal_init)
"""An `nnx.Linear` that starts as those of vision transformers and ConvNeXt: weights N(0, 0.02^2), biases 0."""
