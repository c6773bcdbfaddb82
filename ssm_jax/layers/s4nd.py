"""S4ND: state space layers over any number of axes (Nguyen et al., NeurIPS 2022, arXiv:2210.06583)."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float, Num

from ssm_jax.layers.linear import linear
from ssm_jax.layers.ssm_kernel import DPLRKernel, S4DKernel
from ssm_jax.ops.conv import METHODS, conv
from ssm_jax.ops.recurrence import CHUNK, Recurrence, recurrent_scan, recurrent_step

_KERNELS = {"diag": S4DKernel, "dplr": DPLRKernel}


class S4ND(nnx.Module):
    """Mixes positions along any number of axes by convolution with state space kernels, channels last.

        y = conv(u, kappa_1 x ... x kappa_D) + D u                    (S4ND, section 3; one kernel per axis)
        out = GLU(W dropout(GELU(y)) + b)                             (unless `linear_output`)

    The kernels are continuous functions sampled at step `dt * rate`: a layer trained on one grid is used on a
    coarser or finer one by passing its `rate`. Parameters, kernels and spectra are float32 (or float64) whatever
    `dtype` is.

    ```python
    layer = S4ND(64, dims=2, rngs=nnx.Rngs(0))
    y = layer(jnp.ones((8, 32, 32, 64)))                  # (8, 32, 32, 64)
    y = layer(jnp.ones((8, 16, 16, 64)), rate=2.0)        # the same functions on a grid half as fine
    ```

    A layer over one axis and in one direction is also a recurrence, whose state `scan` and `step` carry on: over a
    sequence that comes in pieces, or position by position.

    ```python
    layer = S4ND(64, dims=1, bidirectional=False, rngs=nnx.Rngs(0))
    state, y = layer.scan(layer.initial_state(8), jnp.ones((8, 100, 64)))  # y: (8, 100, 64)
    state, y = layer.step(state, jnp.ones((8, 64)))                        # (8, 64): position 101
    ```
    """

    def __init__(
        self,
        d_model: int,
        *,
        dims: int = 2,
        mode: str = "diag",
        l_max: int | Sequence[int] | None = None,
        l_kernel: int | Sequence[int] | None = None,
        channels: int = 1,
        out_channels: int | None = None,
        linear_output: bool = False,
        dropout: float = 0.0,
        conv: str = "auto",
        per_axis: Sequence[Mapping[str, Any]] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **kernel,
    ):
        """Builds one kernel per axis and the output map.

        Args:
            d_model: feature channels in, and out but for `out_channels`.
            dims: number of axes that are convolved over.
            mode: kind of the kernels: `diag` (`S4DKernel`) or `dplr` (`DPLRKernel`).
            l_max: longest kernel at rate 1, for all axes or for each; None: as long as the input.
            l_kernel: for `dplr`, as released, with kernels that depend on it at other rates than 1: see `DPLRKernel`.
            channels: kernels per feature; the output map mixes all `channels * d_model` of them.
            out_channels: sum over the features of each of so many kernels per feature: a dense convolution, without
                the term D u, as the stem of a network.
            linear_output: return the convolution itself, (..., channels * features), without GELU and GLU.
            dropout: rate of dropout before the output map; a feature is dropped at all positions together.
            conv: how to convolve, a method of `ssm_jax.ops.conv`; they agree to rounding.
            per_axis: for each axis, those options of its kernels that are not those of `**kernel`.
            dtype: dtype of the input after a cast, of matrix products, and of the output; None: the input's, which the
                output map promotes to `param_dtype`.
            param_dtype: float32 or float64.
            rngs: source of the `params` stream.
            **kernel: `d_state`, `init`, `dt_min`, `dt_max`, `bandlimit`, ...: see `S4DKernel` and `DPLRKernel`.

        Raises:
            ValueError: for an impossible value, naming the argument.
        """
        if dims < 1:
            raise ValueError(f"dims must be at least 1, got {dims}.")
        self.l_max = _per_axis("l_max", l_max, dims, least=1)
        l_kernels = _per_axis("l_kernel", l_kernel, dims, least=0)
        if per_axis is not None and len(per_axis) != dims:
            raise ValueError(f"per_axis must have options for each of {dims} axes, got {len(per_axis)}.")
        if out_channels is not None and out_channels < 1:
            raise ValueError(f"out_channels must be at least 1, or None for d_model, got {out_channels}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        if mode not in _KERNELS:
            raise ValueError(f"mode must be {' or '.join(map(repr, _KERNELS))}, got {mode!r}.")
        if conv not in METHODS:
            raise ValueError(f"conv must be one of {', '.join(METHODS)}, got {conv!r}.")
        self.d_model = d_model
        self.out_channels = out_channels
        self.conv = conv
        self.dtype = dtype
        options = {"channels": channels * (out_channels or 1), "param_dtype": param_dtype, "rngs": rngs, **kernel}
        self.kernels = nnx.List(
            _KERNELS[mode](
                d_model, **options | dict(own), **({} if l_kernel is None else {"l_kernel": length or l_max or 0})
            )
            for length, l_max, own in zip(l_kernels, self.l_max, per_axis or ({},) * dims, strict=True)
        )
        features = channels * (out_channels or d_model)
        if out_channels is None:
            self.D = nnx.Param(jax.random.normal(rngs.params(), (channels, d_model), param_dtype))
        self.dropout = nnx.Dropout(dropout, broadcast_dims=tuple(range(1, dims + 1)))
        if linear_output:
            self.output = None
        else:
            self.output = linear(
                features, 2 * (out_channels or d_model), dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

    def sample_kernels(
        self, lengths: Sequence[int], *, rate: float | int | Sequence[float | int] = 1.0
    ) -> list[Float[Array, "directions trank channels d_model _"]]:
        """The kernel of each axis, as it is convolved with an input of `lengths` positions."""
        return [
            kernel(length if l_max is None else min(length, max(1, round(l_max / r))), rate=r)
            for kernel, length, l_max, r in zip(self.kernels, lengths, self.l_max, self._rates(rate), strict=True)
        ]

    def __call__(
        self,
        u: Num[Array, "batch *axes d_model"],
        *,
        rate: float | int | Sequence[float | int] = 1.0,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch *axes features"]:
        """Applies the layer.

        Args:
            u: input, batch first and features last, any sizes between. In half precision, matrix products take it as it
                is; spectra, and the sum with D u, are float32.
            rate: spacing of the grid relative to the one that dt refers to, = base resolution / this resolution;
                a number, or one per axis. Under `jax.jit` it is static, as lengths are.
            rngs: source of the `dropout` stream, needed when training with dropout.

        Raises:
            TypeError: for a rate that is traced: the length of kernels depends on it.
            ValueError: for a wrong number of axes or features, integers, or an impossible rate.
        """
        x = self._input(u, len(self.kernels))
        y = conv(x, self.sample_kernels(u.shape[1:-1], rate=rate), self._skip(), method=self.conv)
        return self._mixed(y, rngs=rngs)

    def initial_state(self, batch: int) -> Complex[Array, "{batch} d_model n"]:
        """The state of `batch` sequences before their first position, zero: see `step`."""
        B = jax.eval_shape(lambda: self._recurrence(1.0)).B
        return jnp.zeros((batch, *B.shape), B.dtype)

    def step(
        self, state: Complex[Array, "batch d_model n"], u: Float[Array, "batch d_model"], *, rate: float | int = 1.0
    ) -> tuple[Complex[Array, "batch d_model n"], Float[Array, "batch features"]]:
        """Applies the layer to the next position of each sequence: the state after it, and its output.

        That is what calling the layer on the whole sequences gives there, at any number of positions up to `l_max`:
        the convolution's kernel ends then, and the state goes on. Dropout is left out, also in training mode.

        Each call discretises anew. In a `jax.lax.scan` over positions, XLA does that once before the loop.

        Args:
            state: that after the previous position, or `initial_state`; complex64, or complex128 for float64
                parameters, whatever the dtype of `u`.
            u: input.
            rate: as for `__call__`, the same at all positions.

        Raises:
            TypeError: for a rate that is traced, as `__call__` has it.
            ValueError: for a layer over several axes or in both directions, or with kernels that depend on their
                length (see `DPLRKernel.recurrence`); for a wrong `state`, `u` or `rate`.
        """
        return self._advance(recurrent_step, state, self._input(u, 0), rate)

    def scan(
        self,
        state: Complex[Array, "batch d_model n"],
        u: Float[Array, "batch length d_model"],
        *,
        rate: float | int = 1.0,
        chunk: int = CHUNK,
    ) -> tuple[Complex[Array, "batch d_model n"], Float[Array, "batch length features"]]:
        """Applies the layer to the next `length` positions: the state after them, and their outputs.

        As `step`, but by matrix products for `chunk` positions at a time, see `ssm_jax.ops.recurrent_scan`: on CPU in
        about the time of the convolution.
        """
        return self._advance(functools.partial(recurrent_scan, chunk=chunk), state, self._input(u, 1), rate)

    def _input(self, u: Array, axes: int) -> Array:
        """`u` in the dtype of the layer, if it has so many axes between batch and features."""
        if u.ndim != axes + 2 or u.shape[-1] != self.d_model or 0 in u.shape:
            raise ValueError(f"u must be (batch, {axes} axes, d_model={self.d_model}), not empty, got shape {u.shape}.")
        if not jnp.issubdtype(u.dtype, jnp.floating):
            raise ValueError(f"u must be floating-point, got {u.dtype}; for images: u.astype(jnp.float32) / 255.")
        return u.astype(self.dtype or u.dtype)

    def _rates(self, rate: float | int | Sequence[float | int]) -> tuple[float | int, ...]:
        """The rate of each axis."""
        rates = tuple(rate) if isinstance(rate, Sequence) else (rate,) * len(self.kernels)
        if any(isinstance(r, jax.core.Tracer) for r in rates):
            raise TypeError(
                "rate must be known when a function is compiled, got a traced value: give it as jax.jit(..., "
                "static_argnames='rate'), or close over it."
            )
        if len(rates) != len(self.kernels) or not all(0 < r < math.inf for r in rates):
            raise ValueError(
                f"rate must be positive, one number or one for each of {len(self.kernels)} axes, got {rate}."
            )
        return rates

    def _skip(self) -> Array | None:
        return self.D[...] if self.out_channels is None else None

    def _mixed(self, y: Array, **dropout) -> Array:
        """What the layer makes of its convolution."""
        if self.out_channels is not None:
            y = y.reshape(*y.shape[:-1], -1, self.d_model).sum(-1)
        if self.output is None:
            return y
        y = self.dropout(nnx.gelu(y, approximate=False), **dropout)
        value, gate = jnp.split(self.output(y), 2, axis=-1)
        return value * nnx.sigmoid(gate)

    def _recurrence(self, rate: float | int) -> Recurrence:
        if len(self.kernels) != 1:
            raise ValueError(f"dims must be 1 for a layer to be a recurrence, got {len(self.kernels)}.")
        return self.kernels[0].recurrence(rate=self._rates(rate)[0])._replace(D=self._skip())

    def _advance(
        self, advance: Callable[..., tuple[Array, Array]], state: Array, x: Array, rate: float | int
    ) -> tuple[Array, Array]:
        """The state after inputs `x` and the outputs of the layer."""
        system = self._recurrence(rate)
        expected = (len(x), *system.B.shape)
        if state.shape != expected or state.dtype != system.B.dtype:
            raise ValueError(
                f"state must be (batch, d_model, d_state / 2) = {expected}, {system.B.dtype}, as from initial_state, "
                f"got {state.shape}, {state.dtype}."
            )
        state, y = advance(system, state, x)
        return state, self._mixed(y.astype(x.dtype), deterministic=True)


def _per_axis(
    argument: str, lengths: int | Sequence[int | None] | None, dims: int, *, least: int
) -> tuple[int | None, ...]:
    """One length for each axis, None where there is none, from one for all or one for each."""
    each = (lengths,) * dims if lengths is None or isinstance(lengths, int) else tuple(lengths)
    if len(each) != dims or any(length is not None and length < least for length in each):
        raise ValueError(
            f"{argument} must be at least {least}, one number or one for each of {dims} axes, got {lengths}."
        )
    return each
