import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ssm_jax.data.datasets import load_dataset
from ssm_jax.data.resolution import normalize, resample


def pillow(images, resolution):
    """Pillow's bilinear filter, which is antialiased when it reduces, channel by channel in float32."""
    return np.stack(
        [
            np.stack(
                [
                    np.asarray(Image.fromarray(plane).resize((resolution, resolution), Image.Resampling.BILINEAR))
                    for plane in np.moveaxis(image, -1, 0)
                ],
                axis=-1,
            )
            for image in images
        ]
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)


@pytest.mark.parametrize("resolution", [1, 3, 4, 6, 8, 11, 13, 16, 24, 50])
def test_resampling_is_pillows(images, resolution):
    ours = resample(jnp.asarray(images), resolution)
    assert ours.shape == (2, resolution, resolution, 3)
    np.testing.assert_allclose(ours, pillow(images, resolution), atol=1e-5)


def test_the_same_resolution_changes_nothing(images):
    np.testing.assert_array_equal(resample(jnp.asarray(images), 12), images)


@pytest.mark.parametrize("resolution", [1, 5, 12, 31])
def test_a_constant_image_stays_constant(resolution):
    np.testing.assert_allclose(resample(jnp.full((1, 12, 12, 1), 0.7), resolution), 0.7, rtol=1e-5)


def test_resampling_runs_under_jit(images):
    jitted = jax.jit(resample, static_argnums=1)(jnp.asarray(images), 6)
    np.testing.assert_allclose(jitted, pillow(images, 6), atol=1e-5)


def test_normalizing_maps_bytes_per_channel():
    image = np.array([0, 128, 255], np.uint8).reshape(1, 1, 1, 3)
    expected = [(0 - 0.1) / 0.5, (128 / 255 - 0.2) / 0.25, (1 - 0.3) / 2.0]
    normalized = normalize(jnp.asarray(image), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized.ravel(), expected, rtol=1e-6)


def test_normalized_digits_have_mean_0_and_std_1():
    digits = load_dataset("digits")
    source = digits.splits["train"]
    images = normalize(jnp.asarray(np.stack([example["image"] for example in source])), digits.mean, digits.std)
    assert float(images.mean()) == pytest.approx(0, abs=2e-3)
    assert float(images.std()) == pytest.approx(1, abs=2e-3)
