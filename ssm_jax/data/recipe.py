"""From a recipe's numbers to data: what the sections `data`, `augment` and `eval` of a config say, put together.

Fields are those of configs/common/classification.py. Errors begin with the field's name.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from ssm_jax.data.augment import Augment, CenterCrop
from ssm_jax.data.clips import ClipAugment, ClipCenter
from ssm_jax.data.datasets import Dataset, load_dataset
from ssm_jax.data.mix import mix, random_erasing

Options = Any
"""A section of a config: a ConfigDict, or anything else that has its fields."""


def load(data: Options, *, files: bool = True) -> Dataset:
    """Opens the dataset, or describes it without its files, see `load_dataset`."""
    options = {
        "hmdb51": {"fold": data.fold, "frames": data.frames, "seconds": data.seconds},
        "coco": {"bad_annotations": data.bad_annotations, "max_broken": data.max_broken},
    }.get(data.name, {})
    return load_dataset(data.name, data.dir or None, image_size=data.image_size, files=files, **options)


def train_transform(dataset: Dataset, data: Options, augment: Options) -> Callable[..., dict[str, Any]]:
    """What is done with each example for training, on the host."""
    common: dict[str, Any] = {
        "size": dataset.resolution,
        "flip": augment.flip,
        "rand_augment": augment.rand_augment,
        "fill": tuple(round(255 * mean) for mean in dataset.mean),
    }
    if dataset.frames is not None:
        clips = {"frames": dataset.frames, "seconds": data.seconds, "short_side": tuple(augment.short_side)}
        return ClipAugment(**clips, **common)
    return Augment(
        crop_padding=augment.crop_padding,
        crop_scale=tuple(augment.crop_scale) or None,
        interpolation=augment.interpolation,
        color_jitter=augment.color_jitter,
        **common,
    )


def eval_transform(dataset: Dataset, data: Options, evaluation: Options) -> Callable[..., dict[str, Any]]:
    """What is done with each example for evaluation, on the host."""
    if dataset.frames is not None:
        clips = {"frames": dataset.frames, "seconds": data.seconds, "short_side": evaluation.short_side}
        return ClipCenter(size=dataset.resolution, **clips)
    return CenterCrop(size=dataset.resolution, crop_pct=evaluation.crop_pct, interpolation=evaluation.interpolation)


def augment_batch(
    images: Float[Array, "b *frames h w c"],
    targets: Float[Array, "b classes"],
    key: Key[Array, ""],
    augment: Options,
) -> tuple[Float[Array, "b *frames h w c"], Float[Array, "b classes"]]:
    """What is done with a normalised training batch, on the device: boxes of noise, then mixup and CutMix."""
    erasing_key, mixing_key = jax.random.split(key)
    images = random_erasing(images, erasing_key, probability=augment.erasing)
    return mix(
        images,
        targets,
        mixing_key,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        switch=augment.mix_switch,
        probability=augment.mix_probability,
        group=min(augment.mix_group, len(images)),
    )
