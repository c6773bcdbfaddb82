import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from oracles import impulse_response, recurrence

from ssm_jax.ops import bandlimit_mask, s4d_kernel, vandermonde

jitted_kernel = jax.jit(s4d_kernel, static_argnames=("length", "discretization"))
few = settings(max_examples=10, deadline=None, derandomize=True)


def system(seed, *, heads=3, shared=False, untied=False, n=4, k=2):
    rng = np.random.default_rng(seed)
    sets = 1 if shared else heads
    A = -rng.uniform(0.1, 2.0, (sets, n)) - 1j * rng.uniform(0.0, 10.0, (sets, n))
    B = rng.normal(size=(sets, n)) + 1j * rng.normal(size=(sets, n))
    C = rng.normal(size=(k, heads, n)) + 1j * rng.normal(size=(k, heads, n))
    return A, B, C, rng.uniform(0.1, 1.0, (heads, n if untied else 1))


def kernel32(A, B, C, dt, length, **options):
    A, B, C = (x.astype(np.complex64) for x in (A, B, C))
    return np.asarray(jitted_kernel(A, B, C, dt.astype(np.float32), length, **options))


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("shared", [False, True], ids=["sets", "shared"])
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_kernel_is_the_impulse_response_of_the_recurrence(method, shared, untied):
    A, B, C, dt = system(0, shared=shared, untied=untied)
    expected = impulse_response(A, B, C, dt, 20, method)
    with jax.enable_x64(True):
        kernel = jitted_kernel(A, B, C, dt, 20, discretization=method)
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=1e-12)
    single = kernel32(A, B, C, dt, 20, discretization=method)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_convolution_with_the_kernel_is_the_recurrence(method):
    A, B, C, dt = system(1)
    u = np.random.default_rng(2).normal(size=(3, 17))
    kernel = kernel32(A, B, C, dt, 17, discretization=method)
    y = [[np.convolve(kernel[k, h], u[h])[:17] for h in range(3)] for k in range(2)]
    expected = recurrence(A, B, C, dt, u, method)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_vandermonde_adds_each_mode_and_its_conjugate():
    rng = np.random.default_rng(3)
    v = rng.normal(size=(2, 3, 4)) + 1j * rng.normal(size=(2, 3, 4))
    x = rng.uniform(0.5, 1.0, (3, 4)) * np.exp(1j * rng.uniform(-3, 3, (3, 4)))
    expected = [np.sum(v * x**power + (v * x**power).conj(), axis=-1).real for power in range(9)]
    result = vandermonde(jnp.array(v, jnp.complex64), jnp.log(jnp.array(x, jnp.complex64)), 9)
    np.testing.assert_allclose(result, np.stack(expected, -1), rtol=0, atol=2e-5)


@few
@given(seed=st.integers(0, 1000), scale=st.floats(-3, 3, width=32))
def test_kernel_is_linear_in_the_read_out(seed, scale):
    A, B, C, dt = system(seed)
    other = system(seed + 1)[2]
    combined = kernel32(A, B, C + scale * other, dt, 8)
    separate = kernel32(A, B, C, dt, 8) + scale * kernel32(A, B, other, dt, 8)
    np.testing.assert_allclose(combined, separate, rtol=0, atol=1e-4)


@few
@given(seed=st.integers(0, 1000))
def test_zoh_kernel_at_rate_two_adds_pairs_of_samples(seed):
    """Abar(2 dt) = Abar(dt)^2 and Bbar(2 dt) = (1 + Abar) Bbar: holding the input on a coarser grid is exact."""
    A, B, C, dt = system(seed)
    fine = kernel32(A, B, C, dt, 16)
    np.testing.assert_allclose(kernel32(A, B, C, 2 * dt, 8), fine[..., ::2] + fine[..., 1::2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_kernels_sample_the_continuous_function_to_second_order(method):
    """kernel[l] / dt approaches 2 Re C exp(t A) B in the middle of its step, t = (l + 1/2) dt."""
    A, B, C, _ = system(4)

    def error(dt):
        steps = round(2.0 / dt)
        t = (np.arange(steps) + 0.5) * dt
        continuous = 2 * np.einsum("khn,hnl->khl", C * B, np.exp(A[..., None] * t)).real
        with jax.enable_x64(True):
            kernel = jitted_kernel(A, B, C, np.full((3, 1), dt), steps, discretization=method)
        return np.abs(np.asarray(kernel) / dt - continuous).max()

    assert error(0.01) / error(0.005) == pytest.approx(4.0, rel=0.1)


def test_gradients_are_those_of_finite_differences():
    A, B, C, dt = system(5, heads=2, n=2)
    with jax.enable_x64(True):

        def f(A_re, A_im, B_re, B_im, C_re, C_im, dt):
            A, B, C = jax.lax.complex(A_re, A_im), jax.lax.complex(B_re, B_im), jax.lax.complex(C_re, C_im)
            return [s4d_kernel(A, B, C, dt, 5, discretization=method) for method in ("zoh", "bilinear")]

        arguments = [jnp.array(part) for x in (A, B, C) for part in (x.real, x.imag)]
        check_grads(jax.jit(f), (*arguments, jnp.array(dt)), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


def test_modes_at_the_bandlimit_are_removed():
    A = jnp.array([[-0.5, -0.5 - 0.25j * jnp.pi, -0.5 + 0.25j * jnp.pi]], jnp.complex64)  # 0, 1/8, 1/8 cycles a sample
    dt = jnp.ones((1, 1))
    np.testing.assert_array_equal(bandlimit_mask(A, dt, 0.25), [[True, False, False]])
    np.testing.assert_array_equal(bandlimit_mask(A, dt, 0.2501), [[True, True, True]])


def test_mask_is_per_head_because_steps_are():
    A = jnp.array([[-0.5 - 0.25j * jnp.pi]], jnp.complex64)
    np.testing.assert_array_equal(bandlimit_mask(A, jnp.array([[0.9], [1.0], [1.1]]), 0.25), [[True], [False], [False]])


def test_infinite_bandlimit_keeps_all_modes():
    A, _, _, dt = system(6)
    assert bandlimit_mask(jnp.array(A, jnp.complex64), jnp.array(dt, jnp.float32), float("inf")).all()


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_vandermonde_and_its_derivatives_are_the_plain_sum(length, backend, monkeypatch):
    """In the form for each backend."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)

    def plain(v, log_x):
        powers = jnp.exp(log_x[..., None] * jnp.arange(length, dtype=float))
        return 2 * jnp.einsum("khn,hnl->khl", v, powers).real

    rng = np.random.default_rng(7)
    with jax.enable_x64(True):
        v = jnp.array(rng.normal(size=(2, 3, 4)) + 1j * rng.normal(size=(2, 3, 4)))
        log_x = jnp.array(-rng.uniform(0.01, 0.2, (3, 4)) - 1j * rng.uniform(0, 3, (3, 4)))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            expected = jax.value_and_grad(lambda v, x: jnp.sum(jnp.sin(plain(v, x))), argnums=(0, 1))(v, log_x)
            forward = jax.jvp(plain, (v, log_x), (1j * v, log_x - 1))[1]
        ours = jax.jit(jax.value_and_grad(lambda v, x: jnp.sum(jnp.sin(vandermonde(v, x, length))), argnums=(0, 1)))(
            v, log_x
        )
        our_forward = jax.jvp(lambda v, x: vandermonde(v, x, length), (v, log_x), (1j * v, log_x - 1))[1]
    for result, theirs in zip(jax.tree.leaves((ours, our_forward)), jax.tree.leaves((expected, forward)), strict=True):
        np.testing.assert_allclose(result, theirs, rtol=1e-9, atol=1e-9)


def test_vandermonde_keeps_no_array_of_modes_by_length():
    h, n, length = 64, 32, 1024
    shapes = (jax.ShapeDtypeStruct((1, h, n), jnp.complex64), jax.ShapeDtypeStruct((h, n), jnp.complex64))
    backward = jax.grad(lambda v, x: jnp.sum(vandermonde(v, x, length) ** 2), argnums=(0, 1))
    program = jax.jit(backward).lower(*shapes).compile().as_text()
    sizes = [np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"\b[fc]\d+\[([\d,]+)\]", program)]
    assert h * length <= max(sizes) < h * n * length / 4
