"""The 1-D kernels whose outer product S4ND convolves with: diagonal (S4D) and diagonal plus low-rank (S4, DPLR)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Complex, Float

from ssm_jax.ops.dplr import dplr_kernel, truncate
from ssm_jax.ops.kernel import bandlimit_mask, s4d_kernel
from ssm_jax.ops.recurrence import Recurrence, dplr_recurrence, s4d_recurrence
from ssm_jax.ops.state_matrices import state_matrices
from ssm_jax.ops.transforms import inverse_clamped, transform


class SSMParam(nnx.Param):
    """A parameter of the dynamics: dt, A, B or P.

    These want a small learning rate of their own and no weight decay (S4, arXiv:2111.00396, appendix D), which
    `ssm_jax.training.optimizer` gives to whatever has this type.
    """


class S4DKernel(nnx.Module):
    """The convolution kernels of one axis: a diagonal state space model per head, sampled at step `dt`.

    All directions, ranks and channels share the dynamics (dt, A, B); each has its own read-out C. Parameters are
    real: complex ones have a leading axis of 2, (real, imaginary).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        channels: int = 1,
        trank: int = 1,
        bidirectional: bool = True,
        n_ssm: int | None = 1,
        init: str = "legs",
        init_options: Mapping[str, Any] | None = None,
        dt_min: float = 0.1,
        dt_max: float = 1.0,
        dt_tie: bool = True,
        deterministic: bool = False,
        discretization: str = "zoh",
        bandlimit: float | None = None,
        bandlimit_grid: str = "base",
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
            trank: tensor rank, the number of outer products that an N-D kernel is the mean of.
            bidirectional: also have kernels for negative lags.
            n_ssm: independent sets of (A, B), a divisor of `d_model`, None for `d_model`; head h uses set h mod n_ssm.
            init: name of the initial A and B, see `ssm_jax.ops.state_matrices`.
            init_options: options of that: `real_scale`, `B_init`, ...
            dt_min: smallest initial step; steps are drawn log-uniform.
            dt_max: largest initial step. The defaults are the paper's for images; for sequences it has 0.001 to 0.1.
            dt_tie: one step per head; otherwise one per head and mode.
            deterministic: start from steps at equal distances on the logarithmic scale, and from read-outs of the
                state's first original coordinate, the same for all channels and directions.
            discretization: `zoh` or `bilinear`.
            bandlimit: drop modes at or above this fraction of the Nyquist frequency; None or infinity keeps all.
            bandlimit_grid: whose Nyquist frequency that is: of the rate-1 grid (`base`, as released), or of the grid
                that the kernel is sampled on (`current`), which drops just what would alias.
            dt_transform: map from the parameter to dt, a name in `ssm_jax.ops.transforms.TRANSFORMS`.
            real_transform: likewise to -Re A.
            imag_transform: likewise to -Im A.
            param_dtype: float32 or float64.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for a value outside what is said above.
        """
        n_ssm = d_model if n_ssm is None else n_ssm
        if d_model < 1 or n_ssm < 1 or d_model % n_ssm:
            raise ValueError(f"n_ssm must be a divisor of d_model: got n_ssm={n_ssm}, d_model={d_model}.")
        for argument, value in [("channels", channels), ("trank", trank)]:
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(f"dt_min must be positive and at most dt_max, got dt_min={dt_min}, dt_max={dt_max}.")
        if deterministic and not dt_tie:
            raise ValueError("deterministic steps are one per head: it must be False if dt_tie is False.")
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f"discretization must be 'zoh' or 'bilinear', got {discretization!r}.")
        if bandlimit is not None and not bandlimit > 0:
            raise ValueError(f"bandlimit must be positive, or None or inf to keep all modes, got {bandlimit}.")
        if bandlimit_grid not in ("base", "current"):
            raise ValueError(f"bandlimit_grid must be 'base' or 'current', got {bandlimit_grid!r}.")
        if not jnp.issubdtype(param_dtype, jnp.floating) or jnp.finfo(param_dtype).bits < 32:
            raise ValueError(f"param_dtype of a state space must be float32 or float64, got {jnp.dtype(param_dtype)}.")
        self.discretization = discretization
        self.bandlimit = bandlimit
        self.bandlimit_grid = bandlimit_grid
        self._dt = transform("dt_transform", dt_transform)
        self._real = transform("real_transform", real_transform)
        self._imag = transform("imag_transform", imag_transform)

        start = state_matrices(init, d_state, n_ssm=n_ssm, key=rngs.params(), **init_options or {})
        reach = [("dt_transform", dt_transform, self._dt, dt_max)]
        if isinstance(start.A, np.ndarray):  # random ones may be abstract
            reach.append(("real_transform", real_transform, self._real, np.max(-np.real(start.A))))
            reach.append(("imag_transform", imag_transform, self._imag, np.max(-np.imag(start.A))))
        for argument, name, t, largest in reach:
            if largest >= t.below:
                raise ValueError(
                    f"{argument}={name!r} stays below {t.below:g}, but the initial values reach {largest:g}."
                )
        n_modes = d_state // 2
        low, high = math.log(dt_min), math.log(dt_max)
        if deterministic:
            log_dt = jnp.linspace(low, high, d_model, dtype=param_dtype)[:, None]
        else:
            log_dt = jax.random.uniform(rngs.params(), (d_model, 1 if dt_tie else n_modes), param_dtype, low, high)
        self.inv_dt = SSMParam(inverse_clamped(self._dt, jnp.exp(log_dt)))
        self.A_real = SSMParam(inverse_clamped(self._real, -jnp.real(start.A)).astype(param_dtype))
        self.A_imag = SSMParam(inverse_clamped(self._imag, -jnp.imag(start.A)).astype(param_dtype))
        self.B = SSMParam(_pair(start.B).astype(param_dtype))
        shape = (2, 2 if bidirectional else 1, trank, channels, d_model, n_modes)
        if deterministic:
            first = jnp.tile(_pair(start.C).astype(param_dtype), (1, d_model // n_ssm, 1))
            self.C = nnx.Param(jnp.broadcast_to(first[:, None, None, None], shape))
        else:
            self.C = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * math.sqrt(0.5))

    def _per_head(self, x: Array) -> Array:
        """Gives each head its set's row of `x` (..., n_ssm, n); one set for all is left to broadcasting."""
        n_ssm, heads = x.shape[-2], self.inv_dt.shape[0]
        return x if n_ssm == 1 else jnp.tile(x, (*[1] * (x.ndim - 2), heads // n_ssm, 1))

    def continuous(
        self,
    ) -> tuple[
        Complex[Array, "h_or_1 n"], Complex[Array, "h_or_1 n"], Complex[Array, "k h n"], Float[Array, "h n_or_1"]
    ]:
        """A, B (one row if all heads share it), all read-outs C, and dt at rate 1."""
        A = jax.lax.complex(-self._real.forward(self.A_real[...]), -self._imag.forward(self.A_imag[...]))
        B = jax.lax.complex(self.B[0], self.B[1])
        C = jax.lax.complex(self.C[0], self.C[1])
        return self._per_head(A), self._per_head(B), C.reshape(-1, *C.shape[3:]), self._dt.forward(self.inv_dt[...])

    def __call__(
        self, length: int, *, rate: float | int = 1.0
    ) -> Float[Array, "directions trank channels d_model {length}"]:
        """Samples the kernels at lags 0 .. length-1 of a grid that is `rate` times as coarse as the base grid.

        The second direction's first sample belongs to lag -1, see `ssm_jax.ops.conv`.
        """
        return self._sample(length, rate).reshape(*self.C.shape[1:5], length)

    def _sample(self, length: int, rate: float | int) -> Float[Array, "k h {length}"]:
        A, B, C, dt = self.continuous()
        C = self._limited(C, A, dt, rate)
        return s4d_kernel(A, B, C, dt * rate, length, discretization=self.discretization)

    def recurrence(self, *, rate: float | int = 1.0) -> Recurrence:
        """The systems that respond to an impulse with the mean over tensor rank of the kernels, `channels` each.

        Raises ValueError for kernels in both directions: a recurrence knows no later input.
        """
        directions, trank, channels = self.C.shape[1:4]
        if directions != 1:
            raise ValueError("bidirectional must be False for kernels to be a recurrence.")
        system = self._system(rate)
        return system._replace(C=system.C.reshape(trank, channels, *system.C.shape[1:]).mean(0))

    def _system(self, rate: float | int) -> Recurrence:
        A, B, C, dt = self.continuous()
        C = self._limited(C, A, dt, rate)
        return s4d_recurrence(A, B, C, dt * rate, discretization=self.discretization)

    def _limited(self, C: Array, A: Array, dt: Array, rate: float | int) -> Array:
        """Read-outs without the modes beyond the band limit."""
        if self.bandlimit is None:
            return C
        mask = bandlimit_mask(A, dt if self.bandlimit_grid == "base" else dt * rate, self.bandlimit)
        return jnp.where(mask, C, 0)


class DPLRKernel(S4DKernel):
    """The convolution kernels of one axis from diagonal plus low-rank systems, S4's own, always bilinear.

    The state matrix is diag(A) - sum_r P_r P_r^*, that of the HiPPO operators LegS, LegT and Fourier.
    """

    def __init__(
        self,
        d_model: int,
        *,
        rank: int = 1,
        l_kernel: int | None = None,
        d_state: int = 64,
        n_ssm: int | None = 1,
        init: str = "legs",
        init_options: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
        **options,
    ):
        """Builds the parameters.

        Args:
            d_model: number of heads.
            rank: number of low-rank terms; at least 2 for LegT. Those that `init` does not need start at 0.
            l_kernel: None for kernels that are samples of one function at every rate. An integer for the kernels of
                S4's release, in which a kernel at another rate than 1 stands for one that is truncated to `l_kernel`
                samples of the base grid (appendix C.3 there) and changes with that; 0 for the length of the input.
            d_state: as for `S4DKernel`, like all that follows.
            n_ssm: independent sets of (A, B, P).
            init: name of the initial A, B and P.
            init_options: options of that, `P_scale` too.
            rngs: source of the `params` stream.
            **options: the others of `S4DKernel`, but for `discretization`.

        Raises:
            ValueError: as `S4DKernel`, and for `dt_tie=False`, a `discretization`, a `rank` below that of `init`, or a
                negative `l_kernel`.
        """
        if not options.get("dt_tie", True):
            raise ValueError("dt_tie must be True: a low-rank system has one step for all its modes.")
        if "discretization" in options:
            raise ValueError("discretization is bilinear for low-rank systems and cannot be given.")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}.")
        if l_kernel is not None and l_kernel < 0:
            raise ValueError(f"l_kernel must not be negative, got {l_kernel}.")
        initial = {"init": init, "d_state": d_state}
        super().__init__(d_model, **initial, init_options=init_options, n_ssm=n_ssm, rngs=rngs, **options)
        self.l_kernel = l_kernel
        sets = self.A_real.shape[0]
        start = state_matrices(**initial, n_ssm=sets, rank=rank, key=rngs.params(), **init_options or {})
        self.P = SSMParam(_pair(start.P).astype(self.B.dtype))

    def restore_read_outs(self, length: int) -> None:
        """Replaces read-outs C (I - Abar^length), which S4's release trains, by the C that they stand for."""
        A, _, C, dt = self.continuous()
        restored = truncate(A, C, self._low_rank(), dt, length, inverse=True)
        self.C[...] = _pair(restored).reshape(self.C.shape)

    def _low_rank(self) -> Complex[Array, "rank h_or_1 n"]:
        return self._per_head(jax.lax.complex(self.P[0], self.P[1]))

    def _sample(self, length: int, rate: float | int) -> Float[Array, "k h {length}"]:
        A, B, C, dt = self.continuous()
        P = self._low_rank()
        if self.l_kernel is None:
            C = self._limited(C, A, dt, rate)
        elif rate != 1 or self.bandlimit is not None:
            # S4's release holds C (I - Abar^l_kernel) fixed instead of C, and limits its band.
            needed = max(1, round(length * rate))
            l_kernel = self.l_kernel or needed
            while l_kernel < needed:
                l_kernel *= 2
            C = self._limited(truncate(A, C, P, dt, l_kernel), A, dt, rate)
            C = truncate(A, C, P, dt * rate, round(l_kernel / rate), inverse=True)
        return dplr_kernel(A, B, C, P, dt * rate, length)

    def recurrence(self, *, rate: float | int = 1.0) -> Recurrence:
        """As `S4DKernel.recurrence`; also raises ValueError where `l_kernel` makes kernels depend on their length."""
        if self.l_kernel is not None and (rate != 1 or self.bandlimit is not None):
            raise ValueError(
                "l_kernel must be None for kernels to be a recurrence at another rate than 1 or with a bandlimit, "
                f"got l_kernel={self.l_kernel}, rate={rate}, bandlimit={self.bandlimit}."
            )
        return super().recurrence(rate=rate)

    def _system(self, rate: float | int) -> Recurrence:
        A, B, C, dt = self.continuous()
        return dplr_recurrence(A, B, self._limited(C, A, dt, rate), self._low_rank(), dt * rate)


def _pair(x: ArrayLike) -> Array:
    """The real parts and the imaginary parts, as our parameters keep them."""
    return jnp.stack([jnp.real(x), jnp.imag(x)])
