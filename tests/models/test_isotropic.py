import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import drawn, images, split
from oracles import gelu, layer_norm

from ssm_jax import create_model
from ssm_jax.models.isotropic import Block, ConvMixer2D

NAMES = ["isotropic_s4nd", "isotropic_conv2d"]


def small(name, **arguments):
    arguments = {"num_classes": 3, "d_model": 4, "n_layers": 2, "dropout": 0.0} | arguments
    return drawn(lambda: create_model(name, **arguments, rngs=nnx.Rngs(0)))


def call(model, x, **options):
    return np.asarray(jax.jit(lambda x: model(x, **options))(x))


def linear(x, layer):
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def norm(x, layer):
    return layer_norm(x, np.asarray(layer.scale[...]), np.asarray(layer.bias[...]))


@pytest.mark.parametrize(
    ("name", "mixer", "expected"),
    [
        ("isotropic_conv2d", {"kernel_size": 3}, 2_158_602),
        ("isotropic_conv2d", {"kernel_size": 5}, 2_224_138),
        # The paper's 5,282,826 less the 8 x 2 x 64 numbers of the low-rank P, which diagonal kernels do not have.
        ("isotropic_s4nd", {}, 5_281_802),
    ],
)
def test_networks_of_the_paper_have_its_numbers_of_parameters(name, mixer, expected):
    model = nnx.eval_shape(lambda: create_model(name, num_classes=10, mixer=mixer, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == expected


@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_network_is_encoder_residual_blocks_norm_mean_and_decoder(name, rate):
    model = small(name)
    x = linear(images(2, 5, 4, 3), model.encoder)
    for block in model.blocks:
        x = x + call(block.mixer, norm(x, block.norm), rate=rate)
    expected = linear(norm(x, model.norm).mean(axis=(1, 2)), model.head)
    logits = call(model, images(2, 5, 4, 3), rate=rate)
    assert logits.shape == (2, 3)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_rate_reaches_state_spaces_and_not_convolutions():
    x = images(2, 5, 4, 3)
    s4nd, conv2d = small("isotropic_s4nd"), small("isotropic_conv2d")
    assert not np.allclose(call(s4nd, x, rate=2.0), call(s4nd, x))
    np.testing.assert_array_equal(call(conv2d, x, rate=2.0), call(conv2d, x))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_baseline_mixer_is_a_depthwise_convolution_then_gelu_and_a_linear_map(kernel_size):
    mixer = drawn(lambda: ConvMixer2D(3, kernel_size=kernel_size, rngs=nnx.Rngs(0)))
    x = images(2, 4, 5, 3)
    weights, margin = np.asarray(mixer.conv.kernel[...]), kernel_size // 2
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    y = np.zeros(x.shape) + np.asarray(mixer.conv.bias[...])
    for row, column in np.ndindex(kernel_size, kernel_size):
        y += padded[:, row : row + 4, column : column + 5] * weights[row, column, 0]
    np.testing.assert_allclose(call(mixer, x), linear(gelu(y), mixer.output), rtol=0, atol=1e-4)


def test_mixer_arguments_reach_every_block():
    model = nnx.eval_shape(
        lambda: create_model(
            "isotropic_s4nd",
            num_classes=3,
            d_model=4,
            n_layers=3,
            mixer={"d_state": 6, "channels": 2},
            rngs=nnx.Rngs(0),
        )
    )
    assert len(model.blocks) == 3
    assert {block.mixer.kernels[axis].C.shape for block in model.blocks for axis in (0, 1)} == {(2, 2, 1, 2, 4, 3)}


def test_blocks_start_different():
    build = lambda: create_model("isotropic_conv2d", num_classes=3, d_model=4, n_layers=2, rngs=nnx.Rngs(0))  # noqa: E731
    state = jax.jit(lambda: nnx.to_pure_dict(nnx.state(build())))()
    first, second = (state["blocks"][i]["mixer"]["output"]["kernel"] for i in (0, 1))
    assert (first != second).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_used(name):
    f, params = split(small(name))
    x = jnp.array(images(2, 4, 5, 3))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, x)))))(params)
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_view_has_no_dropout(name):
    model = nnx.view(small(name, dropout=0.5), deterministic=True)
    x = images(2, 4, 5, 3)
    np.testing.assert_array_equal(call(model, x), call(small(name), x))


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_that_of_its_key(name):
    f, params = split(small(name, dropout=0.5))
    x = jnp.array(images(2, 4, 5, 3))
    train = jax.jit(lambda key: f(params, x, rngs=nnx.Rngs(dropout=key)))
    first, same, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


class Ones(nnx.Module):
    def __init__(self, d_model, **arguments):
        pass

    def __call__(self, x, *, rate, rngs):
        return jnp.ones_like(x)


def test_block_drops_whole_channels_of_its_mixer():
    block = Block(64, mixer=Ones, dropout=0.25, rngs=nnx.Rngs(0))
    x = np.zeros((4, 3, 5, 64), np.float32)
    update = np.asarray(jax.jit(lambda x: block(x, rngs=nnx.Rngs(dropout=0)))(x))
    np.testing.assert_array_equal(update, np.broadcast_to(update[:, :1, :1], x.shape))
    np.testing.assert_allclose(np.unique(update), [0, 1 / 0.75], rtol=1e-6)
    assert np.mean(update == 0) == pytest.approx(0.25, abs=0.15)
    assert len(np.unique(update[:, 0, 0], axis=0)) == 4


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_logits_agree_with_float32_to_rounding(name):
    half, full = small(name, d_model=8, dtype=jnp.bfloat16), small(name, d_model=8)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    x = images(2, 4, 5, 3)
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm needs it
        logits, expected = call(half, x), call(full, x)
    assert logits.dtype == jnp.bfloat16
    error = np.abs(logits.astype(np.float32) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.5}, "dropout must be in"),
    ],
    ids=str,
)
def test_impossible_arguments_are_rejected(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **{"num_classes": 3, "d_model": 4} | arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kernel_size", [0, 2, -3])
def test_even_kernels_are_rejected(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd, got {kernel_size}"):
        create_model("isotropic_conv2d", num_classes=3, mixer={"kernel_size": kernel_size}, rngs=nnx.Rngs(0))
