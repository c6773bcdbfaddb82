"""S6LA: the layers of a network as time steps of a selective state space model (arXiv:2502.10463).

An independent implementation: the authors' code is not public, and where the paper could not be read the choice is ours
and an argument here.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.conv import conv
from ssm_jax.layers.norm import BatchNorm
from ssm_jax.layers.ssm_kernel import SSMParam
from ssm_jax.ops.scan import selective_discretize


class S6LAConv(nnx.Module):
    """S6LA between the residual blocks of a stage, with a state of `state_dim` channels at every position.

        z = [X, h]                                         the input of a block's branch; its shortcut takes X alone
        [d, B, u] = BN(W X'), Delta = softplus(d + b)      of the block's output X'
        h' = exp(Delta A) h + Delta B u                    elementwise, in float32

    W, A and b are those of the stage, the statistics of BN (which has no parameters) each block's. Where a block halves
    the map, h is averaged over 2 x 2 positions before its update.
    """

    def __init__(
        self,
        channels: int,
        *,
        state_dim: int = 32,
        discretization: str = "euler",
        input_norm: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds what the blocks of a stage share.

        Args:
            channels: of the stage's maps.
            state_dim: channels of the state, N.
            discretization: `euler` or `zoh`, see `ssm_jax.ops.selective_discretize`.
            input_norm: normalise the projection W X.
            dtype: dtype of the projection.
            param_dtype: float32 or float64.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for an impossible value.
        """
        for argument, value in [("channels", channels), ("state_dim", state_dim)]:
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        if discretization not in ("euler", "zoh"):
            raise ValueError(f"discretization must be 'euler' or 'zoh', got {discretization!r}.")
        self.state_dim = state_dim
        self.discretization = discretization
        self.input_norm = input_norm
        self.project = conv(channels, 3 * state_dim, 1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        # As in Mamba: A = -1, ..., -N, and steps between 0.001 and 0.1.
        self.A_log = SSMParam(jnp.log(jnp.arange(1, state_dim + 1, dtype=param_dtype)))
        dt = jnp.exp(jax.random.uniform(rngs.params(), (state_dim,), param_dtype, math.log(1e-3), math.log(1e-1)))
        self.dt_bias = SSMParam(dt + jnp.log(-jnp.expm1(-dt)))  # softplus^-1

    def cell(self, *, rngs: nnx.Rngs, **dtypes: Any) -> nnx.Module | None:
        """What a block has of its own."""
        return BatchNorm(3 * self.state_dim, affine=False, **dtypes, rngs=rngs) if self.input_norm else None

    def start(self, x: Float[Array, "b h w c"], h: Float[Array, "b h w n"] | None) -> Float[Array, "b h w n"]:
        """The state before a stage whose input is `x`: that of the stage before, or zero."""
        return jnp.zeros((*x.shape[:-1], self.state_dim), jnp.float32) if h is None else h

    def read(self, x: Float[Array, "b h w c"], h: Float[Array, "b h w n"]) -> Float[Array, "b h w m"]:
        """The input of a branch."""
        return jnp.concatenate([x, h.astype(x.dtype)], axis=-1)

    def write(
        self, cell: nnx.Module | None, x: Float[Array, "b h w c"], h: Float[Array, "b h2 w2 n"]
    ) -> Float[Array, "b h w n"]:
        """The state after a block with output `x`."""
        a, b = self.coefficients(cell, x)
        return a * halved(h, x.shape[1:3]) + b

    def coefficients(self, cell: Any, x: Float[Array, "b h w c"]) -> tuple[Array, Array]:
        """The factor a and the term b of h' = a h + b, in float32."""
        y = self.project(x)
        y = y if cell is None else cell(y)
        d, B, u = jnp.split(y.astype(jnp.float32), 3, axis=-1)
        delta = jax.nn.softplus(d + self.dt_bias[...][None, None, None])
        A = -jnp.exp(self.A_log[...])[None, None, None]
        a, gain = selective_discretize(delta, A, self.discretization)
        return a, gain * B * u


def halved(h: Float[Array, "b h w n"], size: tuple[int, ...]) -> Float[Array, "b h2 w2 n"]:
    """`h` at the `size` of a map: itself, or its means over 2 x 2 positions, at an odd end over those there are."""
    if h.shape[1:3] == tuple(size):
        return h
    h = jnp.pad(h, ((0, 0), (0, h.shape[1] % 2), (0, h.shape[2] % 2), (0, 0)), mode="edge")
    b, rows, columns, n = h.shape
    return h.reshape(b, rows // 2, 2, columns // 2, 2, n).mean((2, 4))
