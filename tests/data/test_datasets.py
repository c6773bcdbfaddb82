import json

import numpy as np
import pytest
from PIL import Image

from ssm_jax.data.datasets import load_dataset


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def stack(source, field):
    return np.stack([source[i][field] for i in range(len(source))])


def test_digits_have_1797_images_in_three_splits(digits):
    assert {name: len(source) for name, source in digits.splits.items()} == {"train": 1257, "val": 180, "test": 360}
    assert sum(map(len, digits.splits.values())) == 1797


def test_digits_splits_hold_every_scan_once(digits):
    """By content, as a few scans are equal: the splits together have each image as often as scikit-learn has it."""
    from sklearn.datasets import load_digits

    def census(images):
        return sorted(image.tobytes() for image in images)

    raw = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    ours = np.concatenate([stack(source, "image") for source in digits.splits.values()])
    assert census(ours) == census(raw)


def test_digits_splits_have_equal_shares_of_each_class(digits):
    labels = {name: stack(source, "label") for name, source in digits.splits.items()}
    everything = np.bincount(np.concatenate(list(labels.values())))
    for part in labels.values():
        assert np.abs(np.bincount(part) - everything * len(part) / 1797).max() <= 1


def test_digits_images_are_labelled_as_scikit_learn_labels_them(digits):
    from sklearn.datasets import load_digits

    raw = load_digits()
    known = {}
    for image, label in zip(np.round(raw.images * (255 / 16)).astype(np.uint8), raw.target, strict=True):
        known.setdefault(image.tobytes(), set()).add(label)
    for source in digits.splits.values():
        for i in range(len(source)):
            assert source[i]["label"] in known[source[i]["image"].tobytes()]


def test_digits_are_described_as_they_are(digits):
    images = stack(digits.splits["train"], "image")
    assert images.shape == (1257, digits.resolution, digits.resolution, digits.channels)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert set(stack(digits.splits["train"], "label")) == set(range(digits.num_classes))


def test_digits_mean_and_std_are_those_of_the_training_images(digits):
    images = stack(digits.splits["train"], "image") / 255
    np.testing.assert_allclose(digits.mean, images.mean((0, 1, 2)), atol=5e-4)
    np.testing.assert_allclose(digits.std, images.std((0, 1, 2)), atol=5e-4)


def test_digits_splits_are_the_same_each_time(digits):
    again = load_dataset("digits")
    for name, source in digits.splits.items():
        np.testing.assert_array_equal(stack(source, "image"), stack(again.splits[name], "image"))


def test_cifar10_validates_on_the_last_tenth_of_train(cifar10_dir):
    dataset = load_dataset("cifar10", str(cifar10_dir))
    first = {name: int(source[0]["image"][0, 0, 0]) for name, source in dataset.splits.items()}
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 54, "val": 6, "test": 10}
    assert first == {"train": 0, "val": 54, "test": 0}


def test_cifar10_gives_uint8_images_with_labels(cifar10_dir):
    dataset = load_dataset("cifar10", str(cifar10_dir))
    for source in dataset.splits.values():
        example = source[3]
        assert example["image"].shape == (dataset.resolution, dataset.resolution, dataset.channels)
        assert example["image"].dtype == np.uint8
        assert example["label"] == int(example["image"][0, 0, 0]) % dataset.num_classes


def test_a_cifar10_of_jpeg_files_is_a_copy_and_called_so(cifar10_dir, jpeg_dir):
    """The original is lossless."""
    titles = [load_dataset("cifar10", str(folder)).title for folder in (cifar10_dir, jpeg_dir)]
    assert titles == ["CIFAR-10", "CIFAR-10, JPEG copy"]


def test_tiny_imagenet20_is_tested_on_its_validation_images(jpeg_dir):
    dataset = load_dataset("tiny_imagenet20", str(jpeg_dir))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 54, "val": 6, "test": 10}
    assert [int(source[0]["image"][0, 0, 0]) for source in dataset.splits.values()] == [0, 54, 0]
    assert dataset.splits["test"][3]["image"].shape == (dataset.resolution, dataset.resolution, dataset.channels)


def test_whole_tiny_imagenet20_is_described_as_it_is(shared):
    folder = shared / "data" / "imagenet_tfds"
    if not folder.is_dir():
        pytest.skip("needs the developers' copy of tiny_imagenet20")
    dataset = load_dataset("tiny_imagenet20", str(folder))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 9000, "val": 1000, "test": 1000}
    images = np.stack([dataset.splits["train"][i]["image"] for i in range(0, 9000, 20)]) / 255
    np.testing.assert_allclose(images.mean((0, 1, 2)), dataset.mean, atol=0.02)
    np.testing.assert_allclose(images.std((0, 1, 2)), dataset.std, atol=0.02)
    assert dataset.num_classes == 20
    assert dataset.class_names[0] == "n01443537"


def test_whole_cifar10_is_described_as_it_is(shared):
    folder = shared / "data" / "cifar10_full"
    if not folder.is_dir():
        pytest.skip("needs the developers' copy of CIFAR-10")
    dataset = load_dataset("cifar10", str(folder))
    assert {name: len(source) for name, source in dataset.splits.items()} == {
        "train": 45000,
        "val": 5000,
        "test": 10000,
    }
    some = range(0, 45000, 30)
    images = np.stack([dataset.splits["train"][i]["image"] for i in some]) / 255
    np.testing.assert_allclose(images.mean((0, 1, 2)), dataset.mean, atol=0.01)
    np.testing.assert_allclose(images.std((0, 1, 2)), dataset.std, atol=0.01)
    official = (folder / "cifar10" / "3.0.2" / "label.labels.txt").read_text().split()
    assert list(dataset.class_names) == official


def test_a_missing_folder_is_answered_with_where_it_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"^dir holds no prepared cifar10: looked for .*cifar10/VERSION") as error:
        load_dataset("cifar10", str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in str(error.value)


def test_an_empty_folder_is_answered_like_a_missing_one(tmp_path):
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^dir holds no prepared cifar10"):
        load_dataset("cifar10", str(tmp_path))


@pytest.fixture
def folder(tmp_path):
    """Two classes in train and one of them in val; colours tell which file an image is from."""
    sizes = {
        "train/ant/a.JPEG": (40, 20),
        "train/ant/b.png": (20, 40),
        "train/bee/c.jpg": (16, 16),
        "val/bee/d.png": (8, 8),
    }
    for i, (name, size) in enumerate(sizes.items()):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", size, (200, 50 * i, 0))
        image.paste((0, 50 * i, 200), (0, 0, 2, size[1]))  # a margin that is cut off from wide images
        image.save(path)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    return tmp_path


def test_image_folders_are_labelled_by_class_in_alphabetical_order(folder):
    dataset = load_dataset("image_folder", str(folder), image_size=8)
    assert dataset.class_names == ("ant", "bee")
    assert [dataset.splits["train"][i]["label"] for i in range(3)] == [0, 0, 1]
    assert [example["label"] for example in dataset.splits["test"]] == [1]
    assert len(dataset.splits["val"]) == 1


def test_image_folders_give_the_middle_square_at_the_size_asked_for(folder):
    dataset = load_dataset("image_folder", str(folder), image_size=8)
    wide, high, square = (dataset.splits["train"][i]["image"] for i in range(3))
    for i, image in enumerate((wide, high, square)):
        assert image.shape == (8, 8, 3)
        assert image.dtype == np.uint8
        np.testing.assert_allclose(image[:, 4], np.broadcast_to([200, 50 * i, 0], (8, 3)), atol=12)
    assert np.abs(wide[:, 0] - wide[:, 4].astype(int)).max() < 30
    assert np.abs(high[:, 0] - high[:, 4].astype(int)).max() > 100


def test_grey_images_become_coloured(folder):
    Image.new("L", (8, 8), 77).save(folder / "val/bee/e.png")
    dataset = load_dataset("image_folder", str(folder), image_size=4)
    np.testing.assert_array_equal(dataset.splits["val"][1]["image"], np.full((4, 4, 3), 77))


def test_a_broken_image_is_named(folder):
    (folder / "val/bee/broken.png").write_bytes(b"nothing")
    dataset = load_dataset("image_folder", str(folder), image_size=4)
    with pytest.raises(ValueError, match=r"val/bee/broken\.png cannot be read as an image"):
        dataset.splits["val"][0]


@pytest.mark.parametrize("image_size", [None, 0])
def test_image_folders_have_no_size_of_their_own(folder, image_size):
    with pytest.raises(
        ValueError, match=f"image_size must be the resolution of the images, at least 1, got {image_size}"
    ):
        load_dataset("image_folder", str(folder), image_size=image_size)


@pytest.mark.parametrize("name", ["digits", "cifar10", "tiny_imagenet20"])
def test_other_datasets_have_one(name, jpeg_dir):
    with pytest.raises(ValueError, match=f"image_size must be .* or not be given for {name}, got 96"):
        load_dataset(name, str(jpeg_dir), image_size=96)


def test_incomplete_image_folders_are_answered_with_what_is_missing(folder):
    with pytest.raises(ValueError, match=r"dir must hold train/CLASS/\*.JPEG and val/.*no .*nowhere/train and no"):
        load_dataset("image_folder", str(folder / "nowhere"), image_size=8)
    (folder / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"dir has classes in .*val that train has not: cat"):
        load_dataset("image_folder", str(folder), image_size=8)
    for path in (folder / "val").rglob("*"):
        if path.is_file():
            path.unlink()
    (folder / "val" / "cat").rmdir()
    with pytest.raises(ValueError, match=r"dir has no .JPEG, .jpg or .png files in .*val/CLASS"):
        load_dataset("image_folder", str(folder), image_size=8)


@pytest.mark.parametrize("info", [{"fileFormat": "tfrecord"}, {}])
def test_files_without_random_access_are_refused_with_the_remedy(tmp_path, info):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"^dir holds cifar10 as tfrecord.*file_format='array_record'"):
        load_dataset("cifar10", str(tmp_path))


def test_the_home_folder_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="looked for") as error:
        load_dataset("cifar10")
    assert f"{tmp_path}/tensorflow_datasets/cifar10" in str(error.value)


def test_an_unknown_name_is_answered_with_a_near_one():
    with pytest.raises(
        ValueError,
        match=r"^name must be one of .*image_folder, tiny_imagenet20, got 'digit'\. Did you mean 'digits'\?",
    ):
        load_dataset("digit")


def test_an_outlandish_name_is_answered_with_all_names():
    with pytest.raises(
        ValueError, match=r"^name must be one of cifar10, digits, image_folder, tiny_imagenet20, got 'xyz'\.$"
    ):
        load_dataset("xyz")
