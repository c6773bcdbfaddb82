"""State matrices that the kernels start from: HiPPO matrices, their diagonal plus low-rank form, diagonal variants.

Everything but random draws is numpy in float64 and runs once, at construction. A real state of size `d_state` is
stored as `d_state / 2` complex modes; the other half are their conjugates. Conventions follow S4 (arXiv:2111.00396)
and S4D (arXiv:2206.11893): modes have Re A < 0 and Im A <= 0.
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class StateMatrices(NamedTuple):
    """Modes of `n_ssm` independent systems, x' = (diag(A) - sum_r P_r P_r^*) x + B u.

    `A` and `B` (n_ssm, d_state/2) are complex; `P` (rank, n_ssm, d_state/2) is the low-rank part, which the diagonal
    kernels (S4D) leave out; `C` (n_ssm, d_state/2) reads out the first coordinate of the system before it was
    diagonalised.
    """

    A: np.ndarray | jax.Array
    B: np.ndarray
    P: np.ndarray | jax.Array
    C: np.ndarray


def hippo(measure: str, d_state: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the dense real HiPPO matrices `A` (N, N), `B` (N,) and the rank-r correction `P` (r, N).

    `A + sum_r P_r P_r^T` is a multiple of the identity plus a skew matrix (S4, appendix C), so it is diagonalised by
    a unitary matrix. Measures: `legs` and `legt` (arXiv:2008.07669), `fourier` (arXiv:2206.12037).
    """
    n = np.arange(d_state)
    scale = np.sqrt(2 * n + 1.0)
    if measure == "legs":
        A = -np.tril(np.outer(scale, scale), -1) - np.diag(n + 1.0)
        return A, scale, np.sqrt(n + 0.5)[None]
    if measure == "legt":
        i, j = np.meshgrid(n, n, indexing="ij")
        A = -0.5 * np.outer(scale, scale) * np.where(i < j, (-1.0) ** (i - j), 1.0)
        P = np.stack([np.where(n % 2 == parity, scale, 0.0) for parity in (1, 0)]) / np.sqrt(2)
        return A, 0.5 * scale, P
    if measure == "fourier":
        frequency = np.pi * np.arange(d_state // 2)
        A = np.zeros((d_state, d_state))
        A[n[::2], n[1::2]] = -frequency
        A[n[1::2], n[::2]] = frequency
        B = np.where(n % 2 == 0, np.sqrt(2), 0.0)
        B[0] = 1.0
        return A - np.outer(B, B), B, B[None]
    raise ValueError(f"measure must be 'legs', 'legt' or 'fourier', got {measure!r}.")


def diagonalize(A: np.ndarray, B: np.ndarray, P: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Diagonalises `A + sum_r P_r P_r^T` and keeps one mode of each conjugate pair.

    Takes what `hippo` returns; gives the modes `W` (N/2,), sorted by imaginary part, `V^* B` (N/2,), `V^* P` (r, N/2)
    and the eigenvectors `V` (N, N/2). Each eigenvector's phase is arbitrary.
    """
    d_state = len(B)
    normal = A + P.T @ P
    real = np.mean(np.diag(normal))
    frequencies, vectors = np.linalg.eigh(-1j * (normal - real * np.eye(d_state)))  # ascending
    W = real + 1j * frequencies[: d_state // 2]
    V = vectors[:, : d_state // 2]
    if abs(frequencies[d_state // 2]) < 1e-9:
        # The Fourier system has frequency 0 twice. Any basis of that plane would do for the eigenvalue problem, but
        # only this choice makes the kept mode and the dropped one conjugates of each other.
        V[:, -1] = 0.0
        V[:2, -1] = np.array([1.0, 1j]) / np.sqrt(2)
    return W, V.conj().T @ B, P @ V.conj(), V


# S4D keeps only the diagonal, and a mode of LegS with |B| = 40 would then dominate all others.
_MAX_IMAG_B = 2.0


def _nplr(measure: str) -> Callable[[int], StateMatrices]:
    def init(d_state: int) -> StateMatrices:
        W, B, P, V = diagonalize(*hippo(measure, d_state))
        B = np.real(B) + 1j * np.clip(np.imag(B), -_MAX_IMAG_B, _MAX_IMAG_B)
        return StateMatrices(W[None], B[None], P[:, None], V[:1].conj())

    return init


def _diagonal(modes: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[int], StateMatrices]:
    def init(d_state: int) -> StateMatrices:
        n = np.arange(d_state // 2)
        A = modes(n, d_state).astype(np.complex128)[None]
        return StateMatrices(A, np.ones_like(A), np.zeros_like(A)[None], (n == 0).astype(np.complex128)[None])

    return init


def _diag_legs(d_state: int) -> StateMatrices:
    legs = _nplr("legs")(d_state)
    return legs._replace(A=-0.5 - 1j * np.abs(np.imag(legs.A)))


_INITS: dict[str, Callable[[int], StateMatrices]] = {
    "diag-lin": _diagonal(lambda n, N: -0.5 - 1j * np.pi * n),
    "diag-inv": _diagonal(lambda n, N: -0.5 - 1j * N / np.pi * (N / (1 + 2 * n) - 1)),
    "diag-inv2": _diagonal(lambda n, N: -0.5 - 1j * N / np.pi * (N / (1 + n) - 1)),
    "diag-quad": _diagonal(lambda n, N: -0.5 - 1j * (1 + 2 * n) ** 2 / np.pi),
    "diag-real": _diagonal(lambda n, N: -(1.0 + n)),
    "diag-legs": _diag_legs,
    "legs": _nplr("legs"),
    "legt": _nplr("legt"),
    "fourier": _nplr("fourier"),
}


_RANDOM = ("diag-rand", *(name.replace("diag", "dplr") for name in _INITS if name.startswith("diag-")))


def state_matrices(
    init: str, d_state: int, *, n_ssm: int = 1, rank: int | None = None, key: jax.Array | None = None
) -> StateMatrices:
    """Builds the initial modes of `n_ssm` systems with `d_state` real states each.

    `init` is one of `diag-lin`, `diag-inv`, `diag-inv2`, `diag-quad`, `diag-real`, `diag-legs` (S4D, section 4);
    `diag-rand` (log-normal frequencies); `dplr-lin`, ... (the same A, and P complex normal); `legs`, `legt`, `fourier`
    (HiPPO matrices); `hippo`: the first half of the systems LegS, the second half Fourier. Only `diag-rand` and
    `dplr-*` draw from `key`. `rank` adds rows of zeros to `P` up to that number.

    Raises ValueError for an odd `d_state`, an unknown `init`, `hippo` with an odd `n_ssm`, a `rank` below that of
    `init`, or a missing `key`.
    """
    if d_state < 2 or d_state % 2:
        raise ValueError(
            f"d_state must be even and at least 2, because modes come in conjugate pairs, got {d_state}; "
            f"use {max(2, d_state + d_state % 2)}."
        )
    if n_ssm < 1:
        raise ValueError(f"n_ssm must be at least 1, got {n_ssm}.")
    if init in _RANDOM:
        if key is None:
            raise ValueError(f"key must be given for init={init!r}, which draws from it.")
        return _random(init, d_state, n_ssm, rank or 1, key)
    names = [init] * n_ssm
    if init == "hippo":
        if n_ssm % 2:
            raise ValueError(f"n_ssm must be even for init='hippo', half LegS and half Fourier, got {n_ssm}.")
        names = ["legs"] * (n_ssm // 2) + ["fourier"] * (n_ssm // 2)
    if names[0] not in _INITS:
        allowed = sorted([*_INITS, *_RANDOM, "hippo"])
        near = difflib.get_close_matches(init, allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"init must be one of {', '.join(allowed)}, got {init!r}.{hint}")
    systems = [_INITS[name](d_state) for name in names]
    joined = StateMatrices(*(np.concatenate(field, axis=-2) for field in zip(*systems, strict=True)))
    missing = (rank or len(joined.P)) - len(joined.P)
    if missing < 0:
        raise ValueError(f"rank must be at least {len(joined.P)} for init={init!r}, got {rank}.")
    return joined._replace(P=np.pad(joined.P, ((0, missing), (0, 0), (0, 0))))


def _random(init: str, d_state: int, n_ssm: int, rank: int, key: jax.Array) -> StateMatrices:
    if init == "diag-rand":
        lin = state_matrices("diag-lin", d_state, n_ssm=n_ssm)
        frequencies = jnp.exp(jax.random.normal(key, lin.A.shape))
        return lin._replace(A=jax.lax.complex(jnp.full_like(frequencies, -0.5), -frequencies))
    diagonal = state_matrices(init.replace("dplr", "diag"), d_state, n_ssm=n_ssm)
    real, imag = jax.random.normal(key, (2, rank, n_ssm, d_state // 2)) * 0.5**0.5
    return diagonal._replace(P=jax.lax.complex(real, imag))
