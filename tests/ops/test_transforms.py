import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.ops.transforms import TRANSFORMS, inverse_clamped, transform

VALUES = jnp.array([1e-4, 1e-3, 0.5, 0.999, 1.0, 3.0, 100.0, 5000.0])
RANGE = {"sigmoid": VALUES[:4], "exp": VALUES, "none": VALUES, "softplus": VALUES, "relu": VALUES}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inverse_inverts(name):
    t = TRANSFORMS[name]
    offset = 1e-4 if name == "relu" else 0.0
    np.testing.assert_allclose(t.forward(t.inverse(RANGE[name])), RANGE[name] + offset, rtol=2e-5)


@pytest.mark.parametrize("name", ["exp", "relu", "sigmoid", "softplus"])
def test_values_are_positive_whatever_the_parameter(name):
    assert (TRANSFORMS[name].forward(jnp.linspace(-50.0, 50.0, 101)) > 0).all()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_value_starts_below_the_floor(name):
    t = TRANSFORMS[name]
    start = t.forward(inverse_clamped(t, jnp.array([-1.0, 0.0, 1e-5, 1e-4])))
    np.testing.assert_allclose(start, 2e-4 if name == "relu" else 1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_parameters_at_the_floor_have_a_gradient(name):
    t = TRANSFORMS[name]
    assert jax.grad(t.forward)(inverse_clamped(t, jnp.array(0.0))) > 0


def test_unknown_transform_is_rejected_under_the_callers_name():
    with pytest.raises(ValueError, match="dt_transform must be one of none, exp, relu, sigmoid, softplus, got 'log'"):
        transform("dt_transform", "log")
