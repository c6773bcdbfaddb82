import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from flax import nnx
from modules import drawn, split

from ssm_jax.layers.attention import Attention


def small(d_model=6, num_heads=2, **arguments):
    return drawn(lambda: Attention(d_model, num_heads=num_heads, **arguments, rngs=nnx.Rngs(0)))


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def call(layer, x, **options):
    return np.asarray(jax.jit(lambda x: layer(x, **options))(x))


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_every_position_is_a_mean_of_values_weighted_by_its_query(num_heads, qkv_bias):
    layer = small(num_heads=num_heads, qkv_bias=qkv_bias)
    x = tokens(2, 5, 6)
    qkv = x @ np.asarray(layer.qkv.kernel[...]) + (np.asarray(layer.qkv.bias[...]) if qkv_bias else 0)
    width = 6 // num_heads
    y = np.zeros((2, 5, 6))
    for example, head in np.ndindex(2, num_heads):
        own = slice(head * width, (head + 1) * width)
        q, k, v = (part[example, :, own] for part in np.split(qkv, 3, axis=-1))
        for i in range(5):
            y[example, i, own] = scipy.special.softmax(k @ q[i] / np.sqrt(width)) @ v
    expected = y @ np.asarray(layer.proj.kernel[...]) + np.asarray(layer.proj.bias[...])
    np.testing.assert_allclose(call(layer, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_attention_knows_no_order():
    layer, x, order = small(), tokens(2, 5, 6), [3, 0, 4, 1, 2]
    np.testing.assert_allclose(call(layer, x[:, order]), call(layer, x)[:, order], atol=1e-5)


def test_rate_changes_nothing():
    layer, x = small(), tokens(2, 5, 6)
    np.testing.assert_array_equal(call(layer, x, rate=4.0), call(layer, x))


def test_every_parameter_is_used():
    f, params = split(small())
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, jnp.array(tokens(2, 5, 6)))))))(params)
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


def test_weights_start_small_and_biases_at_zero():
    layer = Attention(64, num_heads=2, rngs=nnx.Rngs(0))
    for linear in (layer.qkv, layer.proj):
        assert np.std(linear.kernel[...]) == pytest.approx(0.02, rel=0.05)
        assert not np.any(linear.bias[...])


@pytest.mark.parametrize("num_heads", [0, 4, -2, 12])
def test_heads_that_do_not_divide_the_width_are_rejected(num_heads):
    with pytest.raises(ValueError, match=f"num_heads must divide d_model=6, got {num_heads}"):
        Attention(6, num_heads=num_heads, rngs=nnx.Rngs(0))
