import numpy as np
import pytest

from ssm_jax.data.augment import Augment

IMAGE = np.arange(5 * 6 * 2, dtype=np.uint8).reshape(5, 6, 2)
"""All pixels differ."""


def results(augment, count, image=IMAGE):
    rng = np.random.default_rng(0)
    return [augment({"image": image, "label": 7}, rng)["image"] for _ in range(count)]


def windows(image, pad):
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="symmetric")
    height, width = image.shape[:2]
    return {
        padded[top : top + height, left : left + width].tobytes()
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
    }


@pytest.mark.parametrize("pad", [1, 2, 4])
def test_crops_are_all_the_windows_of_the_reflected_image(pad):
    crops = {crop.tobytes() for crop in results(Augment(crop_padding=pad), 1500)}
    assert crops == windows(IMAGE, pad)


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


def test_the_rest_of_an_example_is_kept():
    example = {"image": IMAGE, "label": 7}
    augmented = Augment(crop_padding=2, flip=True)(example, np.random.default_rng(0))
    assert augmented.keys() == example.keys()
    assert augmented["label"] == 7
    assert augmented["image"].dtype == np.uint8
    assert augmented["image"].shape == IMAGE.shape


def test_the_source_is_not_changed():
    image = IMAGE.copy()
    results(Augment(crop_padding=2, flip=True), 20, image)
    np.testing.assert_array_equal(image, IMAGE)


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match=r"^crop_padding must not be negative, got -1"):
        Augment(crop_padding=-1)
