"""State matrices that the kernels start from: HiPPO matrices, their diagonal plus low-rank form, diagonal variants.

Everything but random draws is numpy in float64 and runs once, at construction. A real state of size `d_state` is
stored as `d_state / 2` complex modes; the other half are their conjugates. Conventions follow S4 (arXiv:2111.00396)
and S4D (arXiv:2206.11893): modes have Re A < 0 and Im A <= 0.
"""

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
    B: np.ndarray | jax.Array
    P: np.ndarray | jax.Array
    C: np.ndarray | jax.Array


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


@functools.cache  # a network asks for one for each axis of each layer
def _hippo_modes(measure: str, d_state: int) -> StateMatrices:
    W, B, P, V = diagonalize(*hippo(measure, d_state))
    B = np.real(B) + 1j * np.clip(np.imag(B), -_MAX_IMAG_B, _MAX_IMAG_B)
    return StateMatrices(W[None], B[None], P[:, None], V[:1].conj())


_HIPPO = ("legs", "legt", "fourier")

# -Im A of mode n, counted from 0, of a system of N states (S4D, section 4).
_FREQUENCIES: dict[str, Callable[[np.ndarray | jax.Array, int], np.ndarray | jax.Array]] = {
    "lin": lambda n, N: np.pi * n,
    "inv": lambda n, N: N / np.pi * (N / (1 + 2 * n) - 1),
    "inv2": lambda n, N: N / np.pi * (N / (1 + n) - 1),
    "quad": lambda n, N: (1 + 2 * n) ** 2 / np.pi,
    "real": lambda n, N: 0 * n,
    "legs": lambda n, N: 0 * n + np.abs(np.imag(_hippo_modes("legs", N).A)),
}

_B = {
    "constant": lambda n, N: np.ones_like(n, complex),
    "alternating": lambda n, N: (-1.0 + 0j) ** n,
    "unit-cw": lambda n, N: np.exp(-2j * np.pi * n / N),
    "unit-ccw": lambda n, N: np.exp(2j * np.pi * n / N),
}

_COMBINATIONS = {
    "hippo": ("legs", "fourier"),
    "diag": ("diag-inv", "diag-lin"),
    "all": ("legs", "fourier", "diag-inv", "diag-lin"),
}

_OPTIONS = ("real_scale", "imag_scale", "real_random", "imag_random", "B_init", "B_scale", "P_scale")
_DIAGONAL = ("rand", *_FREQUENCIES)
_INITS = sorted([*_HIPPO, *_COMBINATIONS, *(f"{kind}-{name}" for kind in ("diag", "dplr") for name in _DIAGONAL)])


def state_matrices(
    init: str,
    d_state: int,
    *,
    n_ssm: int = 1,
    rank: int | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> StateMatrices:
    """Builds the initial modes of `n_ssm` systems with `d_state` real states each.

    Args:
        init: `diag-lin`, `diag-inv`, `diag-inv2`, `diag-quad`, `diag-real`, `diag-legs` (S4D, section 4) or `diag-rand`
            (log-normal frequencies); `dplr-lin`, ...: the same A, and P complex normal, but that of LegS for
            `dplr-legs`; `legs`, `legt`, `fourier` (HiPPO matrices); or several, each for an equal part of the systems:
            `hippo` for legs and fourier, `diag` for diag-inv and diag-lin, `all` for these four.
        d_state: real states, even.
        n_ssm: number of systems.
        rank: rows of P, those that `init` does not need being 0; None for as many as it needs.
        key: what is random is drawn from it.
        **options: of the `diag-*` and `dplr-*` ones: `real_scale` and `imag_scale` multiply the parts of A;
            `real_random` draws -Re A before that from [0, 1) instead of 1/2 (`diag-real`: from [0, d_state / 2)), and
            `imag_random` the mode numbers n, from [0, d_state / 2), in the formula of the frequencies; `B_init` is
            `constant`, `random`, `alternating`, `unit-cw`, `unit-ccw` (powers of a root of unity) or `legs`; `B_scale`
            and `P_scale` multiply B and P.

    Raises:
        ValueError: for an odd `d_state`, an unknown `init` or option, options of one that has none, an `n_ssm` that
            cannot be divided, a `rank` below that of `init`, or a missing `key`.
    """
    if d_state < 2 or d_state % 2:
        raise ValueError(
            f"d_state must be even and at least 2, because modes come in conjugate pairs, got {d_state}; "
            f"use {max(2, d_state + d_state % 2)}."
        )
    if init not in _INITS:
        near = difflib.get_close_matches(init, _INITS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"init must be one of {', '.join(_INITS)}, got {init!r}.{hint}")
    names = _COMBINATIONS.get(init, (init,))
    if n_ssm < 1 or n_ssm % len(names):
        raise ValueError(f"n_ssm must be a positive multiple of {len(names)} for init={init!r}, got {n_ssm}.")
    parts = []
    for i, name in enumerate(names):
        part_key = None if key is None else jax.random.fold_in(key, i)
        parts.append(_system(name, d_state, n_ssm // len(names), rank or 1, part_key, options))
    needed = max(len(part.P) for part in parts)
    if rank is not None and rank < needed:
        raise ValueError(f"rank must be at least {needed} for init={init!r}, got {rank}.")
    for i, part in enumerate(parts):
        zeros = np.zeros(((rank or needed) - len(part.P), *part.P.shape[1:]), part.P.dtype)
        parts[i] = part._replace(P=_join([part.P, zeros], 0))
    return StateMatrices(*(_join(field, -2) for field in zip(*parts, strict=True)))


def _system(
    init: str, d_state: int, n_ssm: int, rank: int, key: jax.Array | None, options: Mapping[str, Any]
) -> StateMatrices:
    """`n_ssm` systems of one kind."""
    if init not in _HIPPO:
        kind, name = init.split("-")
        if unknown := sorted(options.keys() - set(_OPTIONS)):
            raise ValueError(f"options of init={init!r} are {', '.join(_OPTIONS)}; got {', '.join(unknown)}.")
        return _diagonal(name, d_state, n_ssm, rank, key, **{"P_scale": float(kind == "dplr"), **options})
    if options:
        raise ValueError(f"init={init!r} has no options, only diag-* and dplr-* have; got {', '.join(options)}.")
    return StateMatrices(*(np.repeat(field, n_ssm, axis=-2) for field in _hippo_modes(init, d_state)))


def _diagonal(
    name: str,
    d_state: int,
    n_ssm: int,
    rank: int,
    key: jax.Array | None,
    *,
    P_scale: float,
    real_scale: float = 1.0,
    imag_scale: float = 1.0,
    real_random: bool = False,
    imag_random: bool = False,
    B_init: str = "constant",
    B_scale: float = 1.0,
) -> StateMatrices:
    shape = (n_ssm, d_state // 2)

    def draw(distribution: Callable[..., jax.Array], part: int, *shape: int) -> jax.Array:
        if key is None:
            raise ValueError(f"key must be given for an init with random parts, got none for a diagonal {name!r} one.")
        return distribution(jax.random.fold_in(key, part), shape)

    n = number = np.broadcast_to(np.arange(shape[1], dtype=float), shape)
    if imag_random:
        n = shape[1] * draw(jax.random.uniform, 0, *shape)
    imag = jnp.exp(draw(jax.random.normal, 0, *shape)) if name == "rand" else _FREQUENCIES[name](n, d_state)
    real = draw(jax.random.uniform, 1, *shape) if real_random else np.full(shape, 0.5)
    if name == "real":
        real = shape[1] * real if real_random else 1 + number
    legs = _hippo_modes("legs", d_state) if "legs" in (name, B_init) else None
    if legs is not None:
        B, P = (np.repeat(field, n_ssm, axis=-2) for field in (legs.B, legs.P))
    else:
        if B_init not in (*_B, "random"):
            raise ValueError(f"B_init must be one of {', '.join(_B)}, random, legs, got {B_init!r}.")
        random = B_init == "random"
        B = _normal(draw(jax.random.normal, 2, 2, *shape)) if random else _B[B_init](number, d_state)
        P = np.zeros((rank, *shape), complex)
        if P_scale:
            P = P_scale * _normal(draw(jax.random.normal, 3, 2, rank, *shape))
    return StateMatrices(
        _complex(-real_scale * real, -imag_scale * imag), B_scale * B, P, (number == 0).astype(complex)
    )


def _normal(pair: jax.Array) -> jax.Array:
    """Complex numbers of variance 1, half of it in each part."""
    return jax.lax.complex(*(pair * 0.5**0.5))


def _complex(real: np.ndarray | jax.Array, imag: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    if isinstance(real, np.ndarray) and isinstance(imag, np.ndarray):
        return real + 1j * imag
    return jax.lax.complex(jnp.asarray(real, float), jnp.asarray(imag, float))


def _join(arrays: Sequence[np.ndarray | jax.Array], axis: int) -> np.ndarray | jax.Array:
    """Of numpy, unless there are random ones."""
    return (jnp if any(isinstance(a, jax.Array) for a in arrays) else np).concatenate(arrays, axis)
