"""S6LA: the layers of a network as time steps of a selective state space model (arXiv:2502.10463).

An independent implementation: the authors' code is not public, and where the paper could not be read the choice is ours
and an argument here. `S6LAConv` is the form for residual networks, with a state at every position; s6la_token.py has
the one for transformers and ConvNeXt, with a state for every image.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, Stage, beside, halved, reader
from ssm_jax.layers.conv import conv
from ssm_jax.layers.drop_path import DropPath
from ssm_jax.layers.norm import BatchNorm
from ssm_jax.layers.ssm_kernel import SSMParam
from ssm_jax.ops.dtypes import at_least_float32
from ssm_jax.ops.scan import selective_discretize

CHOICES = {
    "discretization": ("euler", "zoh"),
    "selective": ("both", "delta", "b", "none"),
    "a_init": ("s4d_real", "constant", "random"),
    "share": ("stage", "block"),
    "state_source": ("block_out", "branch_out"),
}
"""Values of the arguments that both forms have."""


def check_arguments(state_dim: int, drop_path: float, choices: Mapping[str, tuple[str, ...]], **chosen: str) -> None:
    """Raises ValueError for an impossible argument; `chosen` are values that must be among their `choices`."""
    if not isinstance(state_dim, int) or isinstance(state_dim, bool) or state_dim < 1:
        raise ValueError(f"state_dim must be a whole number of at least 1, got {state_dim!r}.")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must be in [0, 1), got {drop_path}.")
    for argument, value in chosen.items():
        if value not in choices[argument]:
            why = " (stages are of different widths)" if argument == "share" else ""
            raise ValueError(f"{argument} must be one of {', '.join(choices[argument])}{why}, got {value!r}.")


class Decay(nnx.Module):
    """A = -exp(A_log) < 0 and the bias of Delta = softplus(d + bias), as Mamba starts them."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        d_delta: int,
        a_init: str,
        train_a: bool,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Builds A of this `shape`, whose last axis is the state's, and `d_delta` biases.

        A starts, along the last axis, as -1, ..., -N (`s4d_real`), as -1 (`constant`), or with -A log-uniform between 1
        and N (`random`); Delta log-uniform between 0.001 and 0.1.
        """
        n = shape[-1]
        logarithms = {
            "s4d_real": lambda: jnp.broadcast_to(jnp.log(jnp.arange(1, n + 1, dtype=param_dtype)), shape),
            "constant": lambda: jnp.zeros(shape, param_dtype),
            "random": lambda: jax.random.uniform(rngs.params(), shape, param_dtype, 0.0, math.log(n)),
        }
        self.A_log = SSMParam(logarithms[a_init]())
        self.train_a = train_a
        dt = jnp.exp(jax.random.uniform(rngs.params(), (d_delta,), param_dtype, math.log(1e-3), math.log(1e-1)))
        self.dt_bias = SSMParam(dt + jnp.log(-jnp.expm1(-dt)))  # softplus^-1

    @property
    def A(self) -> Float[Array, "*shape"]:
        """A."""
        A_log = self.A_log[...]
        return -jnp.exp(A_log if self.train_a else jax.lax.stop_gradient(A_log))

    def delta(self, d: Float[Array, "*batch m"] | None, ndim: int) -> Float[Array, "*batch m"]:
        """Delta for `d`, the part that depends on the input, or without one; of `ndim` axes."""
        bias = self.dt_bias[...][(None,) * (ndim - 1)]
        return jax.nn.softplus(bias if d is None else d + bias)


class ConvDynamics(nnx.Module):
    """What the blocks of a stage share, or each has for itself: the projection [W_d; W_B; W_u], A and b."""

    def __init__(
        self,
        channels: int,
        state_dim: int,
        *,
        selective: str,
        a_init: str,
        train_a: bool,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """Builds the parameters."""
        self.parts = [part for part in ("delta", "b") if selective in (part, "both")] + ["u"]
        width = len(self.parts) * state_dim
        self.project = conv(channels, width, 1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.decay = Decay(
            (state_dim,), d_delta=state_dim, a_init=a_init, train_a=train_a, param_dtype=param_dtype, rngs=rngs
        )
        self.B = None if "b" in self.parts else SSMParam(jnp.ones((state_dim,), param_dtype))


class ConvCell(nnx.Module):
    """What a block has for itself: how it reads the state, and the statistics of the projection."""

    def __init__(self, read: nnx.Module, norm: BatchNorm | None, dynamics: ConvDynamics | None):
        """Puts them together."""
        self.read = read
        self.norm = norm
        self.dynamics = dynamics
        self.drop_path = DropPath()


class S6LAConv(Aggregation):
    """S6LA between the residual blocks of a stage, with a state of `state_dim` channels at every position.

        z = [X, h]                                         the input of a block's branch; its shortcut takes X alone
        [d, B, u] = BN(W X'), Delta = softplus(d + b)      of the block's output X'
        h' = exp(Delta A) h + Delta B u                    elementwise, in float32

    W, A and b are those of the stage, the statistics of BN (which has no parameters) each block's. z is not formed: the
    first convolution of the branch is that of X plus that of h. Where a block halves the map, h is averaged over 2 x 2
    positions before its update; from stage to stage it goes on.

    Presets: `literal`, the equations without what keeps the state small; `rla_like`, with RLA's choices.
    """

    presets: ClassVar = {
        "default": {},
        "literal": {"input_norm": False},
        "rla_like": {"state_source": "branch_out", "head_state": True},
    }

    def __init__(
        self,
        stage: Stage,
        *,
        state_dim: int = 32,
        discretization: str = "euler",
        selective: str = "both",
        train_a: bool = True,
        a_init: str = "s4d_real",
        share: str = "stage",
        state_source: str = "block_out",
        fuse: str = "concat",
        head_state: bool = False,
        input_norm: bool = True,
        drop_path: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds what the blocks of a stage share, and what each has for itself.

        Args:
            stage: the blocks, those of a ResNet.
            state_dim: channels of the state, N.
            discretization: `euler` or `zoh`, see `ssm_jax.ops.selective_discretize`.
            selective: what depends on the input besides u: `both` Delta and B, `delta`, `b` or `none`; B is a parameter
                where it does not.
            train_a: whether A is trained.
            a_init: `s4d_real` (-1, ..., -N), `constant` (-1) or `random`.
            share: whether W, A and b are those of the `stage` or of a `block`.
            state_source: update the state from X' (`block_out`) or from what the block adds to the shortcut
                (`branch_out`), as RLA does.
            fuse: how a branch reads the state: `concat`, as above, or `add`, z = X + W_h h.
            head_state: let the classifier also see the average of ReLU(BN(h)), as in RLA.
            input_norm: normalise the projection W X'.
            drop_path: rate at which a block reads a state of zeros instead, by example.
            dtype: dtype of products.
            param_dtype: float32 or float64.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for an impossible value, or other blocks.
        """
        check_arguments(
            state_dim,
            drop_path,
            CHOICES | {"fuse": ("concat", "add")},
            discretization=discretization,
            selective=selective,
            a_init=a_init,
            share=share,
            state_source=state_source,
            fuse=fuse,
        )
        if not all(hasattr(block, "residual") for block in stage.blocks):
            raise ValueError(
                "S6LAConv is for the blocks of a ResNet, which have a `residual`; S6LAToken is for all others."
            )
        self.state_dim = state_dim
        self.discretization = discretization
        self.state_source = state_source
        self.fuse = fuse
        self.drop_path = drop_path
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        dynamics = functools.partial(
            ConvDynamics,
            stage.channels,
            state_dim,
            selective=selective,
            a_init=a_init,
            train_a=train_a,
            **dtypes,
            rngs=rngs,
        )
        self.dynamics = dynamics() if share == "stage" else None
        self.cells = nnx.List()
        exact = at_least_float32(param_dtype)
        for block in stage.blocks:
            own = dynamics() if share == "block" else None
            parts = (own or self.dynamics).parts  # pyright: ignore[reportOptionalMemberAccess]
            statistics = BatchNorm(len(parts) * state_dim, affine=False, dtype=exact, rngs=rngs) if input_norm else None
            self.cells.append(ConvCell(self._reader(block, dtypes, rngs), statistics, own))
        self.head_norm = BatchNorm(state_dim, **dtypes, rngs=rngs) if head_state and stage.last else None
        self.head_channels = state_dim if self.head_norm is not None else 0

    def _reader(self, block: Any, dtypes: Mapping[str, Any], rngs: nnx.Rngs) -> nnx.Module:
        """The convolution of h: a part of the block's first one, or, to `add`, one to the channels of its input."""
        if self.fuse == "add":
            return conv(self.state_dim, block.conv1.in_features, 1, **dtypes, rngs=rngs)
        return reader(block, self.state_dim, **dtypes, rngs=rngs)

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
        """One layer: the block reads the state, and the state takes in what the block returns."""
        seen = cell.drop_path(h, self.drop_path, rngs=rngs).astype(x.dtype)
        if self.fuse == "add":
            read = cell.read(seen)
            first = lambda x: block.conv1(x + read)  # noqa: E731
        else:
            first = beside(block, cell.read, seen)
        y, branch = block.residual(x, drop_path, first=first, rngs=rngs, **arguments)
        a, b = self.coefficients(cell, branch if self.state_source == "branch_out" else y)
        return y, a * halved(h, y.shape[1:3]) + b

    def coefficients(self, cell: Any, x: Float[Array, "b h w c"]) -> tuple[Array, Array]:
        """The factor a and the term b of h' = a h + b after a block with the output `x`, in float32."""
        dynamics = self.dynamics or cell.dynamics
        y = dynamics.project(x)
        y = y if cell.norm is None else cell.norm(y)
        y = y.astype(at_least_float32(y.dtype))
        parts = dict(zip(dynamics.parts, jnp.split(y, len(dynamics.parts), axis=-1), strict=True))
        delta = dynamics.decay.delta(parts.get("delta"), y.ndim)
        B = parts["b"] if dynamics.B is None else dynamics.B[...][None, None, None]
        a, gain = selective_discretize(delta, dynamics.decay.A[None, None, None], self.discretization)
        b = gain * B * parts["u"]
        return jnp.broadcast_to(a, b.shape), b

    def readout(self, x: Float[Array, "b c"], h: Float[Array, "b h w n"]) -> Float[Array, "b d"]:
        """With `head_state`, x and the average of the normalised state."""
        if self.head_norm is None:
            return x
        return jnp.concatenate([x, nnx.relu(self.head_norm(h)).mean((1, 2)).astype(x.dtype)], axis=-1)
