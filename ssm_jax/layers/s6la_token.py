"""S6LA for transformers and ConvNeXt: a state for every image, read by all of its positions (arXiv:2502.10463).

See s6la.py for the form for residual networks, and for how sure both are.
"""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, Stage
from ssm_jax.layers.drop_path import DropPath
from ssm_jax.layers.linear import normal_init
from ssm_jax.layers.s6la import CHOICES, Decay, check_arguments
from ssm_jax.layers.ssm_kernel import SSMParam
from ssm_jax.ops.dtypes import at_least_float32
from ssm_jax.ops.scan import selective_discretize, selective_step


class TokenDynamics(nnx.Module):
    """What a block has for itself, or a stage's blocks share: maps from the selecting token, A, and the read-out."""

    def __init__(
        self,
        d_model: int,
        state_dim: int,
        *,
        selective: str,
        a_init: str,
        train_a: bool,
        zero_init: bool,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Builds the parameters; Delta goes through ceil(d_model / 16) features."""
        exact: Any = {"use_bias": False, "dtype": at_least_float32(param_dtype), "param_dtype": param_dtype}
        rank = -(-d_model // 16)
        by_delta, by_b = (selective in (part, "both") for part in ("delta", "b"))
        self.delta1 = nnx.Linear(d_model, rank, **exact, rngs=rngs) if by_delta else None
        self.delta2 = nnx.Linear(rank, d_model, **exact, rngs=rngs) if by_delta else None
        self.decay = Decay(
            (d_model, state_dim), d_delta=d_model, a_init=a_init, train_a=train_a, param_dtype=param_dtype, rngs=rngs
        )
        self.to_b = nnx.Linear(d_model, state_dim, **exact, rngs=rngs) if by_b else None
        self.B = None if by_b else SSMParam(jnp.ones((state_dim,), param_dtype))
        init = nnx.initializers.zeros if zero_init else normal_init
        self.output = nnx.Linear(state_dim, d_model, kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def inputs(self, s: Float[Array, "b d"]) -> tuple[Float[Array, "b d"], Float[Array, "b n"]]:
        """Delta and B for the selecting features `s`, in float32."""
        d = None if self.delta1 is None or self.delta2 is None else self.delta2(self.delta1(s))
        delta = jnp.broadcast_to(self.decay.delta(d, s.ndim), s.shape)
        if self.to_b is not None:
            return delta, self.to_b(s)
        assert self.B is not None
        return delta, jnp.broadcast_to(self.B[...], (s.shape[0], self.B.shape[0]))


class TokenCell(nnx.Module):
    """What a block has for itself."""

    def __init__(self, dynamics: TokenDynamics | None):
        """Holds the dynamics, unless they are the stage's."""
        self.dynamics = dynamics
        self.drop_path = DropPath()


class S6LAToken(Aggregation):
    """S6LA after the blocks of a stage, with one state (channels D, `state_dim` N) for an image.

        s = LN(X_c), Delta = softplus(W_2 W_1 s + b), B = W_B s      of the class token, or of the mean position
        h'[d, n] = exp(Delta[d] A[d, n]) h[d, n] + Delta[d] B[n] s[d]
        X_p + W_o (LN(X_p) h' / sqrt(D))                             every position reads; the class token does not

    X is the output of a block; LN has no parameters. Written out, X_p h' is linear attention of the positions to the
    class tokens of all layers so far, which decays with the layers between. As W_o starts at zero, a network starts as
    the one without. Presets are named as those of `S6LAConv`.
    """

    presets: ClassVar = {
        "default": {},
        "literal": {"input_norm": False, "read_norm": False, "zero_init": False},
        "rla_like": {"state_source": "branch_out", "head_state": True},
    }

    def __init__(
        self,
        stage: Stage,
        *,
        state_dim: int = 16,
        discretization: str = "euler",
        selective: str = "both",
        train_a: bool = True,
        a_init: str = "s4d_real",
        share: str = "block",
        state_source: str = "block_out",
        fuse: str = "multiply",
        token: str | None = None,
        stage_state: str = "reset",
        head_state: bool = False,
        input_norm: bool = True,
        read_norm: bool = True,
        zero_init: bool = True,
        drop_path: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds what each block has for itself, or a stage's blocks share.

        Args:
            stage: blocks that keep the size of their map.
            state_dim: N.
            discretization: `euler` or `zoh`, see `ssm_jax.ops.selective_discretize`.
            selective: what depends on the input besides s: `both` Delta and B, `delta`, `b` or `none`; B is a parameter
                where it does not.
            train_a: whether A is trained.
            a_init: `s4d_real` (-1, ..., -N for each channel), `constant` (-1) or `random`.
            share: whether all parameters are those of a `block` or of the `stage`.
            state_source: take s from the block's output (`block_out`), or from what the block added to its input
                (`branch_out`).
            fuse: how positions read: `multiply`, as above; `add`, X_p + W_o (s h' / sqrt(D)), the same for all;
                `gate`, X_p 2 sigmoid(W_o (LN(X_p) h' / sqrt(D))).
            token: what s is of, the `class` token or the `mean` position; None: the class token if there is one.
            stage_state: the state at the start of a stage: zero (`reset`), or W_s h (`project`).
            head_state: let the classifier also see what it classifies read from the state, LN(x) h / sqrt(D).
            input_norm: the LN of s.
            read_norm: the LN of X_p, and 1 / sqrt(D).
            zero_init: start W_o at zero, otherwise N(0, 0.02^2).
            drop_path: rate at which a block's positions read nothing, by example.
            dtype: dtype of products with all positions.
            param_dtype: float32 or float64.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for an impossible value, and for the class token where there is none.
        """
        own = {"fuse": ("multiply", "add", "gate"), "token": ("class", "mean"), "stage_state": ("reset", "project")}
        check_arguments(
            state_dim,
            drop_path,
            CHOICES | own,
            discretization=discretization,
            selective=selective,
            a_init=a_init,
            share=share,
            state_source=state_source,
            fuse=fuse,
            token=token or "mean",
            stage_state=stage_state,
        )
        if token == "class" and not stage.prefix:
            raise ValueError("token must be 'mean' in a network without a class token, got 'class'.")
        if state_source == "branch_out" and any(hasattr(block, "residual") for block in stage.blocks):
            raise ValueError("state_source must be 'block_out' in a ResNet, got 'branch_out'; S6LAConv has both.")
        self.state_dim, self.channels, self.prefix = state_dim, stage.channels, stage.prefix
        self.discretization = discretization
        self.state_source = state_source
        self.fuse = fuse
        self.by_class = bool(stage.prefix) if token is None else token == "class"
        self.input_norm, self.read_norm = input_norm, read_norm
        self.drop_path = drop_path
        dynamics = functools.partial(
            TokenDynamics,
            stage.channels,
            state_dim,
            selective=selective,
            a_init=a_init,
            train_a=train_a,
            zero_init=zero_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.dynamics = dynamics() if share == "stage" else None
        self.cells = nnx.List(TokenCell(dynamics() if share == "block" else None) for _ in stage.blocks)
        exact: Any = {"use_bias": False, "dtype": at_least_float32(param_dtype), "param_dtype": param_dtype}
        carried = stage.previous if stage_state == "project" else None
        self.carry = None if carried is None else nnx.Linear(carried, stage.channels, **exact, rngs=rngs)
        self.head_channels = state_dim if head_state and stage.last else 0

    def start(self, x: Float[Array, "b *axes d"], h: Float[Array, "b c n"] | None) -> Float[Array, "b d n"]:
        """Zero, or the state after the stage before in this one's channels."""
        if self.carry is None or h is None:
            return jnp.zeros((x.shape[0], self.channels, self.state_dim), at_least_float32(x.dtype))
        return jnp.swapaxes(self.carry(jnp.swapaxes(h, 1, 2)), 1, 2)

    def __call__(
        self,
        block: Any,
        cell: Any,
        x: Float[Array, "b *axes d"],
        h: Float[Array, "b d n"],
        drop_path: float | Array,
        *,
        size: tuple[int, int] | None = None,
        rngs: nnx.Rngs | None = None,
        **arguments: Any,
    ) -> tuple[Float[Array, "b *axes d"], Float[Array, "b d n"]]:
        """One layer: the state takes in what the block returns, and its positions read the state."""
        del size
        y = block(x, drop_path, rngs=rngs, **arguments)
        s = self.select(y - x if self.state_source == "branch_out" else y)
        h = self.update(cell, s, h)
        return self._read(cell, y, s, h, rngs), h

    def select(self, x: Float[Array, "b *axes d"]) -> Float[Array, "b d"]:
        """s, in float32."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        precise = at_least_float32(x.dtype)
        s = tokens[:, 0].astype(precise) if self.by_class else tokens[:, self.prefix :].mean(1, dtype=precise)
        return normalize(s) if self.input_norm else s

    def update(self, cell: Any, s: Float[Array, "b d"], h: Float[Array, "b d n"]) -> Float[Array, "b d n"]:
        """The state h' after a block."""
        dynamics = self.dynamics or cell.dynamics
        delta, B = dynamics.inputs(s)
        return selective_step(h, s, delta, dynamics.decay.A, B, discretization=self.discretization)

    def coefficients(self, cell: Any, x: Float[Array, "b *axes d"]) -> tuple[Array, Array]:
        """The factor a and the term b, (b, d, n), of h' = a h + b after a block with the output `x`, in float32."""
        dynamics = self.dynamics or cell.dynamics
        s = self.select(x)
        delta, B = dynamics.inputs(s)
        a, gain = selective_discretize(delta[..., None], dynamics.decay.A[None], self.discretization)
        return a, gain * B[:, None] * s[..., None]

    def _read(self, cell: Any, x: Array, s: Array, h: Array, rngs: nnx.Rngs | None) -> Array:
        """`x` with what its positions read."""
        output = (self.dynamics or cell.dynamics).output
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.fuse == "add":
            read = output(self._scaled(jnp.einsum("bd,bdn->bn", s, h))[:, None].astype(x.dtype))
        else:
            seen = normalize(tokens) if self.read_norm else tokens
            read = output(jnp.einsum("btd,bdn->btn", seen, self._scaled(h).astype(x.dtype)))
        if self.fuse == "gate":
            read = tokens * (2 * jax.nn.sigmoid(read) - 1)
        if self.prefix:  # a mask is cheaper than to cut and join
            positions = np.arange(tokens.shape[1])[None, :, None] >= self.prefix
            read = jnp.where(positions, read, jnp.zeros_like(read))
        return (tokens + cell.drop_path(read, self.drop_path, rngs=rngs)).reshape(x.shape)

    def _scaled(self, x: Array) -> Array:
        return x * self.channels**-0.5 if self.read_norm else x

    def readout(self, x: Float[Array, "b d"], h: Float[Array, "b d n"]) -> Float[Array, "b m"]:
        """With `head_state`, x and what it reads."""
        if not self.head_channels:
            return x
        seen = (normalize(x) if self.read_norm else x).astype(h.dtype)
        read = self._scaled(jnp.einsum("bd,bdn->bn", seen, h))
        return jnp.concatenate([x, read.astype(x.dtype)], axis=-1)


def normalize(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """LN without parameters, computed in float32."""
    precise = x.astype(at_least_float32(x.dtype))
    # The default variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    return jax.nn.standardize(precise, variance=precise.var(-1, keepdims=True)).astype(x.dtype)
