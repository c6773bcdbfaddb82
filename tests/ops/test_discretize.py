import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import dense_step

from ssm_jax.ops import discretize

RNG = np.random.default_rng(0)
A = -RNG.uniform(0.1, 2.0, (3, 4)) - 1j * RNG.uniform(0.0, 20.0, (3, 4))
B = RNG.normal(size=(3, 4)) + 1j * RNG.normal(size=(3, 4))


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("n_dt", [1, 4], ids=["tied", "untied"])
def test_modes_step_like_the_dense_system(method, n_dt):
    dt = RNG.uniform(0.01, 1.0, (3, n_dt))
    with jax.enable_x64(True):
        log_Abar, Bbar = discretize(jnp.array(A), jnp.array(B), jnp.array(dt), method)
        Abar = np.exp(log_Abar)
    for head in range(3):
        expected = dense_step(A[head], B[head], dt[head], method)
        np.testing.assert_allclose(np.diag(Abar[head]), expected[0], rtol=0, atol=1e-13)
        np.testing.assert_allclose(Bbar[head], expected[1], rtol=0, atol=1e-13)


def test_zoh_at_twice_the_step_is_two_steps():
    dt = jnp.full((3, 1), 0.3)
    log_Abar, Bbar = discretize(jnp.array(A, jnp.complex64), jnp.array(B, jnp.complex64), dt)
    log_Abar_2, Bbar_2 = discretize(jnp.array(A, jnp.complex64), jnp.array(B, jnp.complex64), 2 * dt)
    np.testing.assert_array_equal(log_Abar_2, 2 * log_Abar)
    np.testing.assert_allclose(Bbar_2, Bbar * (1 + np.exp(log_Abar)), rtol=1e-5)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_stable_modes_decay_at_any_step(method):
    dt = jnp.logspace(-4, 4, 3)[:, None]
    log_Abar, _ = discretize(jnp.array(A, jnp.complex64), jnp.array(B, jnp.complex64), dt, method)
    assert (log_Abar.real < 0).all()


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_tiny_steps_keep_their_digits(method):
    """exp(z) - 1 would lose all of them in float32."""
    _, Bbar = discretize(
        jnp.array(A, jnp.complex64), jnp.array(B, jnp.complex64), jnp.full((3, 1), 1e-8, jnp.float32), method
    )
    np.testing.assert_allclose(np.asarray(Bbar) / np.float32(1e-8), B, rtol=1e-5)


def test_unknown_method_is_rejected():
    with pytest.raises(ValueError, match="discretization must be 'zoh' or 'bilinear', got 'euler'"):
        discretize(jnp.array(A, jnp.complex64), jnp.array(B, jnp.complex64), jnp.ones((3, 1)), "euler")
