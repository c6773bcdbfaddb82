"""S4ND: state space layers over any number of axes (Nguyen et al., NeurIPS 2022, arXiv:2210.06583)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.linear import linear
from ssm_jax.layers.ssm_kernel import DPLRKernel, S4DKernel
from ssm_jax.ops.conv import METHODS, conv

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
            dtype: dtype of the input after a cast, of matrix products, and of the output; None: the input's.
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
        if out_channels is not None and out_channels < 1:
            raise ValueError(f"out_channels must be at least 1, or None for d_model, got {out_channels}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        if mode not in _KERNELS:
            raise ValueError(f"mode must be {' or '.join(map(repr, _KERNELS))}, got {mode!r}.")
        if conv not in METHODS:
            raise ValueError(f"conv must be one of {', '.join(METHODS)}, got {conv!r}.")
        self.d_model = d_model
        self.dense = out_channels is not None
        self.conv = conv
        self.dtype = dtype
        options = {"channels": channels * (out_channels or 1), "param_dtype": param_dtype, "rngs": rngs, **kernel}
        self.kernels = nnx.List(
            _KERNELS[mode](d_model, **options, **({} if l_kernel is None else {"l_kernel": length or l_max or 0}))
            for length, l_max in zip(l_kernels, self.l_max, strict=True)
        )
        features = channels * (out_channels or d_model)
        if not self.dense:
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
        rates = (rate,) * len(self.kernels) if isinstance(rate, int | float) else tuple(rate)
        if len(rates) != len(self.kernels) or not all(0 < r < math.inf for r in rates):
            raise ValueError(
                f"rate must be positive, one number or one for each of {len(self.kernels)} axes, got {rate}."
            )
        return [
            kernel(length if l_max is None else min(length, max(1, round(l_max / r))), rate=r)
            for kernel, length, l_max, r in zip(self.kernels, lengths, self.l_max, rates, strict=True)
        ]

    def __call__(
        self,
        u: Float[Array, "batch *axes d_model"],
        *,
        rate: float | int | Sequence[float | int] = 1.0,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch *axes features"]:
        """Applies the layer.

        Args:
            u: input, batch first and features last, any sizes between. In half precision, matrix products take it as it
                is; spectra, and the sum with D u, are float32.
            rate: spacing of the grid relative to the one that dt refers to, = base resolution / this resolution;
                a number, or one per axis.
            rngs: source of the `dropout` stream, needed when training with dropout.

        Raises:
            ValueError: for a wrong number of axes or features, or an impossible rate.
        """
        if u.ndim != len(self.kernels) + 2 or u.shape[-1] != self.d_model or 0 in u.shape:
            raise ValueError(
                f"u must be (batch, {len(self.kernels)} axes, d_model={self.d_model}), not empty, got shape {u.shape}."
            )
        x = u.astype(self.dtype or u.dtype)
        D = None if self.dense else self.D[...]
        y = conv(x, self.sample_kernels(u.shape[1:-1], rate=rate), D, method=self.conv)
        if self.dense:
            y = y.reshape(*u.shape[:-1], -1, self.d_model).sum(-1)
        if self.output is None:
            return y
        y = self.dropout(nnx.gelu(y, approximate=False), rngs=rngs)
        value, gate = jnp.split(self.output(y), 2, axis=-1)
        return value * nnx.sigmoid(gate)


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
