"""The position-wise network of transformer and ConvNeXt blocks."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.linear import normal_linear


class MLP(nnx.Module):
    """Two linear maps with the exact GELU between: d_model -> hidden -> d_model."""

    def __init__(
        self,
        d_model: int,
        hidden: int,
        *,
        dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds both maps; `dropout` is after each of them."""
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.fc1 = normal_linear(d_model, hidden, **dtypes, rngs=rngs)
        self.fc2 = normal_linear(hidden, d_model, **dtypes, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: Float[Array, "*b d_model"], *, rngs: nnx.Rngs | None = None) -> Float[Array, "*b d_model"]:
        """Applies it to every position."""
        x = self.dropout(nnx.gelu(self.fc1(x), approximate=False), rngs=rngs)
        return self.dropout(self.fc2(x), rngs=rngs)
