"""Convolution kernels of diagonal state space models (S4D), along one axis."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from ssm_jax.ops.discretize import discretize


def vandermonde(v: Complex[Array, "k h n"], log_x: Complex[Array, "h n"], length: int) -> Float[Array, "k h {length}"]:
    """Sums a mode and its conjugate over powers: `2 Re sum_n v[k, h, n] x[h, n]^l` for l = 0 .. length-1.

    With l = a + m b it is a product of the matrices v x^(m b) and x^a, of about sqrt(k length) columns each, and there
    is no array of (h, n, length). The backward pass computes them again.
    """
    k = v.shape[0]
    inner = length if length <= _DIRECT else math.ceil(math.sqrt(k * length))
    outer = -(-length // inner)
    return jax.checkpoint(functools.partial(_vandermonde, inner=inner, outer=outer))(v, log_x)[..., :length]


_DIRECT = 16  # up to this length one product is fastest (measured on CPU)


def _vandermonde(v: Array, log_x: Array, *, inner: int, outer: int) -> Array:
    k, h, _ = v.shape
    if outer > 1:
        v = v[:, None] * _powers(inner * log_x, outer)[None]
    basis = _powers(log_x, inner)
    # In real arithmetic it is one matrix product, which asks for full float32: TPUs default to bfloat16.
    basis = jnp.concatenate([basis.real, -basis.imag], axis=-1)
    weights = jnp.concatenate([v.real, v.imag], axis=-1).reshape(k, outer, h, -1)
    product = jnp.einsum("kbhn,ahn->khba", weights, basis, precision=jax.lax.Precision.HIGHEST)
    return 2 * product.reshape(k, h, outer * inner)


def _powers(log_x: Array, count: int) -> Array:
    """1, x, x^2, .., (count, h, n). Products are cheaper than exponentials, and as l log x grows, more exact."""
    decay = jnp.exp(log_x.real)
    x = jax.lax.complex(decay * jnp.cos(log_x.imag), decay * jnp.sin(log_x.imag))
    unroll = 1 if jax.default_backend() == "cpu" else count  # one kernel launch instead of `count`
    return jax.lax.scan(lambda power, _: (power * x, power), jnp.ones_like(x), length=count, unroll=unroll)[1]


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
