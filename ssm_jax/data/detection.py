"""From images with objects to what detectors take: arrays of few shapes, and a fixed number of objects; on the host.

An image is resized so that its shorter side is the first of `sides`, (800, 1333) for example, unless the longer one
would be more than the second, and padded with zeros below and to the right to one of two shapes, its bucket.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from pycocotools.mask import decode, frPyObjects, merge

from ssm_jax.data.decode import BrokenExampleError, decode_image

Sides = tuple[int, int]

_INNER = 112
GRID = _INNER + 2
"""Cells of a mask along each axis: four times a mask head's 28 over the object, and an empty one on each side."""

_MULTIPLE = 32
"""Of both sides of a bucket: the stride of the coarsest map of a backbone."""


def resized(height: int, width: int, sides: Sides) -> tuple[int, int]:
    """Height and width of a resized image, as torchvision computes them, but at least 1."""
    scale = min(sides[0] / min(height, width), sides[1] / max(height, width))
    return max(math.floor(scale * height), 1), max(math.floor(scale * width), 1)


def buckets(sides: Sides) -> tuple[tuple[int, int], ...]:
    """Heights and widths of padded images: of those that are at least as wide as high, and of the others."""
    short, long = (-(-side // _MULTIPLE) * _MULTIPLE for side in sides)
    return ((short, long),) if short == long else ((short, long), (long, short))


def bucket_of(sizes: Int[np.ndarray, "n 2"], sides: Sides) -> Int[np.ndarray, " n"]:
    """For images of these heights and widths the number of their bucket."""
    portrait = sizes[:, 0] > sizes[:, 1]
    return np.where(portrait, len(buckets(sides)) - 1, 0)


@dataclass(frozen=True, kw_only=True)
class DetectionInput:
    """The evaluation transform.

    Args:
        sides: the shorter one, and the most that the longer one may be.

    Raises:
        ValueError: beginning with the field's name.
    """

    sides: Sides

    def __post_init__(self):
        _check_sides(self.sides)

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes, resizes and pads an image.

        Args:
            example: of `ssm_jax.data.coco.Images`.

        Returns:
            `image`, (H, W, 3) uint8, `size`, (2,) int32, height and width of what is not padding, and `original_size`
            before, `image_id` int32.

        Raises:
            BrokenExampleError: if the image cannot be decoded, or has another size than the annotations say.
        """
        image = _resized_image(example, self.sides)
        return {
            **_padded(image, example["size"], self.sides),
            "image_id": np.int32(example["image_id"]),
            "original_size": example["size"],
        }


@dataclass(frozen=True, kw_only=True)
class DetectionAugment:
    """The training transform, torchvision's and mmdetection's. Crowds are left out.

    Args:
        sides: the shorter one, and the most that the longer one may be.
        flip: mirrors every second image, on average, left to right.
        max_objects: of an image, at most.
        masks: whether there are masks.

    Raises:
        ValueError: beginning with the field's name.
    """

    sides: Sides
    flip: bool
    max_objects: int
    masks: bool

    def __post_init__(self):
        _check_sides(self.sides)
        if self.max_objects < 1:
            raise ValueError(f"max_objects must be at least 1, got {self.max_objects}.")

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Decodes, resizes, mirrors and pads an image, and does to its objects what is done to it.

        Args:
            example: of `ssm_jax.data.coco.Images`.
            rng: all randomness is taken from it.

        Returns:
            `image` and `size` as for evaluation; for n = max_objects objects `boxes`, (n, 4) float32, left, top, right,
            bottom in pixels of the image, none beyond its edges, `classes`, (n,) int32, and `valid`, (n,) bool: False
            for padding, which is all zeros, and for boxes without area; and with masks those of `crop_masks`,
            (n, 114, 114) uint8, and `mask_boxes`, (n, 4) float32, the part of the image that each covers.

        Raises:
            BrokenExampleError: if the image cannot be decoded, or has another size than the annotations say.
            ValueError: if it has more objects.
        """
        kept = np.flatnonzero(~example["crowd"])
        if len(kept) > self.max_objects:
            raise ValueError(
                f"max_objects must be at least the {len(kept)} objects of image {example['image_id']}, "
                f"got {self.max_objects}."
            )
        mirrored = self.flip and bool(rng.integers(2))
        image = _resized_image(example, self.sides)
        height, width = example["size"].tolist()
        scale = np.array([image.width / width, image.height / height] * 2, np.float32)

        def placed(boxes: np.ndarray) -> np.ndarray:
            left, top, right, bottom = (boxes * scale).T
            if mirrored:
                left, right = image.width - right, image.width - left
            return np.stack([left, top, right, bottom], axis=1)

        boxes = np.clip(placed(example["boxes"][kept]), 0, np.array(image.size * 2, np.float32))
        objects = {
            "boxes": boxes,
            "classes": example["classes"][kept],
            "valid": (boxes[:, 2:] > boxes[:, :2]).all(1),  # of a box that is narrow enough nothing is left in float32
        }
        if self.masks:
            masks, boxes = crop_masks([example["segmentation"][i] for i in kept], (height, width))
            objects |= {"masks": masks[..., ::-1] if mirrored else masks, "mask_boxes": placed(boxes)}
        return {
            **_padded(ImageOps.mirror(image) if mirrored else image, example["size"], self.sides),
            **{name: _first(array, self.max_objects) for name, array in objects.items()},
        }


def crop_masks(
    segmentations: Sequence[list[np.ndarray] | Mapping[str, Any]], size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "n 114 114"], Float[np.ndarray, "n 4"]]:
    """Masks, each on a grid over what it covers of the image, and an empty cell more on each side; 1 is inside.

    Polygons are drawn on the grid at once. On COCO's this is as close to their masks over the image as drawing them
    finer and taking means is.

    Args:
        segmentations: of `ssm_jax.data.coco.Images`, polygons or run-length masks, which are not empty.
        size: height and width of the image.

    Returns:
        The masks, and in pixels of the image the left, top, right and bottom of each grid. A grid has at least a pixel
        inside of the empty cells.
    """
    masks = np.zeros((len(segmentations), GRID, GRID), np.uint8)
    boxes = np.zeros((len(segmentations), 4), np.float32)
    for mask, box, segmentation in zip(masks, boxes, segmentations, strict=True):
        if isinstance(segmentation, Mapping):
            low, high, inside = _drawn_pixels(segmentation)
        else:
            low, high, inside = _drawn_polygons(segmentation, size)
        mask[1:-1, 1:-1] = inside
        cell = (high - low) / _INNER
        box[:2], box[2:] = low - cell, high + cell
    return masks, boxes


_Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Left and top, right and bottom, and the grid in between."""


def _drawn_polygons(polygons: list[np.ndarray], size: tuple[int, int]) -> _Drawn:
    corners = [polygon.astype(np.float64).reshape(-1, 2) for polygon in polygons]
    every = np.concatenate(corners)
    low, high = (np.clip(edge, 0, size[::-1]) for edge in (every.min(0), every.max(0)))
    high = np.maximum(high, low + 1)
    drawn = frPyObjects([((at - low) * (_INNER / (high - low))).ravel() for at in corners], _INNER, _INNER)
    return low, high, decode(merge(drawn))


def _drawn_pixels(mask: Mapping[str, Any]) -> _Drawn:
    runs, (height, width) = mask["counts"], mask["size"]
    pixels = np.repeat(np.arange(len(runs), dtype=np.uint8) % 2, runs).reshape(width, height).T
    (top, bottom), (left, right) = (np.flatnonzero(pixels.any(axis))[[0, -1]] for axis in (1, 0))
    part = Image.fromarray(255 * pixels[top : bottom + 1, left : right + 1])
    inside = np.asarray(part.resize((_INNER, _INNER), Image.Resampling.BOX)) > 127
    return np.array([left, top]), np.array([right + 1, bottom + 1]), inside


def _resized_image(example: Mapping[str, Any], sides: Sides) -> Image.Image:
    image = decode_image(example["image"])
    height, width = example["size"].tolist()
    if image.size != (width, height):
        raise BrokenExampleError(
            f"image {example['image_id']} is {image.width} x {image.height}, and {width} x {height} in the annotations."
        )
    height, width = resized(height, width, sides)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _padded(image: Image.Image, original_size: np.ndarray, sides: Sides) -> dict[str, np.ndarray]:
    # The bucket is that of the original: rounding makes a square of 640 x 639.
    (bucket,) = bucket_of(original_size[None], sides)
    pixels = np.zeros((*buckets(sides)[bucket], 3), np.uint8)
    pixels[: image.height, : image.width] = np.asarray(image)
    return {"image": pixels, "size": np.array([image.height, image.width], np.int32)}


def _first(array: np.ndarray, count: int) -> np.ndarray:
    """With zeros behind it, so that there are `count` rows."""
    return np.concatenate([array, np.zeros((count - len(array), *array.shape[1:]), array.dtype)])


def _check_sides(sides: Sides) -> None:
    if not 1 <= sides[0] <= sides[1]:
        raise ValueError(f"sides must be (shorter, longer), at least 1, such as (800, 1333), got {sides}.")
