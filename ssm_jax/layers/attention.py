"""Self-attention (Vaswani et al., 2017, arXiv:1706.03762)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.linear import normal_linear


class Attention(nnx.Module):
    """Multi-head self-attention: softmax(Q K^T / sqrt(d)) V in each head, of width d = d_model / num_heads."""

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the map to queries, keys and values (in this order, each head by head) and that of the output.

        Raises ValueError unless `num_heads` divides `d_model`.
        """
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model={d_model}, got {num_heads}.")
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.num_heads = num_heads
        self.qkv = normal_linear(d_model, 3 * d_model, use_bias=qkv_bias, **dtypes, rngs=rngs)
        self.proj = normal_linear(d_model, d_model, **dtypes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b n d_model"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n d_model"]:
        """Applies it. Attention knows no distances and draws nothing: `rate` and `rngs` are what other mixers need."""
        del rate, rngs
        b, n, d = x.shape
        q, k, v = jnp.unstack(self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads), axis=2)
        return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(b, n, d))
