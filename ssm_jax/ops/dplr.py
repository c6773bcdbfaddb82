"""Kernels of diagonal plus low-rank state space models (S4's DPLR), along one axis, without cancellation.

The state matrix is M = diag(A) - sum_r P_r P_r^*, over conjugate pairs of which only one mode each is stored; inner
products over all modes are then twice the real part of those over the stored ones. M is far from normal, so that its
eigenvectors are of no use in any precision, and powers of its bilinear transform are taken step by step: each is a
contraction, and costs as little as a diagonal one.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

_HIGHEST = jax.lax.Precision.HIGHEST


class Step(NamedTuple):
    """One step of `h` systems, x -> decay x - sum_r gain_r 2 Re(probe_r . x)."""

    decay: Complex[Array, "h n"]
    probe: Complex[Array, "r h n"]
    gain: Complex[Array, "r h n"]

    def __call__(self, x: Complex[Array, "*batch h n"]) -> Complex[Array, "*batch h n"]:
        """Takes the step from states `x`."""
        y = _align(self.decay, x) * x
        for probe, gain in zip(self.probe, self.gain, strict=True):
            y = y - _align(gain, x) * _real_dot(_align(probe, x), x)
        return y

    @property
    def transposed(self) -> "Step":
        """The step of read-outs, C -> C Abar."""
        return Step(self.decay, probe=self.gain, gain=self.probe)


def dplr_discretize(
    A: Complex[Array, "h_or_1 n"],
    B: Complex[Array, "h_or_1 n"],
    P: Complex[Array, "r h_or_1 n"],
    dt: Float[Array, "h 1"],
) -> tuple[Step, Complex[Array, "h n"]]:
    """The bilinear step Abar, as a function of states, and Bbar.

    With z = dt / 2, Abar = (I - z M)^-1 (I + z M) = 2 (I - z M)^-1 - I and Bbar = dt (I - z M)^-1 B (S4, eq. 3). By
    Woodbury's identity (I - z M)^-1 = E - z E P (I + z P^* E P)^-1 P^* E with E = (I - z diag(A))^-1. As the real part
    of E is positive, the small matrix is at least I: nothing cancels, and float32 keeps its digits.
    """
    z = (dt / 2).astype(A.dtype)
    E = 1 / (1 - z * A)
    probe = P.conj() * E[None]
    overlap = 2 * jnp.einsum("rhn,shn->hrs", probe, jnp.broadcast_to(P, probe.shape), precision=_HIGHEST).real
    small = jnp.eye(len(P), dtype=overlap.dtype)[None] + z.real[..., None] * overlap
    inverse = jnp.linalg.inv(small).astype(P.dtype)
    gain = (z * E)[None] * jnp.einsum("rhn,hrs->shn", jnp.broadcast_to(P, probe.shape), inverse, precision=_HIGHEST)
    solved = E * B - (gain * _real_dot(probe, jnp.broadcast_to(B, E.shape)[None])).sum(0)
    return Step((1 + z * A) * E, probe, 2 * gain), 2 * z * solved


def dplr_kernel(
    A: Complex[Array, "h_or_1 n"],
    B: Complex[Array, "h_or_1 n"],
    C: Complex[Array, "k h n"],
    P: Complex[Array, "r h_or_1 n"],
    dt: Float[Array, "h 1"],
    length: int,
) -> Float[Array, "k h {length}"]:
    """Kernels of `h` systems, `k` read-outs `C` each: `2 Re C Abar^l Bbar`, l = 0 .. length-1 (S4, eq. 5).

    In float32 exact to about 1e-6, where the release's route over the generating function is to 2.5e-3 (Fourier).
    States are kept for a chunk of the lags at a time, and computed again in the backward pass: they stay in a cache.
    """
    step, Bbar = dplr_discretize(A, B, P, dt)
    weights = jnp.concatenate([C.real, C.imag], axis=-1)
    chunk = min(length, max(16, math.ceil(math.sqrt(length))))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def advance(x, _):
        x, states = jax.lax.scan(lambda x, _: (step(x), x), x, length=chunk)
        basis = jnp.concatenate([states.real, -states.imag], axis=-1)
        return x, jnp.einsum("khn,lhn->khl", weights, basis, precision=_HIGHEST)

    _, chunks = jax.lax.scan(advance, Bbar, length=-(-length // chunk))
    return 2 * jnp.moveaxis(chunks, 0, 2).reshape(*C.shape[:2], -1)[..., :length]


def truncate(
    A: Complex[Array, "h_or_1 n"],
    C: Complex[Array, "k h n"],
    P: Complex[Array, "r h_or_1 n"],
    dt: Float[Array, "h 1"],
    length: int,
    *,
    inverse: bool = False,
) -> Complex[Array, "k h n"]:
    """Maps read-outs `C` to `C (I - Abar^length)`, those that S4's release trains ("C tilde"), or back if `inverse`.

    The release needs them for its generating function truncated to `length` samples (S4, appendix C.3). Where a mode
    hardly decays, as Fourier's of frequency 0, I - Abar^length is about 1e-4. It is therefore summed up, I - Abar^(l+1)
    = (I - Abar) + (I - Abar^l) Abar: float32 would keep 3 digits of a difference to I.
    """
    step = dplr_discretize(A, jnp.zeros_like(A), P, dt)[0].transposed
    z = (dt / 2).astype(A.dtype)
    change = step._replace(decay=2 * z * A / (1 - z * A))  # C -> C (Abar - I), of the same form

    def truncated(C: Array) -> Array:
        once = -change(C)
        return jax.lax.fori_loop(0, length, lambda _, x: once + step(x), jnp.zeros_like(C))

    def real_columns(C: Array) -> Array:
        return jnp.moveaxis(jnp.concatenate([C.real, -C.imag], axis=-1), 0, -1)

    if not inverse:
        return truncated(C)
    heads, n_modes = C.shape[1:]
    units = jnp.asarray(np.concatenate([np.eye(n_modes), -1j * np.eye(n_modes)]), C.dtype)
    units = jnp.broadcast_to(units[:, None], (2 * n_modes, heads, n_modes))
    restored = jnp.moveaxis(jnp.linalg.solve(real_columns(truncated(units)), real_columns(C)), -1, 0)
    return jax.lax.complex(restored[..., :n_modes], -restored[..., n_modes:])


def _align(v: Array, x: Array) -> Array:
    return v.reshape(*[1] * (x.ndim - v.ndim), *v.shape)


def _real_dot(x: Array, y: Array) -> Array:
    """2 Re x . y over modes, as a complex array with the last axis kept."""
    return (2 * jnp.sum((x * y).real, axis=-1, keepdims=True)).astype(x.dtype)
