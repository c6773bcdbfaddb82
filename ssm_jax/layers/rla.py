"""RLA: recurrent layer aggregation (Zhao et al., 2021, arXiv:2110.11852)."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, Stage, beside, halved, reader
from ssm_jax.layers.conv import conv
from ssm_jax.layers.norm import BatchNorm
from ssm_jax.ops.dtypes import at_least_float32


class RLACell(nnx.Module):
    """What a block has for itself: how it reads the state, and the normalisation of the state after it."""

    def __init__(self, read: nnx.Module, norm: BatchNorm):
        """Puts them together."""
        self.read = read
        self.norm = norm


class RLA(Aggregation):
    """A state of `state_dim` channels at every position, which convolutions carry from block to block.

        O = branch([X, h])                                 the shortcut takes X alone
        h' = W_h * tanh(BN(h + W_o O))                     W_o of 1 x 1, W_h of 3 x 3

    Both convolutions are those of the stage, BN is each block's. [X, h] is not formed: the first convolution of the
    branch is that of X plus that of h. Where a block halves the map, h is averaged over 2 x 2 positions before its
    update; it starts at zero and goes on from stage to stage. The classifier also sees the average of ReLU(BN(h)).

    Preset `published`: what the authors' code computes. It names O before the shortcut is added to it, and ReLU
    applied, both in place: the state is updated from the block's output.
    """

    presets: ClassVar = {"default": {}, "published": {"state_source": "block_out"}}

    def __init__(
        self,
        stage: Stage,
        *,
        state_dim: int = 32,
        state_source: str = "branch_out",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the convolutions of the stage, and what each block has for itself.

        Args:
            stage: the blocks, those of a ResNet.
            state_dim: channels of the state.
            state_source: update the state from what the block adds to the shortcut (`branch_out`), or from its output
                (`block_out`).
            dtype: dtype of convolutions.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for an impossible value, or other blocks.
        """
        if state_dim < 1:
            raise ValueError(f"state_dim must be at least 1, got {state_dim}.")
        if state_source not in ("branch_out", "block_out"):
            raise ValueError(f"state_source must be one of branch_out, block_out, got {state_source!r}.")
        if not all(hasattr(block, "residual") for block in stage.blocks):
            raise ValueError("RLA is for the blocks of a ResNet.")
        self.state_dim = state_dim
        self.state_source = state_source
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.out = conv(stage.channels, state_dim, 1, **dtypes, rngs=rngs)
        self.recurrent = conv(state_dim, state_dim, 3, **dtypes, rngs=rngs)
        self.cells = nnx.List(
            RLACell(reader(block, state_dim, **dtypes, rngs=rngs), BatchNorm(state_dim, **dtypes, rngs=rngs))
            for block in stage.blocks
        )
        self.head_norm = BatchNorm(state_dim, **dtypes, rngs=rngs) if stage.last else None
        self.head_channels = state_dim if stage.last else 0

    def start(self, x: Float[Array, "b h w c"], h: Float[Array, "b h w n"] | None) -> Float[Array, "b h w n"]:
        """The state after the stage before, or zero."""
        return jnp.zeros((*x.shape[:-1], self.state_dim), at_least_float32(x.dtype)) if h is None else h

    def __call__(
        self,
        block: Any,
        cell: Any,
        x: Float[Array, "b h w c"],
        h: Float[Array, "b h w n"],
        drop_path: float | Array,
        *,
        rngs: nnx.Rngs | None = None,
        **arguments: Any,
    ) -> tuple[Float[Array, "b h2 w2 d"], Float[Array, "b h2 w2 n"]]:
        """One layer: the block reads the state, and the state takes in what the block adds."""
        first = beside(block, cell.read, h.astype(x.dtype))
        y, branch = block.residual(x, drop_path, first=first, rngs=rngs, **arguments)
        return y, self.update(cell, y if self.state_source == "block_out" else branch, h)

    def update(self, cell: Any, x: Float[Array, "b h2 w2 d"], h: Float[Array, "b h w n"]) -> Float[Array, "b h2 w2 n"]:
        """The state after a block that adds `x`."""
        summed = halved(h, x.shape[1:3]) + self.out(x).astype(h.dtype)
        return self.recurrent(jnp.tanh(cell.norm(summed))).astype(h.dtype)

    def readout(self, x: Float[Array, "b c"], h: Float[Array, "b h w n"]) -> Float[Array, "b d"]:
        """After the last stage, x and the average of ReLU(BN(h))."""
        if self.head_norm is None:
            return x
        return jnp.concatenate([x, nnx.relu(self.head_norm(h)).mean((1, 2)).astype(x.dtype)], axis=-1)
