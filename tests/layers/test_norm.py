import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import drawn
from oracles import layer_norm

from ssm_jax.layers.norm import BatchNorm, LayerNorm
from ssm_jax.training.sharding import batch_sharding, replicated


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch_norm(x, scale, bias, epsilon=1e-5):
    x = x.astype(float)
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + epsilon) * scale + bias


def build(num_features, *, scale=None, bias=None, mean=None, var=None, **options):
    layer = BatchNorm(num_features, **options, rngs=nnx.Rngs(0))
    for variable, value in [(layer.scale, scale), (layer.bias, bias), (layer.mean, mean), (layer.var, var)]:
        if value is not None:
            variable[...] = jnp.asarray(value, variable.dtype)
    return layer


def statistics(layer):
    return np.asarray(layer.mean[...]), np.asarray(layer.var[...])


def loss(scale, bias, x, weights):
    layer = build(x.shape[-1], scale=scale, bias=bias)
    return jnp.sum(layer(x) * weights)


def assert_close(ours, expected, tolerance=1e-6):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1.0))


# case3 is the cumulative average, momentum None in PyTorch, which BatchNorm does not have.
@pytest.mark.parametrize("case", ["case0", "case1", "case2", "case4"])
def test_two_steps_are_pytorchs(shared, case):
    with np.load(shared / "golden/timm/unit_batchnorm.npz") as file:
        arrays = {k.removeprefix(case + "/"): v for k, v in file.items() if k.startswith(case + "/")}
        options = json.loads(str(file["meta"]))["cases"][case]
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    initial = {ours: arrays.get(f"param/{theirs}") for ours, theirs in names.items()}
    layer = build(
        options["shape"][1],
        momentum=1 - options["momentum"],
        epsilon=options["eps"],
        affine=options["affine"],
        **initial,
    )
    nchw = lambda x: np.moveaxis(np.asarray(x), -1, 1)  # noqa: E731
    for step in (0, 1):
        x, weights = (jnp.asarray(np.moveaxis(arrays[f"{name}{step}"], 1, -1)) for name in "xw")
        assert_close(nchw(nnx.view(layer, use_running_average=True)(x)), arrays[f"eval_y{step}"])
        gradient = jax.grad(lambda x, weights=weights: jnp.sum(nnx.clone(layer)(x) * weights))(x)
        assert_close(nchw(gradient), arrays[f"grad_x{step}"])
        assert_close(nchw(layer(x)), arrays[f"y{step}"])
        assert_close(layer.mean[...], arrays[f"after{step}/running_mean"])
        assert_close(layer.var[...], arrays[f"after{step}/running_var"])


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (2, 3, 4, 3), (2, 2, 3, 2, 3)])
def test_channels_have_the_scale_and_bias_as_deviation_and_mean_over_all_other_axes(shape):
    scale, bias = normal(3, seed=1), normal(3, seed=2)
    x = 3 * normal(*shape) + 2
    layer = build(3, scale=scale, bias=bias, momentum=0.0)
    assert_close(layer(jnp.asarray(x)), batch_norm(x, scale, bias))
    flat = x.reshape(-1, 3).astype(float)
    assert_close(layer.mean[...], flat.mean(0))
    assert_close(layer.var[...], flat.var(0, ddof=1))


def test_gradient_is_that_of_the_quotient():
    x, weights, scale, bias = normal(2, 2, 3, 2), normal(2, 2, 3, 2, seed=1), normal(2, seed=2), normal(2, seed=3)
    ours = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*map(jnp.asarray, (scale, bias, x, weights)))
    values = [scale.astype(float), bias.astype(float), x.astype(float)]
    for number, gradient in enumerate(ours):
        expected = np.zeros(gradient.shape)
        for index in np.ndindex(gradient.shape):
            sums = []
            for step in (-1e-5, 1e-5):
                moved = [value.copy() for value in values]
                moved[number][index] += step
                sums.append((batch_norm(moved[2], *moved[:2]) * weights).sum())
            expected[index] = (sums[1] - sums[0]) / 2e-5
        assert_close(gradient, expected, 1e-5)


def test_running_statistics_approach_those_of_the_data():
    layer = build(2, momentum=0.5)
    x = jnp.asarray(normal(40, 2) * np.float32([1, 3]) + np.float32([5, -2]))
    for _ in range(3):
        layer(x)
    mean, var = statistics(layer)
    assert_close(mean, (1 - 0.5**3) * np.mean(x, 0))
    assert_close(var, 0.5**3 + (1 - 0.5**3) * np.var(x, 0, ddof=1))


def relative_error(mean, deviation, running_mean):
    x = (mean + deviation * normal(32, 16, 16, 4)).astype(np.float32)
    expected = batch_norm(x, 1.0, 0.0)
    y = jax.jit(lambda x: build(4, mean=np.full(4, running_mean))(x))(x)
    return np.abs(y - expected).max() / np.abs(expected).max()


def test_a_large_mean_costs_no_digits_once_the_running_mean_is_near():
    assert relative_error(1000.0, 1.0, 1000.0) < 1e-6
    assert relative_error(1000.0, 0.1, 1000.0) < 1e-6
    assert relative_error(1000.0, 1.0, 990.0) < 2e-5


def test_a_mean_of_30_deviations_costs_few_digits_in_the_first_step():
    assert relative_error(30.0, 1.0, 0.0) < 2e-4


def test_constant_channels_become_the_bias():
    x = np.full((4, 3, 2), 7.1, np.float32)
    y = build(2, bias=[1.0, 2.0])(jnp.asarray(x))
    assert_close(y, np.broadcast_to([1.0, 2.0], x.shape), 1e-2)


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    mean, var, scale, bias = normal(3), normal(3, seed=1) ** 2 + 0.5, normal(3, seed=2), normal(3, seed=3)
    layer = build(3, mean=mean, var=var, scale=scale, bias=bias)
    x = normal(2, 4, 3, seed=4)
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    evaluated = nnx.view(layer, use_running_average=True)
    assert_close(evaluated(jnp.asarray(x)), expected)
    assert_close(evaluated(jnp.asarray(x[:1])), expected[:1])
    np.testing.assert_array_equal(statistics(layer), [mean, var])
    layer.eval()
    assert_close(layer(jnp.asarray(x)), expected)


def test_statistics_do_not_learn():
    def moved(x):
        layer = build(2)
        layer(x)
        return layer.mean[...].sum() + layer.var[...].sum()

    np.testing.assert_array_equal(jax.grad(moved)(jnp.asarray(normal(4, 2))), 0)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_is_computed_in_float32(param_dtype):
    x = jnp.asarray(normal(16, 8, 8, 4) + 3, jnp.bfloat16)
    layer = build(4, momentum=0.0, param_dtype=param_dtype)
    y = jax.jit(lambda x: nnx.clone(layer)(x))(x)
    assert (y.dtype, layer.scale.dtype, layer.mean.dtype) == (jnp.bfloat16, param_dtype, jnp.float32)
    assert_close(y.astype(jnp.float32), batch_norm(np.asarray(x, np.float32), 1.0, 0.0), 2**-8)
    layer(x)
    assert_close(layer.mean[...], np.asarray(x, float).mean((0, 1, 2)))
    assert_close(layer.var[...], np.asarray(x, float).reshape(-1, 4).var(0, ddof=1), 1e-5)
    assert build(4, dtype=jnp.float32)(x).dtype == jnp.float32


def test_eight_devices_share_statistics_by_sums_alone(mesh):
    x, weights = normal(16, 3, 2, 5) + np.arange(16, dtype=np.float32)[:, None, None, None], normal(16, 3, 2, 5, seed=1)
    layer = drawn(lambda: BatchNorm(5, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(layer)

    def step(state, x, weights):
        def loss(state, x):
            layer = nnx.merge(graphdef, state, copy=True)
            y = layer(x)
            return jnp.sum(y * weights), (y, layer.mean[...], layer.var[...])

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    expected = jax.jit(step)(state, x, weights)
    whole, parts = replicated(mesh), batch_sharding(mesh)
    arguments = (jax.device_put(state, whole), jax.device_put(x, parts), jax.device_put(weights, parts))
    compiled = jax.jit(step).lower(*arguments).compile()
    for ours, alone in zip(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(expected), strict=True):
        assert_close(ours, np.asarray(alone), 1e-5)
    text = compiled.as_text()
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert {name for name in names if name in text} == {"all-reduce"}


def test_one_value_per_channel_has_no_variance():
    with pytest.raises(ValueError, match=r"x must have more than one value per channel in training, got shape \(1, 1"):
        build(3)(jnp.ones((1, 1, 3)))
    assert nnx.view(build(3), use_running_average=True)(jnp.ones((1, 1, 3))).shape == (1, 1, 3)


def test_layer_norm_keeps_its_digits_at_a_large_mean():
    x = (1000 + normal(6, 32)).astype(np.float32)
    layer = drawn(lambda: LayerNorm(32, rngs=nnx.Rngs(0)))
    scale, bias = np.asarray(layer.scale[...]), np.asarray(layer.bias[...])
    assert_close(jax.jit(layer)(x), layer_norm(x.astype(float), scale, bias), 1e-4)


def test_rows_that_do_not_count_change_nothing_for_those_that_do():
    x, some = normal(6, 3, 4), np.array([True, False, True, True, False, False])
    x[~some] = 1e3
    masked, alone = build(4), build(4)
    assert_close(masked(jnp.asarray(x), where=jnp.asarray(some))[some], alone(jnp.asarray(x[some])), 1e-5)
    for ours, expected in zip(statistics(masked), statistics(alone), strict=True):
        assert_close(ours, expected)
    f = lambda x, where: jnp.sum(jnp.sin(build(4)(x, where=where))[some])  # noqa: E731
    gradient = jax.grad(f)(jnp.asarray(x), jnp.asarray(some))
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(build(4)(x))))(jnp.asarray(x[some]))
    assert_close(gradient[some], expected, 1e-5)
    np.testing.assert_array_equal(gradient[~some], 0)
