"""From examples of any size to images of one: random for training, in the middle for evaluation; on the host."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ssm_jax.data.decode import decode_image, label_array
from ssm_jax.data.rand_augment import INTERPOLATIONS, RandAugment, check_interpolation, draw_filter

_LOG_RATIO = math.log(4 / 3)
"""Random crops are at most 4 : 3 and at least 3 : 4."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The training transform: a crop, a mirror image, then RandAugment or colour jitter, in this order (timm's).

    The crop is one of

    * a random part of the image, resized (`crop_scale`): ImageNet's;
    * the middle of the image, resized so that its shorter side is `size`, where it has another size: as
      `CenterCrop` does; then, with `crop_padding`, CIFAR's random crop.

    Args:
        size: height and width of the result. None: those of the image, for data of one size.
        crop_padding: pixels added on each side by reflection ("symmetric" padding) before a random crop of the old
            size.
        crop_scale: smallest and largest area of a random crop, as parts of the image's; its width : height is
            log-uniform from 3 : 4 to 4 : 3. A crop that does not fit is drawn anew; after ten the middle of the image
            is taken. timm's RandomResizedCropAndInterpolation.
        interpolation: of resizing and of RandAugment: "bilinear", "bicubic" or "random", that is one of both, each
            time. Always with antialiasing.
        flip: mirrors every second image, on average, left to right.
        rand_augment: a policy in timm's notation, such as "rand-m9-mstd0.5-inc1"; see `RandAugment`. "": none.
        color_jitter: brightness, contrast and saturation are multiplied, in random order, each by its own number from
            1 - color_jitter (but at least 0) to 1 + color_jitter. timm leaves it out beside RandAugment, so that it
            must be 0 then.
        fill: colour that RandAugment gives to places outside of the image, 0 .. 255; by default ImageNet's mean.

    Raises:
        ValueError: beginning with the field's name.
    """

    size: int | None = None
    crop_padding: int = 0
    crop_scale: tuple[float, float] | None = None
    interpolation: str = "bicubic"
    flip: bool = False
    rand_augment: str = ""
    color_jitter: float = 0.0
    fill: tuple[int, ...] = (124, 116, 104)

    def __post_init__(self):
        if self.size is not None:
            _check_size(self.size)
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must not be negative, got {self.crop_padding}.")
        if self.crop_scale is not None:
            if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
                raise ValueError(f"crop_scale must be (low, high) with 0 < low <= high <= 1, got {self.crop_scale}.")
            if self.crop_padding:
                raise ValueError(
                    f"crop_scale and crop_padding exclude each other, got {self.crop_scale} and {self.crop_padding}."
                )
        check_interpolation(self.interpolation)
        if self.color_jitter < 0:
            raise ValueError(f"color_jitter must not be negative, got {self.color_jitter}.")
        if self.rand_augment:
            if self.color_jitter:
                raise ValueError(
                    f"color_jitter must be 0 beside rand_augment, as timm leaves it out then, got {self.color_jitter}."
                )
            RandAugment(self.rand_augment, self.fill)

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Decodes and augments an example.

        Args:
            example: `image`, encoded bytes or (h, w, 1 or 3) uint8, and `label`, a class or (num_classes,) of 0 and 1.
            rng: all randomness is taken from it.

        Returns:
            `image`, (H, W, 3) uint8 (one channel for pixels with one), and `label`, int32 or (num_classes,) float32.

        Raises:
            BrokenExampleError: if the image cannot be decoded.
        """
        image = decode_image(example["image"])
        if self.crop_scale is not None:
            size = image.size if self.size is None else (self.size, self.size)
            box = random_crop_box(*image.size, self.crop_scale, rng)
            image = image.crop(box).resize(size, draw_filter(self.interpolation, rng))
        elif self.size is not None:
            image = center_crop(image, self.size, self.size, draw_filter(self.interpolation, rng))
        if self.crop_padding:
            image = _padded_crop(image, self.crop_padding, rng)
        if self.flip and rng.integers(2):
            image = ImageOps.mirror(image)
        if self.rand_augment:
            image = RandAugment(self.rand_augment, self.fill, self.interpolation).draw(rng)(image)
        if self.color_jitter:
            image = _jittered(image, self.color_jitter, rng)
        return {"image": _pixels(image), "label": label_array(example["label"])}


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """The evaluation transform: resizes the shorter side to floor(size / crop_pct) and cuts out the middle (timm's).

    Args:
        size: height and width of the result.
        crop_pct: size of the result in that of the resized image, at most 1.
        interpolation: "bilinear" or "bicubic"; with antialiasing.

    Raises:
        ValueError: beginning with the field's name.
    """

    size: int
    crop_pct: float = 1.0
    interpolation: str = "bicubic"

    def __post_init__(self):
        _check_size(self.size)
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be more than 0 and at most 1, got {self.crop_pct}.")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be bilinear or bicubic, got {self.interpolation!r}.")

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes and cuts an example; keys, shapes and errors are those of `Augment`."""
        (filter,) = INTERPOLATIONS[self.interpolation]
        image = center_crop(decode_image(example["image"]), math.floor(self.size / self.crop_pct), self.size, filter)
        return {"image": _pixels(image), "label": label_array(example["label"])}


def random_crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws a part of an image as `Augment.crop_scale` says: its (left, top, right, bottom), in pixels."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(-_LOG_RATIO, _LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_crop(image: Image.Image, shorter: int, size: int, filter: Image.Resampling) -> Image.Image:
    """Resizes the shorter side to `shorter` and cuts out the middle `size` x `size`, rounding as torchvision does."""
    side = min(image.size)
    if side != shorter:
        image = image.resize((int(shorter * image.width / side), int(shorter * image.height / side)), filter)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _padded_crop(image: Image.Image, pad: int, rng: np.random.Generator) -> Image.Image:
    rows, columns = (
        _reflected(length, pad)[start : start + length]
        for length, start in zip((image.height, image.width), rng.integers(0, 2 * pad + 1, size=2), strict=True)
    )
    return Image.fromarray(np.asarray(image)[rows[:, None], columns])


@functools.lru_cache
def _reflected(length: int, pad: int) -> np.ndarray:
    """The pixel at each place of a padded side; np.pad itself takes most of the time of a small image."""
    return np.pad(np.arange(length), pad, mode="symmetric")


def _jittered(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0, 1 - strength), 1 + strength, size=3)
    for i in rng.permutation(3):
        image = enhancers[i](image).enhance(factors[i])
    return image


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if image.mode == "L" else pixels


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
