"""Random erasing, mixup and CutMix of a normalised batch, on the device, inside a train step.

The same in distribution as timm's `RandomErasing(mode="pixel")` and `Mixup(mode="batch")`, with which the recipes of
DeiT and of its followers train. Boxes and weights are drawn first and applied then; all frames of a video share a box.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ssm_jax.ops.dtypes import at_least_float32

_TRIES = 10


class Box(NamedTuple):
    """n rectangles in pixels, `bottom` and `right` exclusive; those without area stand for none."""

    top: Int[Array, "n"]
    bottom: Int[Array, "n"]
    left: Int[Array, "n"]
    right: Int[Array, "n"]

    def mask(self, height: int, width: int) -> Bool[Array, "n {height} {width}"]:
        """True inside; by comparisons, which stay on the device that has the row, as a scatter would not."""
        y, x = (jnp.arange(length, dtype=jnp.int32)[None] for length in (height, width))
        rows = (self.top[:, None] <= y) & (y < self.bottom[:, None])
        columns = (self.left[:, None] <= x) & (x < self.right[:, None])
        return rows[:, :, None] & columns[:, None, :]

    def area(self) -> Int[Array, "n"]:
        """In pixels."""
        return (self.bottom - self.top) * (self.right - self.left)


def random_erasing(
    images: Float[Array, "b *frames h w c"],
    key: Key[Array, ""],
    *,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Float[Array, "b *frames h w c"]:
    """Fills one box in each of some images with standard normal noise (Zhong et al., 2020).

    Args:
        images: normalised, so that the noise has the scale of an image.
        key: of all draws.
        probability: of an image to be erased, which are independent.
        area: least and greatest share of the image in the box, before sides are rounded to pixels.
        aspect: least and greatest height / width of the box; its logarithm is uniform.

    Raises ValueError for images that are not float arrays (b, h, w, c) or (b, t, h, w, c), a probability outside
    [0, 1], and bounds that are not positive and in order.
    """
    _check_images(images)
    _check_share("probability", probability)
    for name, (low, high) in {"area": area, "aspect": aspect}.items():
        if not 0 < low <= high:
            raise ValueError(f"{name} must be (least, greatest), both positive, got {(low, high)}.")
    if probability == 0:
        return images
    box_key, noise_key = jax.random.split(key)
    n, (height, width) = images.shape[0], images.shape[-3:-1]
    box = draw_erased(box_key, n, height, width, probability=probability, area=area, aspect=aspect)
    # In float32, because normal numbers drawn in bfloat16 take few values and have no tails.
    noise = jax.random.normal(noise_key, images.shape, jnp.float32)
    return jnp.where(_spread(box.mask(height, width), images.ndim), noise.astype(images.dtype), images)


def mix(
    images: Float[Array, "b *frames h w c"],
    targets: Float[Array, "b classes"],
    key: Key[Array, ""],
    *,
    mixup: float,
    cutmix: float,
    switch: float = 0.5,
    probability: float = 1.0,
    group: int,
) -> tuple[Float[Array, "b *frames h w c"], Float[Array, "b classes"]]:
    """Mixes each row with the one at the mirrored place of its group, by mixup or by CutMix.

    Mixup (Zhang et al., 2018) gives lam x + (1 - lam) x' with lam ~ Beta(mixup, mixup); CutMix (Yun et al., 2019) puts
    a box of x' into x, whose area is 1 - lam of the image, with lam ~ Beta(cutmix, cutmix), before it is cut off at the
    image's borders. Targets are mixed by the share of x' that is in the images.

    A group is `group` consecutive rows, with one method, lam and box; it is what a GPU holds in PyTorch. Groups never
    mix, so that devices that hold whole groups exchange nothing. In a group of odd size the row in the middle stays as
    it is.

    Args:
        images: normalised or not.
        targets: probabilities of classes, or 0 and 1 of each label.
        key: of all draws.
        mixup: parameter of mixup's Beta distribution; 0 for no mixup.
        cutmix: the same of CutMix.
        switch: probability of CutMix instead of mixup, where both are wanted.
        probability: of a group to be mixed.
        group: rows in a group.

    Raises ValueError for images that are not float arrays (b, h, w, c) or (b, t, h, w, c), targets that are not float
    arrays (b, classes), negative `mixup` or `cutmix`, probabilities outside [0, 1], and, where rows are mixed, a
    `group` that does not divide the batch.
    """
    _check_images(images)
    rows = images.shape[0]
    if targets.ndim != 2 or targets.shape[0] != rows or not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(f"targets must be floats ({rows}, classes), got {targets.dtype} {targets.shape}.")
    for name, alpha in {"mixup": mixup, "cutmix": cutmix}.items():
        if alpha < 0:
            raise ValueError(f"{name} must not be negative, got {alpha}.")
    _check_share("switch", switch)
    _check_share("probability", probability)
    if probability == 0 or mixup == cutmix == 0:
        return images, targets
    if group < 1 or rows % group:
        raise ValueError(f"group must divide the batch of {rows} rows, got {group}.")
    if mixup == 0 or cutmix == 0:
        switch = float(mixup == 0)
    weight, box = draw_mixed(
        key, rows // group, *images.shape[-3:-1], mixup=mixup, cutmix=cutmix, switch=switch, probability=probability
    )
    return blend(images, targets, weight, box)


def draw_erased(
    key: Key[Array, ""],
    n: int,
    height: int,
    width: int,
    *,
    probability: float,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Box:
    """The boxes of `random_erasing` for `n` images: the first of ten tries that is smaller than the image."""
    # As one array of two axes: XLA takes several times as long to compile draws of three.
    u = jax.random.uniform(key, (3 + 2 * _TRIES, n), jnp.float32)
    (chance, y, x), area_u, aspect_u = jnp.split(u, [3, 3 + _TRIES])
    areas = (area[0] + (area[1] - area[0]) * area_u) * (height * width)
    low, high = map(math.log, aspect)
    log_aspect = low + (high - low) * aspect_u
    h = jnp.round(jnp.sqrt(areas * jnp.exp(log_aspect)))
    w = jnp.round(jnp.sqrt(areas * jnp.exp(-log_aspect)))
    fits = (h < height) & (w < width) & (chance < probability)[None]
    first = fits & (jnp.argmax(fits, axis=0)[None] == jnp.arange(_TRIES)[:, None])
    h, w = jnp.sum(h, axis=0, where=first), jnp.sum(w, axis=0, where=first)
    top, left = jnp.floor(y * (height - h + 1)), jnp.floor(x * (width - w + 1))
    return Box(*(edge.astype(jnp.int32) for edge in (top, top + h, left, left + w)))


def draw_mixed(
    key: Key[Array, ""],
    n: int,
    height: int,
    width: int,
    *,
    mixup: float,
    cutmix: float,
    switch: float,
    probability: float,
) -> tuple[Float[Array, "{n}"], Box]:
    """The weight of the mirrored row inside a box, for `n` groups in `mix`.

    It is 1 in CutMix's box, 1 - lam in the whole image for mixup, and 0 in groups that are not mixed.
    """
    chance, method, u, v, y, x = jax.random.uniform(key, (6, n), jnp.float32)
    cut = method < switch
    lam = _symmetric_beta(u, v, jnp.where(cut, cutmix, mixup))

    def interval(length, center):
        size, center = ((length * share).astype(jnp.int32) for share in (jnp.sqrt(1 - lam), center))
        start, end = jnp.maximum(center - size // 2, 0), jnp.minimum(center + (size + 1) // 2, length)
        return jnp.where(cut, start, 0), jnp.where(cut, end, length)

    weight = jnp.where(chance < probability, jnp.where(cut, 1.0, 1 - lam), 0.0)
    return weight, Box(*interval(height, y), *interval(width, x))


def blend(
    images: Float[Array, "b *frames h w c"],
    targets: Float[Array, "b classes"],
    weight: Float[Array, "n"],
    box: Box,
) -> tuple[Float[Array, "b *frames h w c"], Float[Array, "b classes"]]:
    """Mixes each row with the mirrored one of its group, one of n, with `weight` inside the group's box."""
    height, width = images.shape[-3:-1]
    in_pixels = jnp.where(box.mask(height, width), weight[:, None, None], 0)
    in_targets = weight * box.area().astype(weight.dtype) / (height * width)
    return (
        _with_mirrored(images, _spread(in_pixels, images.ndim + 1)),
        _with_mirrored(targets, in_targets[:, None, None]),
    )


def _with_mirrored(x: Float[Array, "b *rest"], weight: Float[Array, "n *_"]) -> Float[Array, "b *rest"]:
    """(1 - weight) x + weight x', exact where the weight is 0 or 1."""
    groups = x.reshape(weight.shape[0], -1, *x.shape[1:])
    dtype = at_least_float32(x.dtype)
    weight = weight.astype(dtype)
    mixed = (1 - weight) * groups.astype(dtype) + weight * jnp.flip(groups, 1).astype(dtype)
    return mixed.astype(x.dtype).reshape(x.shape)


def _symmetric_beta(u: Float[Array, "n"], v: Float[Array, "n"], alpha: Float[Array, "n"]) -> Float[Array, "n"]:
    """Beta(alpha, alpha) of two uniform numbers.

    If T has Student's distribution with 2 alpha degrees of freedom, (1 + T / sqrt(2 alpha + T^2)) / 2 has this one, and
    T is sqrt(2 alpha (u^(-1/alpha) - 1)) cos(2 pi v) (Bailey, 1994; Devroye, 1996, "Random variate generation in one
    line of code"). `jax.random.beta` rejects in a loop: it takes seconds to compile, and devices that share the batch
    would wait for each other in every round.
    """
    tail = u ** (1 / alpha)
    # The angle's sine is T / sqrt(2 alpha + T^2), without a division.
    angle = jnp.arctan2(jnp.sqrt(1 - tail) * jnp.cos(2 * jnp.pi * v), jnp.sqrt(tail))
    return (1 + jnp.sin(angle)) / 2


def _spread(mask: Array, ndim: int) -> Array:
    """(n, h, w) to (n, 1, .., h, w, 1) of `ndim` axes."""
    n, height, width = mask.shape
    return mask.reshape(n, *[1] * (ndim - 4), height, width, 1)


def _check_images(images: Array) -> None:
    if images.ndim not in (4, 5) or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floats (b, h, w, c) or (b, t, h, w, c), got {images.dtype} {images.shape}: "
            "normalise bytes first."
        )


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}.")
