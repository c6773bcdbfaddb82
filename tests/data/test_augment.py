import io
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from ssm_jax.data import augment as augment_module
from ssm_jax.data import rand_augment
from ssm_jax.data.augment import Augment, CenterCrop, random_crop_box
from ssm_jax.data.decode import BrokenExampleError
from ssm_jax.data.rand_augment import RandAugment

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC

IMAGE = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
"""All pixels differ."""

PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((80, 60), BICUBIC)
)

FULL = Augment(size=24, crop_scale=(0.08, 1.0), interpolation="random", flip=True, rand_augment="rand-m9-mstd0.5-inc1")


def result(augment, image: Any = PHOTO, seed=0):
    return augment({"image": image, "label": 7}, np.random.default_rng(seed))["image"]


def results(augment, count, image=IMAGE):
    rng = np.random.default_rng(0)
    return [augment({"image": image, "label": 7}, rng)["image"] for _ in range(count)]


def resized(image, size, filter=BICUBIC):
    return np.asarray(Image.fromarray(image).resize(size, filter))


def kolmogorov_smirnov(values):
    """The largest distance of the values' distribution from the uniform one on 0 .. 1."""
    return np.abs(np.sort(values) - np.linspace(0, 1, len(values))).max()


# The crop of the padded image


def windows(image, pad):
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    height, width = image.shape[:2]
    return {
        padded[top : top + height, left : left + width].tobytes()
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", [1, 2, 4])
def test_crops_are_all_the_windows_of_the_reflected_image(pad, channels):
    image = IMAGE[..., :channels]
    crops = {crop.tobytes() for crop in results(Augment(crop_padding=pad), 1500, image)}
    assert crops == windows(image, pad)


def test_crops_are_equally_frequent():
    crops = [crop.tobytes() for crop in results(Augment(crop_padding=1), 1800)]
    counts = [crops.count(window) for window in windows(IMAGE, 1)]
    assert len(counts) == 9
    assert min(counts) > 140  # of 200 expected; 5 standard deviations are 67
    assert max(counts) < 267


def test_half_of_the_images_are_mirrored_left_to_right():
    images = results(Augment(flip=True), 1000)
    mirrored = sum((image == IMAGE[:, ::-1]).all() for image in images)
    same = sum((image == IMAGE).all() for image in images)
    assert mirrored + same == 1000
    assert 420 < mirrored < 580  # 5 standard deviations


def test_crops_and_mirror_images_are_combined():
    images = {image.tobytes() for image in results(Augment(crop_padding=1, flip=True), 500)}
    mirrored = {np.frombuffer(w, np.uint8).reshape(IMAGE.shape)[:, ::-1].tobytes() for w in windows(IMAGE, 1)}
    assert images == windows(IMAGE, 1) | mirrored


def test_by_default_nothing_happens():
    for image in results(Augment(), 20):
        np.testing.assert_array_equal(image, IMAGE)


# The random part of the image


class Fixed(np.random.Generator):
    """Draws u and v in turn, and a third of the largest integer."""

    def __init__(self, u, v):
        super().__init__(np.random.PCG64())
        self.places = (u, v)
        self.count = 0

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        self.count += 1
        return low + (high - low) * self.places[(self.count - 1) % 2]

    def integers(self, low: Any, *_: Any, **__: Any) -> Any:
        return (low - 1) // 3


@pytest.mark.parametrize(
    ("size", "numbers", "box", "tries"),
    [
        ((500, 375), (0.5, 0.5), (60, 19, 378, 337), 1),
        ((500, 375), (0.0, 1.0), (119, 89, 260, 195), 1),
        ((500, 375), (0.3, 0.0), (92, 25, 316, 323), 1),
        ((333, 500), (0.3, 0.0), (40, 73, 251, 354), 1),
        ((32, 32), (0.0, 1.0), (7, 8, 17, 16), 1),
        ((500, 375), (1.0, 0.2), (0, 0, 500, 375), 10),
        ((333, 500), (1.0, 0.2), (0, 28, 333, 472), 10),
        ((300, 1200), (0.5, 0.5), (0, 400, 300, 800), 10),
        ((1000, 90), (0.3, 0.0), (440, 0, 560, 90), 10),
        ((640, 200), (0.5, 0.5), (186, 0, 453, 200), 10),
    ],
)
def test_boxes_are_timms_for_the_same_random_numbers(size, numbers, box, tries):
    rng = Fixed(*numbers)  # the boxes are those of timm 1.0.31
    assert random_crop_box(*size, scale=(0.08, 1.0), rng=rng) == box
    assert rng.count == 2 * tries


def test_crops_have_uniform_area_log_uniform_ratio_and_uniform_place():
    rng = np.random.default_rng(0)
    side, count = 2000, 4000
    boxes = np.array([random_crop_box(side, side, (0.1, 0.3), rng) for _ in range(count)])  # each fits at once
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    threshold = 1.95 / count**0.5  # exceeded once in 1,000
    assert kolmogorov_smirnov((width * height / side**2 - 0.1) / 0.2) < threshold
    assert kolmogorov_smirnov((np.log(width / height) / np.log(4 / 3) + 1) / 2) < threshold
    assert kolmogorov_smirnov(left / (side - width)) < threshold
    assert kolmogorov_smirnov(top / (side - height)) < threshold


@pytest.mark.parametrize("size", [(500, 375), (32, 32), (7, 3), (1, 1), (90, 1000)])
def test_crops_lie_in_the_image(size):
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, top, right, bottom = random_crop_box(*size, scale=(0.08, 1.0), rng=rng)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_crops_of_photos_are_within_the_bounds():
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(500, 375, (0.25, 1.0), rng) for _ in range(1000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (width * height / (500 * 375)).min() == pytest.approx(0.25, abs=0.01)
    assert (width * height / (500 * 375)).max() > 0.9
    assert (width / height).min() == pytest.approx(3 / 4, abs=0.01)
    assert (width / height).max() == pytest.approx(4 / 3, abs=0.01)


@pytest.mark.parametrize(("interpolation", "filter"), [("bilinear", BILINEAR), ("bicubic", BICUBIC)])
@pytest.mark.parametrize("seed", range(3))
def test_the_random_part_is_cut_out_then_resized(interpolation, filter, seed):
    left, top, right, bottom = random_crop_box(80, 60, (0.08, 1.0), np.random.default_rng(seed))
    cropped = result(Augment(size=24, crop_scale=(0.08, 1.0), interpolation=interpolation), seed=seed)
    expected = resized(np.ascontiguousarray(PHOTO[top:bottom, left:right]), (24, 24), filter)
    np.testing.assert_array_equal(cropped, expected)


def test_without_a_size_the_random_part_gets_the_size_of_the_image():
    assert result(Augment(crop_scale=(0.2, 0.5))).shape == PHOTO.shape


def test_random_interpolation_is_either_half_of_the_time():
    square = np.ascontiguousarray(PHOTO[:, :60])  # its only part of the whole area is the whole
    images = results(Augment(size=30, crop_scale=(1.0, 1.0), interpolation="random"), 400, square)
    found = [image.tobytes() for image in images]
    counts = [found.count(resized(square, (30, 30), filter).tobytes()) for filter in (BILINEAR, BICUBIC)]
    assert sum(counts) == 400
    assert min(counts) > 150  # 5 standard deviations


# The middle of the image


@pytest.mark.parametrize(
    ("shape", "size", "crop_pct", "resize", "corner"),
    [  # resize is (width, height), corner (left, top): torchvision's for a shorter side of floor(size / crop_pct)
        ((375, 500), 224, 0.875, (341, 256), (58, 16)),
        ((500, 375), 224, 0.9, (248, 330), (12, 53)),
        ((48, 48), 24, 1.0, (24, 24), (0, 0)),
        ((218, 178), 160, 1.0, (160, 195), (0, 18)),
        ((30, 41), 64, 0.95, (91, 67), (14, 2)),
        ((10, 13), 10, 1.0, (13, 10), (2, 0)),
    ],
)
def test_the_shorter_side_is_resized_and_the_middle_cut_out(shape, size, crop_pct, resize, corner):
    image = resized(PHOTO, shape[::-1])
    left, top = corner
    expected = resized(image, resize)[top : top + size, left : left + size]
    transformed = CenterCrop(size=size, crop_pct=crop_pct)({"image": image, "label": 1})["image"]
    np.testing.assert_array_equal(transformed, expected)


def test_images_of_the_size_are_left_as_they_are():
    transformed = CenterCrop(size=5)({"image": IMAGE[:, :5], "label": 1})["image"]
    np.testing.assert_array_equal(transformed, IMAGE[:, :5])


def test_interpolation_of_the_middle_is_bicubic_unless_it_is_given():
    square = np.ascontiguousarray(PHOTO[:, :60])
    for transform, filter in (
        (CenterCrop(size=20), BICUBIC),
        (CenterCrop(size=20, interpolation="bilinear"), BILINEAR),
    ):
        transformed = transform({"image": square, "label": 1})["image"]
        np.testing.assert_array_equal(transformed, resized(square, (20, 20), filter))


@pytest.mark.parametrize("size", [20, 60, 90])
def test_training_images_are_cut_as_for_evaluation_if_nothing_else_is_said(size):
    expected = CenterCrop(size=size)({"image": PHOTO, "label": 1})["image"]
    np.testing.assert_array_equal(result(Augment(size=size)), expected)


def test_the_middle_is_taken_before_padding():
    middle = CenterCrop(size=5)({"image": PHOTO, "label": 1})["image"]
    crops = {crop.tobytes() for crop in results(Augment(size=5, crop_padding=1), 300, PHOTO)}
    assert crops == windows(middle, 1)


# Colours


def test_jittered_brightness_is_uniform():
    grey = np.full((4, 4, 3), 100, np.uint8)  # contrast and saturation change nothing here
    values = np.array([image[0, 0, 0] for image in results(Augment(color_jitter=0.4), 2000, grey)])
    assert values.min() >= 60
    assert values.max() <= 140
    assert kolmogorov_smirnov((values + 0.5 - 60) / 80) < 1.95 / 2000**0.5 + 0.0125  # which rounding may add


def test_jitter_beyond_1_does_not_negate():
    grey = np.full((4, 4, 3), 100, np.uint8)
    values = np.array([image[0, 0, 0] for image in results(Augment(color_jitter=1.2), 1000, grey)])
    assert (values < 5).mean() == pytest.approx(0.05 / 2.2, abs=0.025)


@pytest.fixture
def jitters(monkeypatch):
    """Records (name, factor) of each change of colour."""
    record = []
    for name in ("Brightness", "Contrast", "Color"):

        class Recorder(getattr(ImageEnhance, name)):
            def enhance(self, factor, name=name):
                record.append((name, factor))
                return super().enhance(factor)

        monkeypatch.setattr(augment_module.ImageEnhance, name, Recorder)
    return record


def test_jitter_has_three_factors_in_random_order(jitters):
    results(Augment(color_jitter=0.3), 1200)
    names, factors = zip(*jitters, strict=True)
    orders = [names[i : i + 3] for i in range(0, 3600, 3)]
    assert len(set(orders)) == 6
    assert min(orders.count(order) for order in set(orders)) > 135  # of 200 expected; 5 standard deviations are 65
    for name in ("Brightness", "Contrast", "Color"):
        some = np.array([f for n, f in jitters if n == name])
        assert kolmogorov_smirnov((some - 0.7) / 0.6) < 1.95 / 1200**0.5
    assert len(set(factors)) == 3600


def test_jitter_works_on_one_channel():
    assert result(Augment(color_jitter=0.4), PHOTO[..., :1]).shape == (60, 80, 1)


def test_rand_augment_comes_last_with_fill_and_interpolation(monkeypatch):
    seen = []

    def op(image, argument, filter, fill):
        seen.append((image.tobytes(), filter, fill))
        return image

    monkeypatch.setattr(rand_augment, "OPS", {name: (op, at) for name, (_, at) in rand_augment.OPS.items()})
    before = Augment(size=24, crop_scale=(0.2, 1.0), interpolation="bilinear", flip=True)
    after = Augment(
        size=24,
        crop_scale=(0.2, 1.0),
        interpolation="bilinear",
        flip=True,
        rand_augment="rand-n1-p1",
        fill=(1, 2, 3),
    )
    for seed in range(10):
        result(after, seed=seed)
        assert seen[-1] == (result(before, seed=seed).tobytes(), BILINEAR, (1, 2, 3))


def test_rand_augment_is_that_of_its_policy():
    policy, fill = "rand-m9-mstd0.5-n3-inc1", (1, 2, 3)
    for seed in range(5):
        expected = RandAugment(policy, fill, "random").draw(np.random.default_rng(seed))(Image.fromarray(PHOTO))
        augmented = result(Augment(rand_augment=policy, fill=fill, interpolation="random"), seed=seed)
        np.testing.assert_array_equal(augmented, np.asarray(expected))


# Examples


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augment",
    [Augment(), Augment(crop_padding=3, flip=True), FULL, Augment(size=24, color_jitter=0.4, flip=True)],
    ids=["nothing", "cifar", "imagenet", "jitter"],
)
def test_results_are_contiguous_bytes_of_one_shape(augment, channels):
    image = PHOTO[..., :channels]
    for augmented in results(augment, 20, image):
        assert augmented.dtype == np.uint8
        assert augmented.flags.c_contiguous
        assert augmented.shape == (*((24, 24) if augment.size else (60, 80)), channels)


@pytest.mark.parametrize("transform", [lambda e: Augment(flip=True)(e, np.random.default_rng(0)), CenterCrop(size=4)])
def test_other_keys_are_dropped_and_labels_typed(transform):
    example = transform({"image": IMAGE, "label": 7, "id": 3})
    assert example.keys() == {"image", "label"}
    assert example["label"] == 7
    assert example["label"].dtype == np.int32
    several = transform({"image": IMAGE, "label": np.array([0, 1])})["label"]
    assert several.dtype == np.float32
    np.testing.assert_array_equal(several, [0, 1])


def test_files_are_decoded():
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "PNG")
    np.testing.assert_array_equal(result(FULL, file.getvalue()), result(FULL))
    decoded = CenterCrop(size=60)({"image": file.getvalue(), "label": 1})["image"]
    np.testing.assert_array_equal(decoded, PHOTO[:, 10:70])


@pytest.mark.parametrize("transform", [lambda e: FULL(e, np.random.default_rng(0)), CenterCrop(size=4)])
def test_broken_files_are_reported(transform):
    with pytest.raises(BrokenExampleError, match="cannot be decoded"):
        transform({"image": b"nothing", "label": 1})


@pytest.mark.parametrize(
    "augment", [Augment(), Augment(crop_padding=2, flip=True), FULL, Augment(size=24, color_jitter=0.4)]
)
def test_the_source_is_not_changed(augment):
    image = PHOTO.copy()
    for augmented in results(augment, 20, image):
        assert not np.shares_memory(augmented, image)
    np.testing.assert_array_equal(image, PHOTO)


def test_results_are_functions_of_the_generator():
    copy = pickle.loads(pickle.dumps(FULL))
    assert copy == FULL
    first, second = results(FULL, 10, PHOTO), results(copy, 10, PHOTO)
    np.testing.assert_array_equal(first, second)
    assert len({image.tobytes() for image in first}) == 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"crop_padding": -1}, "crop_padding must not be negative, got -1"),
        ({"crop_scale": (0.0, 1.0)}, r"crop_scale must be \(low, high\) with 0 < low <= high <= 1, got \(0.0, 1.0\)"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must be "),
        ({"crop_scale": (0.5, 1.2)}, "crop_scale must be "),
        (
            {"crop_scale": (0.1, 1.0), "crop_padding": 4},
            r"crop_scale and crop_padding exclude each other, got \(0.1, 1",
        ),
        ({"interpolation": "cubic"}, "interpolation must be one of bilinear, bicubic, random, got 'cubic'"),
        ({"rand_augment": "rand-m99"}, "rand_augment's m is the level, an integer from 0 to 10, got 'm99'"),
        ({"rand_augment": "rand", "fill": (1, 2)}, r"fill must be one or three integers from 0 to 255, got \(1, 2\)"),
        ({"color_jitter": -0.1}, "color_jitter must not be negative, got -0.1"),
        ({"color_jitter": 0.4, "rand_augment": "rand"}, "color_jitter must be 0 beside rand_augment, .* got 0.4"),
    ],
)
def test_wrong_recipes_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Augment(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 4, "crop_pct": 0.0}, "crop_pct must be more than 0 and at most 1, got 0.0"),
        ({"size": 4, "crop_pct": 1.1}, "crop_pct must be more than 0 and at most 1, got 1.1"),
        ({"size": 4, "interpolation": "random"}, "interpolation must be bilinear or bicubic, got 'random'"),
    ],
)
def test_wrong_evaluation_recipes_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        CenterCrop(**fields)
