"""Convolution kernels of diagonal state space models (S4D), along one axis."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float

from ssm_jax.ops.backend import target_backend
from ssm_jax.ops.discretize import discretize


def vandermonde(v: Complex[Array, "k h n"], log_x: Complex[Array, "h n"], length: int) -> Float[Array, "k h {length}"]:
    """Sums a mode and its conjugate over powers: `2 Re sum_n v[k, h, n] x[h, n]^l` for l = 0 .. length-1.

    With l = a + m b it is a product of the matrices v x^(m b) and x^a, of about sqrt(k length) columns each, and there
    is no array of (h, n, length), but for short lengths on accelerators. The backward pass computes the powers again,
    and is a product with them too: if g is the gradient of the sums, that of v is 2 sum_l g x^l, and that of log x is
    2 v sum_l l g x^l.
    """
    # Where both passes are one program, XLA may keep the powers, which are small, instead.
    return jax.checkpoint(_vandermonde, prevent_cse=False, static_argnums=2)(v, log_x, length)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _vandermonde(v: Array, log_x: Array, length: int) -> Array:
    return _combine(v, _levels(log_x, len(v), length))[..., :length]


@_vandermonde.defjvp
def _(length: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    v, log_x = primals
    v_dot, log_x_dot = tangents
    levels = _levels(log_x, len(v), length)
    by_v, by_log_x = jnp.split(_combine(jnp.concatenate([v_dot, v * log_x_dot[None]]), levels)[..., :length], 2)
    return _combine(v, levels)[..., :length], by_v + np.arange(length, dtype=by_v.dtype)[None, None] * by_log_x


def _levels(log_x: Array, k: int, length: int) -> tuple[Array, Array]:
    """The powers x^a and x^(m b), (m, h, n) and (length / m, h, n)."""
    short = 0 if target_backend() == "cpu" else 64  # measured; for accelerators XLA's estimates for TPU v5e
    inner = length if length <= short else math.ceil(math.sqrt(k * length))
    return _powers(log_x, inner), _powers(inner * log_x, -(-length // inner))


def _powers(log_x: Array, count: int) -> Array:
    """1, x, x^2, .., (count, h, n)."""
    if target_backend() != "cpu":
        return _exp(log_x[None] * jnp.arange(count, dtype=log_x.dtype)[:, None, None])
    # Products are cheaper than exponentials there, and as the phase grows, more exact.
    x = _exp(log_x)
    return jax.lax.scan(lambda power, _: (power * x, power), jnp.ones_like(x), length=count)[1]


def _exp(z: Array) -> Array:
    decay = jnp.exp(z.real)
    return jax.lax.complex(decay * jnp.cos(z.imag), decay * jnp.sin(z.imag))


def _combine(v: Array, levels: tuple[Array, Array]) -> Array:
    """2 Re sum_n v x^(a + m b), (k, h, a + m b)."""
    low, high = levels
    k, h, _ = v.shape
    v = v[:, None] * high[None]
    if len(high) == 1:
        return 2 * jnp.moveaxis((v.real * low.real[None] - v.imag * low.imag[None]).sum(-1), 1, -1)
    # In real arithmetic it is one matrix product, which asks for full float32: TPUs default to bfloat16.
    basis = jnp.concatenate([low.real, -low.imag], axis=-1)
    weights = jnp.concatenate([v.real, v.imag], axis=-1)
    product = jnp.einsum("kbhn,ahn->khba", weights, basis, precision=jax.lax.Precision.HIGHEST)
    return 2 * product.reshape(k, h, -1)


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
