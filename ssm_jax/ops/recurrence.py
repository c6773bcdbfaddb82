"""State space models as recurrences: position after position or chunk after chunk, with a state that is carried on.

Diagonal systems are those of a low-rank part of rank 0, see `ssm_jax.ops.dplr.Step`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from ssm_jax.ops.discretize import discretize
from ssm_jax.ops.dplr import Step, dplr_discretize

_HIGHEST = jax.lax.Precision.HIGHEST

CHUNK = 64
"""The fastest of 16, 32, .. 256 on CPU, or nearly so, for 64 real states: `python -m benchmarks.recurrence`."""


class Recurrence(NamedTuple):
    """`h` systems of one input and `k` outputs each: x_l = step(x_{l-1}) + B u_l and y_l = 2 Re C x_l + D u_l."""

    step: Step
    B: Complex[Array, "h n"]
    C: Complex[Array, "k h n"]
    D: Float[Array, "k h"] | None = None


def s4d_recurrence(
    A: Complex[Array, "h_or_1 n"],
    B: Complex[Array, "h_or_1 n"],
    C: Complex[Array, "k h n"],
    dt: Float[Array, "h n_or_1"],
    *,
    discretization: str = "zoh",
) -> Recurrence:
    """The diagonal systems whose impulse responses `s4d_kernel` gives."""
    log_Abar, Bbar = discretize(A, B, dt, discretization)
    rank_0 = jnp.zeros((0, *log_Abar.shape), log_Abar.dtype)
    return Recurrence(Step(jnp.exp(log_Abar), probe=rank_0, gain=rank_0), Bbar, C)


def dplr_recurrence(
    A: Complex[Array, "h_or_1 n"],
    B: Complex[Array, "h_or_1 n"],
    C: Complex[Array, "k h n"],
    P: Complex[Array, "r h_or_1 n"],
    dt: Float[Array, "h 1"],
) -> Recurrence:
    """The low-rank systems whose impulse responses `dplr_kernel` gives."""
    return Recurrence(*dplr_discretize(A, B, P, dt), C)


def recurrent_step(
    system: Recurrence, state: Complex[Array, "batch h n"], u: Float[Array, "batch h"]
) -> tuple[Complex[Array, "batch h n"], Float[Array, "batch {len(system.C)}*h"]]:
    """One position: the state after input `u`, and its output, in the precision of the system."""
    u = u.astype(system.B.real.dtype)
    state = system.step(state) + system.B[None] * u[..., None].astype(system.B.dtype)
    y = jnp.einsum("khi,bhi->bkh", _read(system.C), _real(state), precision=_HIGHEST)
    if system.D is not None:
        y = y + system.D[None] * u[:, None]
    return state, y.reshape(len(y), -1)


def recurrent_scan(
    system: Recurrence,
    state: Complex[Array, "batch h n"],
    u: Float[Array, "batch length h"],
    *,
    chunk: int = CHUNK,
) -> tuple[Complex[Array, "batch h n"], Float[Array, "batch length {len(system.C)}*h"]]:
    """What `recurrent_step` gives position by position: the state after the last one, and all outputs.

    Only the states x before each `chunk` of positions are computed. Outputs are linear in them and the inputs,

        y_l = sum_{s <= l} (2 Re C Abar^(l-s) B) u_s + D u_l + 2 Re C Abar^(l+1) x        l = 0 .. chunk-1
        next x = sum_s Abar^(chunk-1-s) B u_s + Abar^chunk x

    so that three matrix products for all chunks together leave only the last term to be taken chunk after chunk. Per
    head and position that is chunk k + 2 n (k + 1) multiplications, and there is no array of length times n. Raises
    ValueError for a `chunk` or a length below 1.
    """
    if chunk < 1 or u.shape[1] < 1:
        raise ValueError(f"chunk and the length of u must be at least 1, got {chunk} and {u.shape[1]}.")
    chunk = min(chunk, u.shape[1])
    tables = _tables(system, chunk)
    whole = u.shape[1] - u.shape[1] % chunk
    state, y = _chunks(system, tables, state, u[:, :whole], chunk)
    if whole < u.shape[1]:
        state, rest = _chunks(system, tables, state, u[:, whole:], u.shape[1] - whole)
        y = jnp.concatenate([y, rest], axis=1)
    return state, y


def _tables(system: Recurrence, chunk: int) -> tuple[Array, Array, Array]:
    """Real matrices for each head: inputs to outputs (h, chunk, chunk k), inputs to next state, state to outputs."""
    step, B, C, D = system

    def advance(carry, _):
        impulse, C = carry
        later = step.transposed(C)
        return (step(impulse), later), (_real(impulse), _read(later))

    _, (impulses, read) = jax.lax.scan(advance, (B, C), length=chunk)
    kernel = jnp.einsum("khi,lhi->lkh", _read(C), impulses, precision=_HIGHEST)
    if D is not None:
        kernel = kernel.at[0].add(D)
    lags = np.arange(chunk) - np.arange(chunk)[:, None]
    respond = jnp.pad(kernel, [(0, chunk), (0, 0), (0, 0)])[lags]  # negative lags find the padding, from its end
    return (
        jnp.moveaxis(respond, -1, 0).reshape(len(B), chunk, -1),
        jnp.moveaxis(jnp.flip(impulses, 0), 1, 0),
        jnp.transpose(read, (2, 3, 0, 1)).reshape(len(B), impulses.shape[-1], -1),
    )


def _chunks(
    system: Recurrence, tables: tuple[Array, Array, Array], state: Array, u: Array, size: int
) -> tuple[Array, Array]:
    """`recurrent_scan` over whole chunks of `size`, up to that of the tables."""
    batch, length, heads = u.shape
    outputs = size * len(system.C)
    respond, inject, read = tables
    respond, inject, read = respond[:, :size, :outputs], inject[:, -size:], read[..., :outputs]
    carry = _power(system.step, size)
    # A row for each chunk of each head's sequences. The batch is outermost, so that each device has rows of its own.
    rows = jnp.moveaxis(u.astype(respond.dtype), -1, 0).reshape(heads, -1, size)
    injected = jnp.matmul(rows, inject, precision=_HIGHEST).reshape(heads, batch, length // size, -1)
    injected = _complex(jnp.transpose(injected, (2, 1, 0, 3)))
    state, before = jax.lax.scan(lambda x, added: (carry(x) + added, x), state, injected)
    before = jnp.transpose(_real(before), (2, 1, 0, 3)).reshape(*rows.shape[:2], -1)
    y = jnp.matmul(rows, respond, precision=_HIGHEST) + jnp.matmul(before, read, precision=_HIGHEST)
    return state, jnp.moveaxis(y.reshape(heads, batch, length, -1), 0, -1).reshape(batch, length, -1)


def _power(step: Step, exponent: int) -> Callable[[Array], Array]:
    """So many steps at once: still elementwise for diagonal systems, otherwise a real matrix for each head."""
    if not len(step.probe):
        return step._replace(decay=step.decay**exponent)
    heads, n_modes = step.decay.shape
    units = jnp.asarray(np.eye(n_modes), step.decay.dtype)
    units = jnp.broadcast_to(jnp.concatenate([units, 1j * units])[:, None], (2 * n_modes, heads, n_modes))
    matrix = jnp.moveaxis(_real(step(units)), 1, 0)  # row i is what unit i becomes
    with jax.default_matmul_precision("highest"):
        power = jnp.linalg.matrix_power(matrix, exponent)
    return lambda x: _complex(jnp.einsum("bhi,hij->bhj", _real(x), power, precision=_HIGHEST))


def _real(x: Array) -> Array:
    return jnp.concatenate([x.real, x.imag], axis=-1)


def _complex(x: Array) -> Array:
    return jax.lax.complex(*jnp.split(x, 2, axis=-1))


def _read(C: Array) -> Array:
    """The row whose product with `_real(x)` is 2 Re C x."""
    return 2 * _real(C.conj())
