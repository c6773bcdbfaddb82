import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ssm_jax.layers.conv import Depthwise
from ssm_jax.ops.backend import traced_for


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 5, 9, 4), (2, 1, 2, 1)])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("use_bias", [True, False])
def test_shifted_products_are_the_convolution(shape, kernel_size, use_bias):
    """Values and gradients, of the map and of the parameters, against XLA's convolution, which other devices get."""
    init = {"bias_init": jax.nn.initializers.normal()}
    layer = Depthwise(shape[-1], kernel_size, use_bias=use_bias, **init, rngs=nnx.Rngs(0))
    x, weights = (jax.random.normal(jax.random.key(seed), shape) for seed in (1, 2))

    def loss(layer, x):
        return jnp.sum(weights * jnp.tanh(layer(x)))

    with traced_for("tpu"):
        expected = nnx.value_and_grad(loss, argnums=(0, 1))(layer, x)
        assert "conv_general_dilated" in str(jax.make_jaxpr(layer)(x))
    with traced_for("cpu"):
        ours = nnx.value_and_grad(loss, argnums=(0, 1))(layer, x)
        assert "conv_general_dilated" not in str(jax.make_jaxpr(layer)(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, expected)


def test_products_are_of_the_layer_s_dtype():
    layer = Depthwise(4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((1, 4, 4, 4))).dtype == jnp.bfloat16


@pytest.mark.parametrize("kernel_size", [0, 2, 4, -1])
def test_a_kernel_without_a_middle_is_refused(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd, got {kernel_size}"):
        Depthwise(4, kernel_size, rngs=nnx.Rngs(0))
