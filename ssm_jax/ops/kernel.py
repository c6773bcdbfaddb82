"""Convolution kernels of diagonal state space models (S4D), along one axis."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from ssm_jax.ops.discretize import discretize


def vandermonde(v: Complex[Array, "k h n"], log_x: Complex[Array, "h n"], length: int) -> Float[Array, "k h length"]:
    """Sums a mode and its conjugate over powers: `2 Re sum_n v[k, h, n] x[h, n]^l` for l = 0 .. length-1.

    Written in real arithmetic, as one matrix product of (Re v, Im v) with (Re x^l, -Im x^l), which a matrix unit
    can do; it asks for full float32 products, as TPUs would otherwise multiply in bfloat16.
    """
    powers = log_x[..., None] * jnp.arange(length)[None, None].astype(log_x.dtype)
    decay = jnp.exp(powers.real)
    basis = jnp.concatenate([decay * jnp.cos(powers.imag), -decay * jnp.sin(powers.imag)], axis=1)
    weights = jnp.concatenate([v.real, v.imag], axis=-1)
    return 2 * jnp.einsum("khn,hnl->khl", weights, basis, precision=jax.lax.Precision.HIGHEST)


def s4d_kernel(
    A: Complex[Array, "h_or_1 n"],
    B: Complex[Array, "h_or_1 n"],
    C: Complex[Array, "k h n"],
    dt: Float[Array, "h n_or_1"],
    length: int,
    *,
    discretization: str = "zoh",
) -> Float[Array, "k h length"]:
    """Kernels of `h` diagonal systems, `k` read-outs `C` each: `2 Re sum_n C Bbar Abar^l`, l = 0 .. length-1.

    S4D (arXiv:2206.11893), eq. 5. `A`, `B` hold one mode of each conjugate pair; a leading 1 is shared by all heads.
    `dt` is the step per head, or per head and mode.
    """
    log_Abar, Bbar = discretize(A, B, dt, discretization)
    return vandermonde(C * Bbar[None], log_Abar, length)


def bandlimit_mask(A: Complex[Array, "h_or_1 n"], dt: Float[Array, "h n_or_1"], bandlimit: float) -> Bool[Array, "h n"]:
    """True for the modes that oscillate slower than `bandlimit` times the Nyquist frequency (S4ND, section 4.3).

    A mode's frequency is `dt |Im A| / 2 pi` cycles per sample. With `dt` the step of the rate-1 grid, as in the
    release, `bandlimit` is relative to that grid's Nyquist frequency, whatever the sampling rate of the input.
    """
    return dt * jnp.abs(A.imag) / (2 * np.pi) < 0.5 * bandlimit
