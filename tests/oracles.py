"""What the package computes, the slow and simple way: numpy, float64, loops and dense matrices."""

import itertools

import numpy as np
import scipy


def dense_step(A, B, dt, method):
    """Abar (n, n) and Bbar (n,) of one system x' = diag(A) x + B u, held constant over a step or by trapezoids."""
    n = len(A)
    M, b = np.diag(dt * A), dt * B * np.ones(n)
    if method == "zoh":
        augmented = np.zeros((n + 1, n + 1), complex)
        augmented[:n, :n], augmented[:n, n] = M, b
        exponential = scipy.linalg.expm(augmented)
        return exponential[:n, :n], exponential[:n, n]
    identity = np.eye(n)
    return np.linalg.solve(identity - M / 2, identity + M / 2), np.linalg.solve(identity - M / 2, b)


def recurrence(A, B, C, dt, u, method):
    """y_l = 2 Re C x_l with x_l = Abar x_{l-1} + Bbar u_l: (k, h, length) from u (h, length)."""
    k, h, n = C.shape
    A, B, dt = (np.broadcast_to(np.asarray(x), (h, n)) for x in (A, B, dt))
    y = np.zeros((k, *u.shape))
    for head in range(h):
        Abar, Bbar = dense_step(A[head], B[head], dt[head], method)
        x = np.zeros(n, complex)
        for step in range(u.shape[1]):
            x = Abar @ x + Bbar * u[head, step]
            y[:, head, step] = 2 * (C[:, head] @ x).real
    return y


def impulse_response(A, B, C, dt, length, method):
    """The kernels (k, h, length)."""
    impulse = np.zeros((C.shape[1], length))
    impulse[:, 0] = 1.0
    return recurrence(A, B, C, dt, impulse, method)


def joined(A, B, P, dt):
    """Abar (2n, 2n) and Bbar (2n,) of one system x' = M x + B u by trapezoids, M = diag(A) - sum_r P_r P_r^*.

    The n modes are followed by their conjugates.
    """
    A, B, P = (np.concatenate([x, np.conj(x)], axis=-1) for x in (A, B, P))
    M = np.diag(A) - P.T @ P.conj()
    identity = np.eye(len(A))
    return np.linalg.solve(identity - dt / 2 * M, identity + dt / 2 * M), np.linalg.solve(identity - dt / 2 * M, dt * B)


def low_rank_impulse_response(A, B, C, P, dt, length):
    """The kernels (k, h, length) of diagonal plus low-rank systems, P (r, h, n) and dt (h, 1), joined as above."""
    k, h, n = C.shape
    A, B = (np.broadcast_to(x, (h, n)) for x in (A, B))
    P = np.broadcast_to(P, (len(P), h, n))
    kernels = np.zeros((k, h, length))
    for head in range(h):
        Abar, x = joined(A[head], B[head], P[:, head], dt[head, 0])
        read_outs = np.concatenate([C[:, head], C[:, head].conj()], axis=-1)
        for lag in range(length):
            kernels[:, head, lag] = (read_outs @ x).real
            x = Abar @ x
    return kernels


def direct_convolution(u, kernels):
    """Sums over all pairs of positions, with kernels looked up by lag, and averages over tensor rank."""
    taps = [
        {(-1 - lag if direction else lag): kernel[direction, ..., lag] for direction, lag in np.ndindex(*ends)}
        for kernel in kernels
        for ends in [(kernel.shape[0], kernel.shape[-1])]
    ]
    y = np.zeros((*u.shape[:-1], *kernels[0].shape[2:4]))
    positions = list(np.ndindex(*u.shape[1:-1]))
    for t, s in itertools.product(positions, positions):
        lags = [t_a - s_a for t_a, s_a in zip(t, s, strict=True)]
        if all(lag in axis for lag, axis in zip(lags, taps, strict=True)):
            weight = np.prod([axis[lag] for lag, axis in zip(lags, taps, strict=True)], axis=0).mean(axis=0)
            y[:, *t] += weight * u[:, *s][:, None]
    return y.reshape(*u.shape[:-1], -1)


def selective_states(u, delta, A, B, h0=None, discretization="euler", reverse=False):
    """The states (..., length, d, n) of S6, mode by mode and position by position."""
    *batch, length, _ = u.shape
    states = np.zeros((*batch, length, *A.shape))
    for i, j in np.ndindex(A.shape):
        h = np.zeros(batch) if h0 is None else h0[..., i, j]
        for t in reversed(range(length)) if reverse else range(length):
            step = delta[..., t, i]
            gain = np.expm1(step * A[i, j]) / A[i, j] if discretization == "zoh" and A[i, j] else step
            h = states[..., t, i, j] = np.exp(step * A[i, j]) * h + gain * B[..., t, j] * u[..., t, i]
    return states


def gelu(x):
    return x * scipy.stats.norm.cdf(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
