"""RandAugment (Cubuk et al., 2020) with the operations, strengths and notation of timm, on Pillow images."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

INTERPOLATIONS = {
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}
"""Pillow's filters that an interpolation of this name chooses from."""

_MAX_LEVEL = 10.0
"""Where an operation is strongest (or weakest)."""

Op = Callable[[Image.Image, Any, Image.Resampling, Sequence[int]], Image.Image]
"""(image, argument, filter, fill) -> image: only the geometric ones use the last two."""


def draw_filter(interpolation: str, rng: np.random.Generator) -> Image.Resampling:
    """Draws one of the filters of an interpolation."""
    filters = INTERPOLATIONS[interpolation]
    return filters[rng.integers(len(filters))]


def check_interpolation(interpolation: str) -> None:
    """Raises ValueError if there is no such interpolation."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}.")


def _color(change: Callable[[Image.Image, Any], Image.Image]) -> Op:
    return lambda image, argument, filter, fill: change(image, argument)


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Op:
    """Pixel (x, y) of the output is (a x + b y + c, d x + e y + f) of the image: `matrix(argument, *image.size)`."""

    def op(image: Image.Image, argument: float, filter: Image.Resampling, fill: Sequence[int]) -> Image.Image:
        coefficients = matrix(argument, *image.size)
        color = _fill_color(image, fill)
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, filter, fillcolor=color)

    return op


def _rotate(image: Image.Image, degrees: float, filter: Image.Resampling, fill: Sequence[int]) -> Image.Image:
    return image.rotate(degrees, filter, fillcolor=_fill_color(image, fill))


def _fill_color(image: Image.Image, fill: Sequence[int]) -> tuple[int, ...] | int:
    """`fill`, of one or three numbers, for the channels that the image has."""
    return (tuple(fill) * 3)[:3] if image.mode == "RGB" else round(sum(fill) / len(fill))


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps the highest `bits` of each value; 0, a black image, is refused by newer versions of ImageOps.posterize."""
    return image.point([value >> (8 - bits) << (8 - bits) for value in range(256)] * len(image.getbands()))


def _solarize_add(image: Image.Image, added: int) -> Image.Image:
    """Makes the darker half of the values brighter."""
    return image.point([min(255, v + added) if v < 128 else v for v in range(256)] * len(image.getbands()))


def _none(level: float, sign: int) -> None:
    """The operation has no strength."""


def _signed(largest: float) -> Callable[[float, int], float]:
    return lambda level, sign: sign * (level / _MAX_LEVEL * largest)


def _bits(level: float, sign: int) -> int:
    return int(level / _MAX_LEVEL * 4)


def _threshold(level: float, sign: int) -> int:
    return int(level / _MAX_LEVEL * 256)


def _factor(level: float, sign: int) -> float:
    """0.1 .. 1.9; 1 changes nothing."""
    return level / _MAX_LEVEL * 1.8 + 0.1


def _factor_away_from_1(level: float, sign: int) -> float:
    return max(0.1, 1.0 + sign * (level / _MAX_LEVEL * 0.9))


_posterized = _color(_posterize)
_solarized = _color(ImageOps.solarize)
_saturated = _color(lambda image, factor: ImageEnhance.Color(image).enhance(factor))
_contrasted = _color(lambda image, factor: ImageEnhance.Contrast(image).enhance(factor))
_brightened = _color(lambda image, factor: ImageEnhance.Brightness(image).enhance(factor))
_sharpened = _color(lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor))

OPS: dict[str, tuple[Op, Callable[[float, int], Any]]] = {
    "AutoContrast": (_color(lambda image, _: ImageOps.autocontrast(image)), _none),
    "Equalize": (_color(lambda image, _: ImageOps.equalize(image)), _none),
    "Invert": (_color(lambda image, _: ImageOps.invert(image)), _none),
    "Rotate": (_rotate, _signed(30.0)),
    "Posterize": (_posterized, _bits),
    "PosterizeIncreasing": (_posterized, lambda level, sign: 4 - _bits(level, sign)),
    "Solarize": (_solarized, _threshold),
    "SolarizeIncreasing": (_solarized, lambda level, sign: 256 - _threshold(level, sign)),
    "SolarizeAdd": (_color(_solarize_add), lambda level, sign: int(level / _MAX_LEVEL * 110)),
    "Color": (_saturated, _factor),
    "ColorIncreasing": (_saturated, _factor_away_from_1),
    "Contrast": (_contrasted, _factor),
    "ContrastIncreasing": (_contrasted, _factor_away_from_1),
    "Brightness": (_brightened, _factor),
    "BrightnessIncreasing": (_brightened, _factor_away_from_1),
    "Sharpness": (_sharpened, _factor),
    "SharpnessIncreasing": (_sharpened, _factor_away_from_1),
    "ShearX": (_affine(lambda x, width, height: (1, x, 0, 0, 1, 0)), _signed(0.3)),
    "ShearY": (_affine(lambda x, width, height: (1, 0, 0, x, 1, 0)), _signed(0.3)),
    "TranslateXRel": (_affine(lambda x, width, height: (1, 0, x * width, 0, 1, 0)), _signed(0.45)),
    "TranslateYRel": (_affine(lambda x, width, height: (1, 0, 0, 0, 1, x * height)), _signed(0.45)),
}
"""timm's name -> (operation, (level 0 .. 10, sign -1 or 1) -> its argument, in the units of Pillow's function)."""


class _Policy(NamedTuple):
    """The parts of a policy, by their names in timm's notation."""

    m: float = _MAX_LEVEL
    mstd: float = 0.0
    n: int = 2
    p: float = 0.5
    inc: int = 0


_RANGES: dict[str, tuple[str, type, int, int]] = {
    "m": ("the level", int, 0, 10),
    "mstd": ("the level's standard deviation", float, 0, 100),
    "n": ("the number of layers", int, 1, 15),
    "p": ("a layer's probability", float, 0, 1),
    "inc": ("whether more operations get stronger with the level", int, 0, 1),
}


@functools.cache
def _parse(policy: str) -> _Policy:
    head, *parts = policy.split("-")
    if head != "rand":
        raise ValueError(f"rand_augment must begin with 'rand', such as 'rand-m9-mstd0.5-inc1', got {policy!r}.")
    values: dict[str, Any] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if not match or match[1] not in _RANGES:
            allowed = ", ".join(f"{key} ({meaning})" for key, (meaning, *_) in _RANGES.items())
            raise ValueError(f"rand_augment has parts with a number: {allowed}; got {part!r} in {policy!r}.")
        key, value = match[1], float(match[2])
        if key in values:
            raise ValueError(f"rand_augment has {key} twice, got {policy!r}.")
        meaning, kind, low, high = _RANGES[key]
        if not low <= value <= high or kind(value) != value:
            allowed = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
            raise ValueError(f"rand_augment's {key} is {meaning}, {allowed}, got {part!r} in {policy!r}.")
        values[key] = kind(value)
    return _Policy(**values)


@functools.cache
def _names(increasing: bool) -> tuple[str, ...]:
    """The 15 operations to choose from."""
    variants = {name for name in OPS if name.endswith("Increasing")}
    left_out = {name.removesuffix("Increasing") for name in variants} if increasing else variants
    return tuple(name for name in OPS if name not in left_out)


@dataclass(frozen=True)
class RandAugment:
    """A few operations, drawn for each image from 15 (`OPS`).

    Each of `n` layers draws one of them, uniformly, and applies it with probability `p`, at a level that is normal
    with mean `m` and standard deviation `mstd`, cut to 0 .. 10, and with a random sign where the operation has one.
    Geometric operations keep the image's size, and draw the filter where `interpolation` is "random".

    Args:
        policy: timm's notation: `rand` and parts of a letter and a number, all optional, joined by `-`, such as
            "rand-m9-mstd0.5-inc1". By default "rand-m10-mstd0-n2-p0.5-inc0". `inc1`: more of the operations get
            stronger with the level.
        fill: colour of places outside of the image, 0 .. 255, one number or one per channel; timm takes the mean of
            the data. One-channel images get the mean of three numbers.
        interpolation: "bilinear", "bicubic" or "random", that is one of both, each time.

    Raises:
        ValueError: beginning with `rand_augment`, `fill` or `interpolation`.
    """

    policy: str
    fill: Sequence[int]
    interpolation: str = "random"

    def __post_init__(self):
        _parse(self.policy)
        if len(self.fill) not in (1, 3) or not all(value in range(256) for value in self.fill):
            raise ValueError(f"fill must be one or three integers from 0 to 255, got {self.fill}.")
        check_interpolation(self.interpolation)

    def draw(self, rng: np.random.Generator) -> Callable[[Image.Image], Image.Image]:
        """Draws all that is random. The result does the same to each image, of mode "RGB" or "L", and changes none."""
        layers = [layer for _ in range(_parse(self.policy).n) if (layer := self._draw_layer(rng))]
        return lambda image: functools.reduce(lambda result, layer: layer(result), layers, image)

    def _draw_layer(self, rng: np.random.Generator) -> Callable[[Image.Image], Image.Image] | None:
        policy = _parse(self.policy)
        if rng.random() >= policy.p:
            return None
        names = _names(bool(policy.inc))
        op, argument_at = OPS[names[rng.integers(len(names))]]
        level = min(max(rng.normal(policy.m, policy.mstd), 0.0), _MAX_LEVEL)
        argument = argument_at(level, 1 if rng.integers(2) else -1)
        filter = draw_filter(self.interpolation, rng)
        return lambda image: op(image, argument, filter, self.fill)
