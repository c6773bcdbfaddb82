import math
import random
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import config
from scipy import stats

from ssm_jax.data.mix import Box, blend, draw_erased, draw_mixed, mix, random_erasing
from ssm_jax.training.sharding import batch_sharding, make_mesh, replicated

N = 20_000
"""Draws; the standard deviation of a frequency is below 0.0036."""

ERASING = {"probability": 0.7, "area": (0.02, 1 / 3), "aspect": (0.3, 1 / 0.3)}
BOTH = {"mixup": 0.8, "cutmix": 1.0, "switch": 0.5, "probability": 1.0}
MIXUP = BOTH | {"cutmix": 0.0}
CUTMIX = BOTH | {"mixup": 0.0}


def images_of(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def one_hot(rows):
    """Each row has a class of its own, so that targets tell which rows are in a mixture."""
    return jnp.eye(rows)


ERASE = jax.jit(random_erasing, static_argnames=("probability", "area", "aspect"))
MIX = jax.jit(mix, static_argnames=("mixup", "cutmix", "switch", "probability", "group"))


def erased(images, seed=0, **kwargs):
    return np.asarray(ERASE(images, jax.random.key(seed), **ERASING | kwargs))


def mixed(images, targets, seed=0, **kwargs):
    return tuple(map(np.asarray, MIX(images, targets, jax.random.key(seed), **kwargs)))


def erased_boxes(height, width, **kwargs):
    draw = jax.jit(lambda key: draw_erased(key, N, height, width, **ERASING | kwargs))
    return np.stack(draw(jax.random.key(0)), axis=1)


def mixed_boxes(height, width, **kwargs):
    draw = jax.jit(lambda key: draw_mixed(key, N, height, width, **BOTH | kwargs))
    weight, box = draw(jax.random.key(0))
    return np.asarray(weight), np.stack(box, axis=1)


def areas(boxes):
    return (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])


# Oracles: one image or group after the other, as in the papers.


def oracle_erased(rng, height, width, *, probability, area, aspect):
    if rng.random() < probability:
        for _ in range(10):
            target, ratio = rng.uniform(*area) * height * width, math.exp(rng.uniform(*map(math.log, aspect)))
            h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if h < height and w < width:
                top, left = rng.randrange(height - h + 1), rng.randrange(width - w + 1)
                return top, top + h, left, left + w
    return None


def oracle_cut(rng, height, width, alpha):
    lam = rng.betavariate(alpha, alpha)
    box = []
    for length in (height, width):
        size, center = int(length * math.sqrt(1 - lam)), rng.randrange(length)
        box += [max(center - size // 2, 0), min(center + (size + 1) // 2, length)]
    return tuple(box)


def oracle_blend(images, targets, weight, boxes):
    images, targets = np.asarray(images, np.float64), np.asarray(targets, np.float64)
    height, width = images.shape[-3:-1]
    group = len(images) // len(weight)
    mixed_images, mixed_targets = images.copy(), targets.copy()
    for row in range(len(images)):
        g = row // group
        other = g * group + (group - 1 - row % group)
        top, bottom, left, right = boxes[g]
        for y in range(top, bottom):
            for x in range(left, right):
                pair = images[row, ..., y, x, :], images[other, ..., y, x, :]
                mixed_images[row, ..., y, x, :] = (1 - weight[g]) * pair[0] + weight[g] * pair[1]
        share = weight[g] * (bottom - top) * (right - left) / (height * width)
        mixed_targets[row] = (1 - share) * targets[row] + share * targets[other]
    return mixed_images, mixed_targets


def assert_same_frequencies(ours, theirs):
    """Of rows of integers, within 5 standard deviations of a difference."""
    counts = [Counter(map(tuple, rows.tolist())) for rows in (ours, theirs)]
    for row in counts[0].keys() | counts[1].keys():
        a, b = (count[row] for count in counts)
        assert abs(a - b) <= 5 * math.sqrt(a + b + 4), (row, a, b)


# Random erasing


@pytest.mark.parametrize(
    ("height", "width", "settings"),
    [
        (9, 7, ERASING),
        (6, 8, {"probability": 1.0, "area": (0.5, 1.0), "aspect": (0.5, 3.0)}),
    ],
)
def test_erased_boxes_are_the_first_of_ten_tries_that_fits(height, width, settings):
    rng = random.Random(1)
    boxes = [oracle_erased(rng, height, width, **settings) for _ in range(N)]
    expected = np.array([box for box in boxes if box and (box[1] > box[0] and box[3] > box[2])])
    ours = erased_boxes(height, width, **settings)
    ours = ours[areas(ours) > 0]
    assert abs(len(ours) - len(expected)) < 5 * math.sqrt(N / 2)
    assert_same_frequencies(ours[:, :2], expected[:, :2])
    assert_same_frequencies(ours[:, 2:], expected[:, 2:])
    assert_same_frequencies(ours[:, 1::2] - ours[:, ::2], expected[:, 1::2] - expected[:, ::2])


def test_an_image_has_ten_tries():
    """Both sides round to at most 7 of 8 pixels for log aspects within 2 log(7.5 / side)."""
    side = math.sqrt(0.85 * 64)
    fits = 2 * math.log(7.5 / side) / -math.log(0.3)
    share = np.mean(areas(erased_boxes(8, 8, probability=1.0, area=(0.85, 0.85))) > 0)
    assert abs(share - (1 - (1 - fits) ** 10)) < 5 * 0.0036


def test_area_and_log_aspect_of_erased_boxes_are_uniform():
    """Of images with so many pixels that rounding does not matter; tall or wide boxes do not fit, hence the bounds."""
    side, area, aspect = 10_000, (0.1, 0.2), (0.5, 1.5)
    boxes = erased_boxes(side, side, probability=1.0, area=area, aspect=aspect).astype(float)
    ratio = (boxes[:, 1] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 2])
    low, high = map(math.log, aspect)
    assert stats.kstest(areas(boxes) / side**2, stats.uniform(area[0], area[1] - area[0]).cdf).pvalue > 0.001
    assert stats.kstest(np.log(ratio), stats.uniform(low, high - low).cdf).pvalue > 0.001


def test_erased_boxes_lie_in_the_image_and_reach_its_borders():
    boxes = erased_boxes(9, 7, probability=1.0)
    np.testing.assert_array_equal(boxes.min(0)[[0, 2]], 0)
    np.testing.assert_array_equal(boxes.max(0)[[1, 3]], (9, 7))


@pytest.mark.parametrize(("frames", "dtype"), [((), jnp.float32), ((3,), jnp.bfloat16)])
def test_erasing_changes_one_box_of_some_images_and_nothing_else(frames, dtype):
    images = images_of(200, *frames, 12, 10, 3, dtype=dtype)
    result = erased(images)
    assert result.dtype == images.dtype
    different = result != np.asarray(images)
    different = different.any(-1) if dtype == jnp.bfloat16 else different.all(-1)  # few values: some are met again
    count = 0
    for row in different:
        ys, xs = np.nonzero(row.reshape(-1, 12, 10).any(0))
        if len(ys):
            count += 1
            assert row[..., ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].all()
            assert row.sum() == math.prod(frames) * (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
    assert abs(count - 140) < 5 * math.sqrt(200 * 0.21)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_erased_pixels_are_independent_standard_normal_noise(dtype):
    images = jnp.full((400, 16, 16, 3), 100, dtype)
    noise = erased(images, probability=1.0).astype(np.float64)
    noise = noise[(noise != 100).all(-1)]
    assert len(noise) > 10_000
    assert stats.kstest(noise.ravel(), stats.norm.cdf).statistic < 0.01
    assert np.abs(noise).max() > 3.8
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(3), atol=0.05)
    np.testing.assert_allclose(np.corrcoef(noise[:-1, 0], noise[1:, 0]), np.eye(2), atol=0.05)


def test_all_or_no_images_are_erased_with_probability_1_or_0():
    images = images_of(100, 8, 8, 1)
    assert (erased(images, probability=1.0) != np.asarray(images)).any((1, 2, 3)).all()
    assert not jax.make_jaxpr(lambda x, key: random_erasing(x, key, probability=0.0))(images, jax.random.key(0)).eqns


def test_a_box_as_large_as_the_image_is_never_erased():
    images = images_of(100, 8, 8, 1)
    np.testing.assert_array_equal(erased(images, probability=1.0, area=(1.0, 1.0)), images)


# Boxes and weights of mixtures


@pytest.mark.parametrize(("height", "width", "alpha"), [(7, 5, 1.0), (6, 8, 0.5)])
def test_cutmix_boxes_have_a_uniform_centre_and_are_cut_off_at_the_borders(height, width, alpha):
    rng = random.Random(1)
    expected = np.array([oracle_cut(rng, height, width, alpha) for _ in range(N)])
    weight, ours = mixed_boxes(height, width, mixup=0.0, cutmix=alpha, switch=1.0)
    np.testing.assert_array_equal(weight, 1)
    assert_same_frequencies(ours[:, :2], expected[:, :2])
    assert_same_frequencies(ours[:, 2:], expected[:, 2:])
    assert_same_frequencies(areas(ours)[:, None], areas(expected)[:, None])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_weights_of_mixup_have_a_beta_distribution(alpha):
    """In float32, numbers as close to 1 as many are for a small alpha are equal to 1."""
    weight, boxes = mixed_boxes(7, 5, mixup=alpha, cutmix=0.0, switch=0.0)
    np.testing.assert_array_equal(boxes, [[0, 7, 0, 5]] * N)
    assert 0 <= weight.min() < weight.max() <= 1
    lam = np.clip(weight.astype(np.float64), 1e-6, 1 - 1e-6)
    cdf = stats.beta(alpha, alpha).cdf
    points = np.linspace(0, 1, 101)[1:-1]
    np.testing.assert_allclose(np.mean(lam[:, None] < points, axis=0), cdf(points), atol=5 * 0.0036)
    assert abs(np.mean(lam < 1e-3) - cdf(1e-3)) < 5 * math.sqrt(cdf(1e-3) / N)


@pytest.mark.parametrize(("switch", "probability"), [(0.2, 1.0), (0.0, 0.3), (0.7, 0.6)])
def test_switch_and_probability_are_those_of_cutmix_and_of_mixing(switch, probability):
    weight, boxes = mixed_boxes(200, 200, switch=switch, probability=probability)
    assert abs(np.mean(weight > 0) - probability) < 5 * 0.0036
    cut = weight == 1
    assert abs(np.mean(cut) - probability * switch) < 5 * 0.0036
    assert (areas(boxes[(weight > 0) & ~cut]) == 200 * 200).all()
    if cut.any():
        assert areas(boxes[cut]).mean() < 200 * 200 / 2


def test_method_and_weight_are_independent_of_each_other():
    weight, boxes = mixed_boxes(200, 200, mixup=1.0, switch=0.5, probability=0.5)
    lam = weight[(weight > 0) & (weight < 1)]
    assert stats.kstest(lam, stats.uniform.cdf).pvalue > 0.001
    chosen, all_of_them = areas(boxes[weight == 1]), areas(mixed_boxes(200, 200, switch=1.0)[1])
    assert stats.ks_2samp(chosen, all_of_them).pvalue > 0.001


# Mixtures


@pytest.mark.parametrize("frames", [(), (2,)])
@pytest.mark.parametrize("group", [2, 3, 6, 12])
def test_blend_mixes_the_boxes_of_mirrored_rows(frames, group):
    n, rng = 12 // group, np.random.default_rng(group)
    images, targets = images_of(12, *frames, 5, 4, 2), rng.dirichlet(np.ones(7), size=12).astype(np.float32)
    weight = rng.uniform(size=n).astype(np.float32)
    boxes = np.array([[0, 5, 0, 4], [1, 3, 0, 4], [0, 2, 1, 4], [2, 2, 1, 3], [4, 5, 3, 4], [0, 5, 2, 2]], np.int32)[:n]
    result = jax.jit(blend)(images, targets, weight, Box(*jnp.asarray(boxes).T))
    for ours, expected in zip(result, oracle_blend(images, targets, weight, boxes), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cutmix_copies_pixels_exactly(dtype):
    images, targets = images_of(64, 9, 7, 3, dtype=dtype), jnp.ones((64, 1))
    result, _ = mixed(images, targets, **CUTMIX, group=4)
    assert result.dtype == images.dtype
    images = np.asarray(images)
    other = images.reshape(16, 4, 9, 7, 3)[:, ::-1].reshape(images.shape)
    cut = (result == other).all(-1)
    assert (cut | (result == images).all(-1)).all()
    assert 0.2 < cut.mean() < 0.6


@pytest.mark.parametrize("settings", [BOTH, MIXUP, CUTMIX, BOTH | {"probability": 0.5}], ids=str)
def test_pixels_and_targets_have_the_same_shares(settings):
    """Of images that are constant, each with a value of its own."""
    values = np.random.default_rng(2).normal(size=96).astype(np.float32)
    images = jnp.broadcast_to(values[:, None, None, None], (96, 6, 6, 2))
    result, targets = mixed(images, one_hot(96), **settings, group=8)
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(targets @ values, result.mean((1, 2, 3)), atol=1e-5)
    mirrored = np.arange(96).reshape(12, 8)[:, ::-1].ravel()
    shares = targets[np.arange(96), mirrored].reshape(12, 8)
    np.testing.assert_array_equal(shares, shares[:, :1].repeat(8, axis=1))
    assert len(np.unique(shares[:, 0])) > 3
    if settings["probability"] < 1:
        assert (shares[:, 0] == 0).any()


def test_lam_in_targets_is_that_in_half_precision_images():
    images = jnp.broadcast_to(jnp.asarray([0, 1], jnp.bfloat16)[:, None, None, None], (2, 6, 6, 1))
    for seed in range(5):
        result, targets = mixed(images, one_hot(2), seed, **MIXUP, group=2)
        assert result.dtype == jnp.bfloat16
        np.testing.assert_allclose(result[0].astype(np.float32), targets[0, 1], rtol=2**-8)


def test_targets_of_several_labels_are_mixed_alike():
    images, labels = images_of(8, 6, 5, 2), jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 8)), jnp.float32)
    shares, targets = (mixed(images, t, **BOTH, group=4)[1] for t in (one_hot(8), labels))
    np.testing.assert_allclose(targets, shares @ np.asarray(labels), atol=1e-6)


def test_mixing_all_of_a_video_is_mixing_its_frames_with_one_box():
    video = images_of(8, 2, 6, 5, 2)
    result, targets = mixed(video, one_hot(8), **BOTH, group=4)
    for t in range(2):
        frame, same = mixed(video[:, t], one_hot(8), **BOTH, group=4)
        np.testing.assert_allclose(result[:, t], frame, atol=1e-6)
        np.testing.assert_array_equal(targets, same)


@pytest.mark.parametrize("settings", [BOTH | {"probability": 0.0}, BOTH | {"mixup": 0.0, "cutmix": 0.0}], ids=str)
def test_without_mixing_nothing_is_compiled(settings):
    images = images_of(4, 6, 6, 1)
    assert not jax.make_jaxpr(partial(mix, **settings, group=2))(images, one_hot(4), jax.random.key(0)).eqns
    result, targets = mixed(images, one_hot(4), **settings, group=2)
    np.testing.assert_array_equal(result, images)
    np.testing.assert_array_equal(targets, one_hot(4))


def test_draws_depend_on_the_key_alone():
    images = images_of(8, 6, 5, 2)
    for function in (erased, lambda images, seed: mixed(images, one_hot(8), seed, **BOTH, group=4)[0]):
        first, again, other = (function(images, seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


# Devices that share the batch


def both(images, targets, key, *, group):
    first, second = jax.random.split(key)
    return mix(random_erasing(images, first, probability=0.5), targets, second, **BOTH, group=group)


def collectives(program):
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    return {name for name in names if name in program}


@pytest.mark.parametrize(
    ("axes", "group", "whole"),
    [({"data": 8}, 3, True), ({"data": 2, "fsdp": 4}, 3, True), ({"data": 8}, 2, False), ({"data": 8}, 12, False)],
    ids=str,
)
def test_devices_give_the_result_of_one_and_exchange_nothing_if_groups_are_whole(axes, group, whole):
    """24 rows, 3 to a device."""
    arrays = images_of(24, 6, 5, 3), one_hot(24)
    function = partial(both, group=group)
    alone = jax.jit(function)(*arrays, jax.random.key(3))
    with jax.set_mesh(mesh := make_mesh(axes)):
        shard = batch_sharding(mesh)
        together = jax.jit(function, in_shardings=(shard, shard, replicated(mesh)), out_shardings=shard)
        arguments = *jax.device_put(arrays, shard), jax.device_put(jax.random.key(3), replicated(mesh))
        compiled = together.lower(*arguments).compile()
        shared = compiled(*arguments)
    for ours, expected in zip(shared, alone, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), atol=1e-6)
    assert np.abs(np.asarray(alone[0]) - np.asarray(arrays[0])).max() > 0.1

    program = compiled.as_text()
    assert bool(collectives(program)) != whole
    if whole:
        assert "[3,6,5,3]" in program
        assert "[24,6,5,3]" not in program  # nor does a device draw the noise of the others


# Errors


@pytest.fixture
def unchecked():
    """As users call it: without jaxtyping's checks of shapes, which come first in the tests."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 3}, "group must divide the batch of 8 rows, got 3"),
        ({"group": 0}, "group must divide the batch of 8 rows, got 0"),
        ({"group": 16}, "group must divide the batch of 8 rows, got 16"),
        ({"mixup": -0.1}, "mixup must not be negative, got -0.1"),
        ({"cutmix": -1.0}, "cutmix must not be negative, got -1.0"),
        ({"switch": 1.5}, r"switch must be in \[0, 1\], got 1.5"),
        ({"probability": -0.5}, r"probability must be in \[0, 1\], got -0.5"),
        ({"images": jnp.zeros((8, 4, 4, 3), jnp.uint8)}, r"images must be floats \(b, h, w, c\) .* got uint8"),
        ({"images": jnp.zeros((8, 4, 4))}, r"images must be floats \(b, h, w, c\) .* got float32 \(8, 4, 4\)"),
        ({"targets": jnp.zeros(8, jnp.int32)}, r"targets must be floats \(8, classes\), got int32 \(8,\)"),
        ({"targets": jnp.zeros((8, 5), jnp.int32)}, r"targets must be floats \(8, classes\), got int32 \(8, 5\)"),
        ({"targets": jnp.zeros((4, 5))}, r"targets must be floats \(8, classes\), got float32 \(4, 5\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mix_refuses(change, message):
    arguments = {"images": jnp.zeros((8, 4, 4, 3)), "targets": one_hot(8), "key": jax.random.key(0), "group": 4}
    with pytest.raises(ValueError, match=f"^{message}"):
        mix(**arguments | BOTH | change)


def test_groups_do_not_matter_where_nothing_is_mixed():
    images, targets = jnp.ones((7, 4, 4, 3)), one_hot(7)
    mixed = mix(images, targets, jax.random.key(0), mixup=0.0, cutmix=0.0, group=4)
    jax.tree.map(np.testing.assert_array_equal, mixed, (images, targets))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 1.1}, r"probability must be in \[0, 1\], got 1.1"),
        ({"area": (0.0, 0.3)}, r"area must be \(least, greatest\), both positive, got \(0.0, 0.3\)"),
        ({"area": (0.4, 0.3)}, r"area must be \(least, greatest\), both positive, got \(0.4, 0.3\)"),
        ({"aspect": (-1.0, 0.3)}, r"aspect must be \(least, greatest\), both positive, got \(-1.0, 0.3\)"),
        ({"images": jnp.zeros((8, 4, 4, 3), jnp.uint8)}, r"images must be floats \(b, h, w, c\) .* got uint8"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_random_erasing_refuses(change, message):
    arguments = {"images": jnp.zeros((8, 4, 4, 3)), "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=f"^{message}"):
        random_erasing(**arguments | ERASING | change)
