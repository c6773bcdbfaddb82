"""Augmentation of images on the host."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random crops of the padded image and random mirror images, CIFAR's augmentation.

    `crop_padding` pixels are added on each side by reflection ("symmetric" padding) before a crop of the old size;
    `flip` mirrors every second image, on average, left to right.
    """

    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self):
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must not be negative, got {self.crop_padding}.")

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Augments `example["image"]`, (H, W, C)."""
        image = example["image"]
        if pad := self.crop_padding:
            height, width = image.shape[:2]
            top, left = rng.integers(0, 2 * pad + 1, size=2)
            image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
            image = image[top : top + height, left : left + width]
        if self.flip and rng.integers(2):
            image = image[:, ::-1]
        return {**example, "image": np.ascontiguousarray(image)}
