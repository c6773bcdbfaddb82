"""That every field of a config gets where it belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import classification
from ssm_jax.data import recipe
from ssm_jax.data.augment import Augment, CenterCrop
from ssm_jax.data.clips import ClipAugment, ClipCenter
from ssm_jax.data.datasets import Dataset
from ssm_jax.data.mix import mix, random_erasing

IMAGES = Dataset(splits={}, resolution=96, class_names=("a", "b"), mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), title="")
VIDEOS = Dataset(
    splits={}, resolution=96, class_names=("a", "b"), mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), title="", frames=5
)


def test_images_are_augmented_as_the_config_says():
    config = classification.get_config()
    config.augment.update(crop_scale=(0.3, 0.9), interpolation="random", flip=True, rand_augment="rand-m5-n1")
    assert recipe.train_transform(IMAGES, config.data, config.augment) == Augment(
        size=96, crop_scale=(0.3, 0.9), interpolation="random", flip=True, rand_augment="rand-m5-n1", fill=(26, 51, 76)
    )
    config.augment.update(crop_scale=(), crop_padding=3, rand_augment="", color_jitter=0.4, flip=False)
    assert recipe.train_transform(IMAGES, config.data, config.augment) == Augment(
        size=96, crop_padding=3, interpolation="random", color_jitter=0.4, fill=(26, 51, 76)
    )


def test_images_are_evaluated_as_the_config_says():
    config = classification.get_config()
    config.eval.update(crop_pct=0.875, interpolation="bilinear")
    expected = CenterCrop(size=96, crop_pct=0.875, interpolation="bilinear")
    assert recipe.eval_transform(IMAGES, config.data, config.eval) == expected


def test_clips_are_what_the_config_says():
    config = classification.get_config()
    config.data.seconds = 1.5
    config.augment.update(short_side=(100, 120), flip=True, rand_augment="rand-m7-n1")
    config.eval.short_side = 110
    clip = {"frames": 5, "seconds": 1.5, "size": 96}
    assert recipe.train_transform(VIDEOS, config.data, config.augment) == ClipAugment(
        **clip, short_side=(100, 120), flip=True, rand_augment="rand-m7-n1", fill=(26, 51, 76)
    )
    assert recipe.eval_transform(VIDEOS, config.data, config.eval) == ClipCenter(**clip, short_side=110)


@pytest.mark.parametrize("fields", [{}, {"mix_switch": 0.0}, {"mix_switch": 1.0}, {"mix_probability": 0.3}])
def test_batches_are_erased_and_then_mixed_as_the_config_says(fields):
    options = classification.get_config().augment
    options.update({"erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "mix_group": 4, **fields})
    images = jnp.asarray(np.random.default_rng(0).normal(size=(16, 12, 12, 3)), jnp.float32)
    targets = jnp.eye(16)
    first, second = jax.random.split(jax.random.key(1))
    erased = random_erasing(images, first, probability=0.5)
    expected = mix(
        erased,
        targets,
        second,
        mixup=0.8,
        cutmix=1.0,
        switch=options.mix_switch,
        probability=options.mix_probability,
        group=4,
    )
    ours = recipe.augment_batch(images, targets, jax.random.key(1), options)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    assert np.any(erased != images)
    assert np.any(expected[1] != targets)
