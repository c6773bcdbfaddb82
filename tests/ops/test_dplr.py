import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from oracles import joined, low_rank_impulse_response

from ssm_jax.ops import dplr_kernel, state_matrices, truncate

kernel = jax.jit(dplr_kernel, static_argnames="length")
jitted_truncate = jax.jit(truncate, static_argnames=("length", "inverse"))


def system(seed, *, rank=1, heads=3, shared=False, n=4, k=2):
    rng = np.random.default_rng(seed)
    sets = 1 if shared else heads
    draw = lambda *shape: rng.normal(size=shape) + 1j * rng.normal(size=shape)  # noqa: E731
    A = -rng.uniform(0.1, 2.0, (sets, n)) - 1j * rng.uniform(0.0, 10.0, (sets, n))
    return A, draw(sets, n), draw(k, heads, n), draw(rank, sets, n), rng.uniform(0.1, 1.0, (heads, 1))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("shared", [False, True], ids=["sets", "shared"])
def test_kernel_is_the_impulse_response_of_the_dense_system(rank, shared):
    arguments = system(0, rank=rank, shared=shared)
    expected = low_rank_impulse_response(*arguments, 20)
    with jax.enable_x64(True):
        np.testing.assert_allclose(kernel(*arguments, 20), expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    single = kernel(*(x.astype(np.complex64) for x in arguments[:4]), arguments[4].astype(np.float32), 20)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rank", [1, 2])
def test_truncation_is_that_of_the_dense_system_and_its_inverse_undoes_it(rank):
    A, B, C, P, dt = system(1, rank=rank)
    expected = np.empty_like(C)
    for head in range(3):
        Abar, _ = joined(A[head], B[head], P[:, head], dt[head, 0])
        both = np.concatenate([C[:, head], C[:, head].conj()], axis=-1)
        expected[:, head] = (both @ (np.eye(8) - np.linalg.matrix_power(Abar, 7)))[:, :4]
    with jax.enable_x64(True):
        truncated = jitted_truncate(A, C, P, dt, 7)
        np.testing.assert_allclose(truncated, expected, rtol=0, atol=1e-11)
        np.testing.assert_allclose(jitted_truncate(A, truncated, P, dt, 7, inverse=True), C, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2])
def test_gradients_are_those_of_finite_differences(rank):
    arguments = system(2, rank=rank, heads=2, n=2)
    with jax.enable_x64(True):

        def f(re, im, dt):
            A, B, C, P = (jax.lax.complex(*parts) for parts in zip(re, im, strict=True))
            back = truncate(A, C, P, dt, 3, inverse=True)
            return dplr_kernel(A, B, C, P, dt, 5), back.real, back.imag

        re, im = ([jnp.array(part(x)) for x in arguments[:4]] for part in (np.real, np.imag))
        check_grads(jax.jit(f), (re, im, jnp.array(arguments[4])), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [64, 1024])
def test_float32_is_exact_for_fourier(length):
    """By the release's generating function it is off by 2.5e-3."""
    start = state_matrices("fourier", 64)
    rng = np.random.default_rng(0)
    C = rng.normal(size=(2, 8, 32)) + 1j * rng.normal(size=(2, 8, 32))
    A, B, C, P = (np.asarray(x, np.complex64) for x in (start.A, start.B, C, start.P))
    dt = np.geomspace(0.01, 1.0, 8, dtype=np.float32)[:, None]
    single = np.asarray(kernel(A, B, C, P, dt, length))
    with jax.enable_x64(True):
        expected = np.asarray(kernel(*(x.astype(complex) for x in (A, B, C, P)), dt.astype(float), length))
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("length", [4, 32])
def test_float32_restores_read_outs_of_a_mode_that_hardly_decays(length):
    """By the difference of I and Abar^length they are off by 4e-4."""
    start = state_matrices("fourier", 64)
    rng = np.random.default_rng(0)
    C = rng.normal(size=(2, 8, 32)) + 1j * rng.normal(size=(2, 8, 32))
    A, P = (np.asarray(x, np.complex64) for x in (start.A - 1e-4 * (1 + 1j), start.P))
    dt = np.geomspace(0.1, 1.0, 8, dtype=np.float32)[:, None]
    with jax.enable_x64(True):
        double = A.astype(complex), P.astype(complex), dt.astype(float)
        truncated = np.asarray(jitted_truncate(double[0], C, *double[1:], length), np.complex64)
        expected = jitted_truncate(double[0], truncated.astype(complex), *double[1:], length, inverse=True)
    single = jitted_truncate(A, truncated, P, dt, length, inverse=True)
    assert single.dtype == np.complex64
    np.testing.assert_allclose(single, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
