"""S4ND: state space layers over any number of axes (Nguyen et al., NeurIPS 2022, arXiv:2210.06583)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.linear import linear
from ssm_jax.ops.conv import fft_conv
from ssm_jax.ops.kernel import bandlimit_mask, s4d_kernel
from ssm_jax.ops.state_matrices import state_matrices
from ssm_jax.ops.transforms import inverse_clamped, transform


class SSMParam(nnx.Param):
    """A parameter of the dynamics: dt, A or B.

    These want a small learning rate of their own and no weight decay (S4, arXiv:2111.00396, appendix D), which
    `ssm_jax.training.optimizer` gives to whatever has this type.
    """


class S4DKernel(nnx.Module):
    """The convolution kernels of one axis: a diagonal state space model per head, sampled at step `dt`.

    Both directions and all channels share the dynamics (dt, A, B); each has its own read-out C. Parameters are real:
    complex ones have a leading axis of 2, (real, imaginary).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        channels: int = 1,
        bidirectional: bool = True,
        n_ssm: int = 1,
        init: str = "legs",
        dt_min: float = 0.1,
        dt_max: float = 1.0,
        dt_tie: bool = True,
        discretization: str = "zoh",
        bandlimit: float | None = None,
        dt_transform: str = "exp",
        real_transform: str = "exp",
        imag_transform: str = "none",
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the parameters.

        Args:
            d_model: number of heads (feature channels), H.
            d_state: real state size N, even; N/2 complex modes are stored.
            channels: read-outs per head.
            bidirectional: also have kernels for negative lags.
            n_ssm: independent sets of (A, B), a divisor of `d_model`; head h uses set h mod n_ssm.
            init: name of the initial A and B, see `ssm_jax.ops.state_matrices`.
            dt_min: smallest initial step; steps are drawn log-uniform.
            dt_max: largest initial step. The defaults are the paper's for images; for sequences it has 0.001 to 0.1.
            dt_tie: one step per head; otherwise one per head and mode.
            discretization: `zoh` or `bilinear`.
            bandlimit: drop modes at or above this fraction of the Nyquist frequency of the rate-1 grid; None or
                infinity keeps all.
            dt_transform: map from the parameter to dt, a name in `ssm_jax.ops.transforms.TRANSFORMS`.
            real_transform: likewise to -Re A.
            imag_transform: likewise to -Im A.
            param_dtype: float32 or float64.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for a value outside what is said above.
        """
        if d_model < 1 or n_ssm < 1 or d_model % n_ssm:
            raise ValueError(f"n_ssm must be a divisor of d_model: got n_ssm={n_ssm}, d_model={d_model}.")
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}.")
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(f"0 < dt_min <= dt_max is needed, got dt_min={dt_min}, dt_max={dt_max}.")
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f"discretization must be 'zoh' or 'bilinear', got {discretization!r}.")
        if bandlimit is not None and not bandlimit > 0:
            raise ValueError(f"bandlimit must be positive, or None or inf to keep all modes, got {bandlimit}.")
        if not jnp.issubdtype(param_dtype, jnp.floating) or jnp.finfo(param_dtype).bits < 32:
            raise ValueError(f"param_dtype of a state space must be float32 or float64, got {jnp.dtype(param_dtype)}.")
        self.discretization = discretization
        self.bandlimit = bandlimit
        self._dt = transform("dt_transform", dt_transform)
        self._real = transform("real_transform", real_transform)
        self._imag = transform("imag_transform", imag_transform)

        start = state_matrices(init, d_state, n_ssm=n_ssm, key=rngs.params())
        A, B = jnp.asarray(start.A), jnp.asarray(start.B)
        n_modes = d_state // 2
        log_dt = jax.random.uniform(
            rngs.params(), (d_model, 1 if dt_tie else n_modes), param_dtype, math.log(dt_min), math.log(dt_max)
        )
        self.inv_dt = SSMParam(inverse_clamped(self._dt, jnp.exp(log_dt)))
        self.A_real = SSMParam(inverse_clamped(self._real, -A.real).astype(param_dtype))
        self.A_imag = SSMParam(inverse_clamped(self._imag, -A.imag).astype(param_dtype))
        self.B = SSMParam(jnp.stack([B.real, B.imag]).astype(param_dtype))
        shape = (2, 2 if bidirectional else 1, channels, d_model, n_modes)
        self.C = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * math.sqrt(0.5))

    def __call__(self, length: int, *, rate: float = 1.0) -> Float[Array, "directions channels d_model {length}"]:
        """Samples the kernels at lags 0 .. length-1 of a grid that is `rate` times as coarse as the base grid.

        The second direction's first sample belongs to lag -1, see `ssm_jax.ops.fft_conv`.
        """
        repeats = self.inv_dt.shape[0] // self.A_real.shape[0]
        per_head = (lambda x: jnp.tile(x, (repeats, 1))) if self.A_real.shape[0] > 1 else (lambda x: x)
        A = per_head(jax.lax.complex(-self._real.forward(self.A_real[...]), -self._imag.forward(self.A_imag[...])))
        B = per_head(jax.lax.complex(self.B[0], self.B[1]))
        C = jax.lax.complex(self.C[0], self.C[1])
        dt = self._dt.forward(self.inv_dt[...])
        if self.bandlimit is not None:
            C = jnp.where(bandlimit_mask(A, dt, self.bandlimit), C, 0)
        flat = s4d_kernel(A, B, C.reshape(-1, *C.shape[2:]), dt * rate, length, discretization=self.discretization)
        return flat.reshape(*C.shape[:3], length)


class S4ND(nnx.Module):
    """Mixes positions along any number of axes by convolution with state space kernels, channels last.

        y = conv(u, kappa_1 x ... x kappa_D) + D u                    (S4ND, section 3; one kernel per axis)
        out = GLU(W dropout(GELU(y)) + b)                             (unless `linear`)

    The kernels are continuous functions sampled at step `dt * rate`: a layer trained on one grid is used on a
    coarser or finer one by passing its `rate`. Parameters, kernels and FFTs are float32 (or float64) whatever `dtype`.

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
        l_max: int | Sequence[int] | None = None,
        channels: int = 1,
        linear_output: bool = False,
        dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **kernel,
    ):
        """Builds one kernel per axis and the output map.

        Args:
            d_model: feature channels in and out.
            dims: number of axes that are convolved over.
            l_max: longest kernel at rate 1, for all axes or for each; None: as long as the input.
            channels: kernels per feature; the output map mixes all `channels * d_model` of them.
            linear_output: return the convolution itself, (..., channels * d_model), without GELU and GLU.
            dropout: rate of dropout before the output map; a feature is dropped at all positions together.
            dtype: dtype of the output and of the output map; None: that of the input and parameters.
            param_dtype: float32 or float64.
            rngs: source of the `params` stream.
            **kernel: `d_state`, `init`, `dt_min`, `dt_max`, `bandlimit`, ...: see `S4DKernel`.

        Raises:
            ValueError: for an impossible value, naming the argument.
        """
        if dims < 1:
            raise ValueError(f"dims must be at least 1, got {dims}.")
        self.l_max = (l_max,) * dims if l_max is None or isinstance(l_max, int) else tuple(l_max)
        if len(self.l_max) != dims or any(length is not None and length < 1 for length in self.l_max):
            raise ValueError(f"l_max must be positive, one for each of the {dims} axes, got {l_max}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        self.d_model = d_model
        self.dtype = dtype
        self.kernels = nnx.List(
            S4DKernel(d_model, channels=channels, param_dtype=param_dtype, rngs=rngs, **kernel) for _ in range(dims)
        )
        self.D = nnx.Param(jax.random.normal(rngs.params(), (channels, d_model), param_dtype))
        self.dropout = nnx.Dropout(dropout, broadcast_dims=tuple(range(1, dims + 1)))
        if linear_output:
            self.output = None
        else:
            self.output = linear(channels * d_model, 2 * d_model, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def sample_kernels(
        self, lengths: Sequence[int], *, rate: float | Sequence[float] = 1.0
    ) -> list[Float[Array, "directions channels d_model _"]]:
        """The kernel of each axis, as it is convolved with an input of `lengths` positions."""
        rates = (rate,) * len(self.kernels) if isinstance(rate, int | float) else tuple(rate)
        if len(rates) != len(self.kernels) or not all(0 < r < math.inf for r in rates):
            raise ValueError(
                f"rate must be positive, one number or one for each of {len(self.kernels)} axes, got {rate}."
            )
        return [
            kernel(length if l_max is None else min(length, round(l_max / r)), rate=r)
            for kernel, length, l_max, r in zip(self.kernels, lengths, self.l_max, rates, strict=True)
        ]

    def __call__(
        self,
        u: Float[Array, "batch *axes d_model"],
        *,
        rate: float | Sequence[float] = 1.0,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch *axes features"]:
        """Applies the layer.

        Args:
            u: input, batch first and features last, any sizes between; float32 arithmetic for half precision.
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
        with jax.numpy_dtype_promotion("standard"):
            x = u.astype(jnp.promote_types(u.dtype, jnp.float32))
        y = fft_conv(x, self.sample_kernels(u.shape[1:-1], rate=rate))
        y = y + jnp.expand_dims(self.D[...], range(u.ndim - 1)) * x[..., None, :]
        y = y.reshape(*u.shape[:-1], -1).astype(self.dtype or u.dtype)
        if self.output is None:
            return y
        y = self.dropout(nnx.gelu(y, approximate=False), rngs=rngs)
        value, gate = jnp.split(self.output(y), 2, axis=-1)
        return value * nnx.sigmoid(gate)
