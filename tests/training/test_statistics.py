import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ssm_jax.layers import S4ND
from ssm_jax.layers.s6la import Decay
from ssm_jax.training.sharding import make_mesh, replicated, state_shardings
from ssm_jax.training.statistics import ssm_statistics


def geometric(x):
    return np.exp(np.mean(np.log(np.asarray(x, np.float64))))


def parameters(model, name):
    """All parameters of this name, end to end."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return np.concatenate([np.ravel(variable[...]) for path, variable in flat if path[-1] == name])


def test_they_are_those_of_what_s4nd_convolves_with():
    model = S4ND(8, dims=2, d_state=4, dt_min=0.1, dt_max=1.0, rngs=nnx.Rngs(0))
    found = ssm_statistics(model)
    dt = np.exp(parameters(model, "inv_dt"))
    A = np.hypot(np.exp(parameters(model, "A_real")), parameters(model, "A_imag"))
    assert len(dt) == 2 * 8
    expected = {"dt_min": dt.min(), "dt_mean": geometric(dt), "dt_max": dt.max()}
    expected |= {"A_min": A.min(), "A_mean": geometric(A), "A_max": A.max()}
    assert {f"ssm/s4nd/{name}" for name in expected} == set(found)
    for name, value in expected.items():
        assert found[f"ssm/s4nd/{name}"] == pytest.approx(value, rel=1e-5)
    assert 0.1 <= found["ssm/s4nd/dt_min"] <= found["ssm/s4nd/dt_max"] <= 1.0


def test_a_transform_of_dt_is_seen_through():
    model = S4ND(8, dims=1, d_state=4, dt_min=0.2, dt_max=0.2, dt_transform="softplus", rngs=nnx.Rngs(0))
    found = ssm_statistics(model)
    for end in ("min", "mean", "max"):
        assert found[f"ssm/s4nd/dt_{end}"] == pytest.approx(0.2, rel=1e-5)


def test_they_are_those_of_the_state_along_the_depth():
    """Of all stages: a state per position, and one per image and head."""
    options = {"a_init": "s4d_real", "train_a": True, "param_dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    model = nnx.List([Decay((6,), d_delta=6, **options), Decay((4, 3), d_delta=4, **options)])
    found = ssm_statistics(model)
    delta = np.log1p(np.exp(parameters(model, "dt_bias")))
    A = [1, 2, 3, 4, 5, 6, *[1, 2, 3] * 4]
    expected = {"dt_min": delta.min(), "dt_mean": geometric(delta), "dt_max": delta.max()}
    expected |= {"A_min": 1, "A_mean": geometric(A), "A_max": 6}
    assert {f"ssm/s6la/{name}" for name in expected} == set(found)
    for name, value in expected.items():
        assert found[f"ssm/s6la/{name}"] == pytest.approx(value, rel=1e-5)
    assert 0.001 * 0.999 <= found["ssm/s6la/dt_min"] <= found["ssm/s6la/dt_max"] <= 0.1 * 1.001


def test_a_network_without_state_spaces_has_none():
    assert ssm_statistics(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) == {}


def test_they_are_the_same_of_divided_parameters():
    model = S4ND(64, dims=1, d_state=16, n_ssm=None, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    rules = [("A_real", 0), ("A_imag", 0), ("inv_dt", 0)]
    divided = jax.device_put(params, state_shardings(params, mesh, rules))
    assert not jax.tree.leaves(divided["kernels"][0]["A_imag"])[0].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        compute = jax.jit(lambda params: ssm_statistics(nnx.merge(graphdef, params)), out_shardings=replicated(mesh))
        found = compute(divided)
    for name, value in ssm_statistics(model).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
        assert found[name].dtype == jnp.float32
