import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from ssm_jax.ops import linear_recurrence

scan = jax.jit(linear_recurrence, static_argnames=("axis", "reverse"))


def loop(a, b, axis, h0=None, reverse=False):
    a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
    h = np.zeros_like(b)
    state = np.zeros_like(b[0]) if h0 is None else h0
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        state = h[t] = a[t] * state + b[t]
    return np.moveaxis(h, 0, axis)


def draw(shape, axis, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    a = rng.uniform(-1, 1, shape).astype(dtype)
    h0 = rng.normal(size=np.delete(shape, axis)).astype(dtype)
    return a, rng.normal(size=shape).astype(dtype), h0


@settings(max_examples=15, deadline=None, derandomize=True)
@given(length=st.integers(1, 50), reverse=st.booleans(), start=st.booleans(), seed=st.integers(0, 100))
def test_scan_is_the_loop_at_any_length(length, reverse, start, seed):
    a, b, h0 = draw((length, 2), 0, seed)
    h = scan(a, b, axis=0, h0=h0 if start else None, reverse=reverse)
    np.testing.assert_allclose(h, loop(a, b, 0, h0 if start else None, reverse), rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("reverse", [False, True])
def test_time_is_along_any_axis(axis, reverse):
    a, b, h0 = draw((3, 4, 5), axis)
    h = scan(a, b, axis=axis, h0=h0, reverse=reverse)
    np.testing.assert_allclose(h, loop(a, b, axis, h0, reverse), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_initial_state_acts_before_the_first_step(reverse):
    a, b, h0 = draw((6, 2), 0)
    both = scan(a, b, axis=0, h0=h0, reverse=reverse)
    first, second = (slice(3, 6), slice(0, 3)) if reverse else (slice(0, 3), slice(3, 6))
    half = scan(a[first], b[first], axis=0, h0=h0, reverse=reverse)
    last = half[0 if reverse else -1]
    rest = scan(a[second], b[second], axis=0, h0=last, reverse=reverse)
    np.testing.assert_allclose(both[second], rest, rtol=0, atol=1e-6)


def test_states_may_be_complex():
    rng = np.random.default_rng(0)
    a, b = (np.array(rng.normal(size=(9, 2)) + 1j * rng.normal(size=(9, 2)), np.complex64) / 2 for _ in range(2))
    np.testing.assert_allclose(scan(a, b, axis=0), loop(a, b, 0), rtol=0, atol=1e-5)


def test_a_real_decay_may_drive_a_complex_state():
    a, b, _ = draw((9, 2), 0)
    h = scan(a, b + 1j * a, axis=0)
    assert h.dtype == jnp.complex64
    np.testing.assert_allclose(h, loop(a, b + 1j * a, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """1 + 1/1024 added up 1000 times: in bfloat16 each sum would round to what it was."""
    a = jnp.ones(1000, dtype)
    h = scan(a, jnp.full(1000, 2.0**-10, dtype), axis=0, h0=jnp.ones((), dtype))
    assert h.dtype == jnp.float32
    np.testing.assert_allclose(h[-1], 1 + 1000 * 2.0**-10, rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_finite_differences(reverse):
    with jax.enable_x64(True):
        f = functools.partial(scan, axis=0, reverse=reverse)
        check_grads(lambda a, b, h0: f(a, b, h0=h0), draw((5, 2), 0, dtype=np.float64), 1, ("rev",), 1e-5, 1e-5)
