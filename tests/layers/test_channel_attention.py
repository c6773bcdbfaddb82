import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import drawn, split
from oracles import sigmoid

from ssm_jax.layers.channel_attention import CBAM, ECA, SqueezeExcite, _maximum
from ssm_jax.pretrained import load_torch


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def call(module, x):
    f, state = split(module)
    return np.asarray(jax.jit(f)(state, x))


def count(build):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(build), nnx.Param)))


def assert_close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("case", "attention", "options"),
    [
        ("se", SqueezeExcite, {"divisor": 8, "use_bias": True}),
        ("se_default", SqueezeExcite, {"divisor": 8, "use_bias": True}),
        ("eca", ECA, {}),
        ("eca5", ECA, {"kernel_size": 5}),
        ("cbam", CBAM, {"reduction": 4}),
    ],
)
def test_layers_are_timms(shared, case, attention, options):
    with np.load(shared / "golden/timm/unit_layers.npz") as file:
        arrays = {k: v for k, v in file.items() if k == "x" or k.startswith(case + "/")}
    # timm has the convolution and the normalisation of the spatial attention in a module of their own.
    state = {
        k.removeprefix(f"{case}/param/").replace("spatial.conv.", "spatial."): v
        for k, v in arrays.items()
        if k.startswith(f"{case}/param/")
    }
    x = jnp.asarray(np.moveaxis(arrays["x"], 1, -1))
    layer = nnx.eval_shape(lambda: attention(x.shape[-1], **options, rngs=nnx.Rngs(0)))
    load_torch(layer, state)
    layer.eval()
    assert_close(np.moveaxis(call(layer, x), -1, 1), arrays[f"{case}/y"])
    if case == "cbam":
        assert_close(np.moveaxis(call(layer.channel, x), -1, 1), arrays["cbam/after_channel"])


def test_squeeze_and_excitation_is_two_maps_without_biases_around_a_relu():
    layer, x = drawn(lambda: SqueezeExcite(32, rngs=nnx.Rngs(0))), images(2, 3, 5, 32)
    first, second = (np.asarray(conv.kernel[0, 0]) for conv in (layer.fc1, layer.fc2))
    assert (first.shape, layer.fc1.bias, layer.fc2.bias) == ((32, 2), None, None)
    gates = sigmoid(np.maximum(x.mean((1, 2)) @ first, 0) @ second)
    assert_close(call(layer, x), x * gates[:, None, None])


def test_eca_is_a_convolution_along_the_channels():
    layer, x = drawn(lambda: ECA(8, kernel_size=5, rngs=nnx.Rngs(0))), images(2, 3, 5, 8)
    padded = np.pad(x.mean((1, 2)), ((0, 0), (2, 2)))
    kernel = np.asarray(layer.conv.kernel[:, 0, 0])
    gates = sigmoid(np.stack([padded[:, c : c + 5] @ kernel for c in range(8)], axis=1))
    assert_close(call(layer, x), x * gates[:, None, None])


@pytest.mark.parametrize(
    ("channels", "size"), [(1, 3), (24, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)]
)
def test_kernels_of_eca_grow_with_the_logarithm_of_the_channels(channels, size):
    assert count(lambda: ECA(channels, rngs=nnx.Rngs(0))) == size


@pytest.mark.parametrize(
    ("channels", "reduction", "divisor", "hidden"),
    [(256, 16, 1, 16), (24, 16, 1, 2), (8, 16, 1, 1), (4, 16, 1, 1), (24, 16, 8, 8), (192, 16, 8, 16), (64, 4, 1, 16)],
)
def test_hidden_channels_are_a_rounded_fraction_and_at_least_the_divisor(channels, reduction, divisor, hidden):
    build = lambda: SqueezeExcite(channels, reduction=reduction, divisor=divisor, rngs=nnx.Rngs(0))  # noqa: E731
    assert count(build) == 2 * channels * hidden


def test_maximum_is_that_of_each_slice_and_hands_its_gradient_to_the_first_that_has_it():
    x = images(2, 3, 4)
    x[0, 1, 2] = x[0, 2, 2] = 9.0
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(_maximum(x, 1) * 3))(jnp.asarray(x))
    np.testing.assert_array_equal(_maximum(jnp.asarray(x), 1), x.max(1, keepdims=True))
    assert value == pytest.approx(3 * x.max(1).sum(), rel=1e-6)
    expected = np.zeros(x.shape)
    np.put_along_axis(expected, x.argmax(1, keepdims=True), 3, axis=1)
    np.testing.assert_array_equal(gradient, expected)
    assert (expected[0, 1, 2], expected[0, 2, 2]) == (3, 0)


def test_gradient_of_a_maximum_over_computed_values_is_finite():
    """`jnp.max` gives NaN here, as XLA on a CPU rounds the normalised values in two ways."""
    layer, x = drawn(lambda: CBAM(8, rngs=nnx.Rngs(0))), images(2, 4, 4, 8)
    f, state = split(layer)
    scale, bias = images(8, seed=1), images(8, seed=2)

    def loss(x):
        y = x - x.mean((0, 1, 2))[None, None, None]
        y = y * (scale * jax.lax.rsqrt(jnp.square(y).mean((0, 1, 2)) + 1e-5))[None, None, None] + bias[None, None, None]
        return jnp.sum(jnp.sin(f(state, y)))

    assert np.isfinite(jax.jit(jax.grad(loss))(x)).all()


def test_initial_values():
    layer = SqueezeExcite(256, use_bias=True, reduction=1, rngs=nnx.Rngs(0))
    assert np.std(layer.fc1.kernel[...]) == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert np.std(layer.fc1.bias[...]) == pytest.approx(1 / (3 * 256) ** 0.5, rel=0.1)
    assert np.abs(layer.fc1.bias[...]).max() <= 1 / 16
    kernels = jnp.stack([ECA(256, rngs=nnx.Rngs(seed)).conv.kernel[...] for seed in range(40)])
    assert np.std(kernels) == pytest.approx(1 / 15**0.5, rel=0.15)
    assert np.abs(kernels).max() <= 1 / 5**0.5


@pytest.mark.parametrize("attention", [SqueezeExcite, ECA, CBAM])
def test_bfloat16_stays_bfloat16(attention):
    half = drawn(lambda: attention(16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    full = drawn(lambda: attention(16, rngs=nnx.Rngs(0)))
    x = jnp.asarray(images(2, 3, 5, 16), jnp.bfloat16)
    y, expected = call(half, x), call(full, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert 0 < np.abs(y.astype(np.float32) - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda rngs: ECA(8, kernel_size=4, rngs=rngs), "kernel_size must be odd, got 4"),
        (lambda rngs: CBAM(8, kernel_size=4, rngs=rngs), "kernel_size must be odd, got 4"),
        (lambda rngs: SqueezeExcite(8, reduction=0, rngs=rngs), "reduction must be at least 1, got 0"),
        (lambda rngs: SqueezeExcite(8, divisor=0, rngs=rngs), "divisor must be at least 1, got 0"),
        (lambda rngs: CBAM(0, rngs=rngs), "channels must be at least 1, got 0"),
        (lambda rngs: ECA(0, rngs=rngs), "channels must be at least 1, got 0"),
    ],
)
def test_impossible_arguments_are_rejected(build, message):
    with pytest.raises(ValueError, match=message):
        build(nnx.Rngs(0))
