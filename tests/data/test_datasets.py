import pickle

import numpy as np
import pytest

from ssm_jax.data import datasets
from ssm_jax.data.datasets import Source, load_dataset, outline
from ssm_jax.data.decode import decode_image


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


def test_digits_are_named_for_messages(digits):
    assert digits.splits["val"].name(17) == "example 17 of digits val"


def pixels(example):
    return np.asarray(decode_image(example["image"]))


def test_cifar10_validates_on_the_last_tenth_of_train(cifar10_dir):
    dataset = load_dataset("cifar10", str(cifar10_dir))
    first = {name: int(pixels(source[0])[0, 0, 0]) for name, source in dataset.splits.items()}
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 54, "val": 6, "test": 10}
    assert first == {"train": 0, "val": 54, "test": 0}


def test_cifar10_gives_encoded_images_with_labels(cifar10_dir):
    dataset = load_dataset("cifar10", str(cifar10_dir))
    for source in dataset.splits.values():
        example = source[3]
        assert isinstance(example["image"], bytes)
        assert pixels(example).shape == (dataset.resolution, dataset.resolution, dataset.channels)
        assert example["label"] == int(pixels(example)[0, 0, 0]) % dataset.num_classes


def test_a_cifar10_of_jpeg_files_is_a_copy_and_called_so(cifar10_dir, jpeg_dir):
    """The original is lossless."""
    titles = [load_dataset("cifar10", str(folder)).title for folder in (cifar10_dir, jpeg_dir)]
    assert titles == ["CIFAR-10", "CIFAR-10, JPEG copy"]


def test_tiny_imagenet20_is_tested_on_its_validation_images(jpeg_dir):
    dataset = load_dataset("tiny_imagenet20", str(jpeg_dir))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 54, "val": 6, "test": 10}
    assert [int(pixels(source[0])[0, 0, 0]) for source in dataset.splits.values()] == [0, 54, 0]
    assert pixels(dataset.splits["test"][3]).shape == (dataset.resolution, dataset.resolution, dataset.channels)


@pytest.mark.parametrize("name", ["digits", "cifar10", "tiny_imagenet20"])
def test_sources_are_what_the_pipeline_wants(name, jpeg_dir):
    dataset = load_dataset(name, str(jpeg_dir))
    for source in dataset.splits.values():
        assert isinstance(source, Source)
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        assert copy.name(4) == source.name(4)
        np.testing.assert_array_equal(pixels(copy[4]), pixels(source[4]))
        with pytest.raises(IndexError):
            source[len(source)]


def images_of(source, step):
    return np.stack([pixels(source[i]) for i in range(0, len(source), step)]) / 255


def test_whole_tiny_imagenet20_is_described_as_it_is(shared):
    dataset = load_dataset("tiny_imagenet20", str(shared / "data" / "imagenet_tfds"))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 9000, "val": 1000, "test": 1000}
    images = images_of(dataset.splits["train"], 20)
    np.testing.assert_allclose(images.mean((0, 1, 2)), dataset.mean, atol=0.02)
    np.testing.assert_allclose(images.std((0, 1, 2)), dataset.std, atol=0.02)
    assert dataset.num_classes == 20
    assert dataset.class_names[0] == "n01443537"


def test_whole_cifar10_is_described_as_it_is(shared):
    folder = shared / "data" / "cifar10_full"
    dataset = load_dataset("cifar10", str(folder))
    sizes = {name: len(source) for name, source in dataset.splits.items()}
    assert sizes == {"train": 45000, "val": 5000, "test": 10000}
    images = images_of(dataset.splits["train"], 30)
    np.testing.assert_allclose(images.mean((0, 1, 2)), dataset.mean, atol=0.01)
    np.testing.assert_allclose(images.std((0, 1, 2)), dataset.std, atol=0.01)
    official = (folder / "cifar10" / "3.0.2" / "label.labels.txt").read_text().split()
    assert list(dataset.class_names) == official


def test_a_folder_of_tfds_as_imagenets_has_its_splits_and_classes(shared):
    dataset = load_dataset("imagenet2012", str(shared / "data" / "imagenet_tfds"))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 2000, "val": 400, "test": 400}
    assert (dataset.num_classes, dataset.resolution, dataset.multi_label) == (1000, 224, False)
    for i in range(0, 2000, 97):
        example = dataset.splits["train"][i]
        assert example["file_name"].decode().startswith(dataset.class_names[example["label"]])
        assert pixels(example).shape == (64, 64, 3)


def test_the_models_resolution_is_free_where_images_have_many(shared):
    folder = str(shared / "data" / "imagenet_tfds")
    assert load_dataset("imagenet2012", folder, image_size=160).resolution == 160
    with pytest.raises(
        ValueError, match=r"^image_size must be the resolution of the model's input, at least 1, got 0\."
    ):
        load_dataset("imagenet2012", folder, image_size=0)


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("cifar10", 32), ("cifar100", 32), ("tiny_imagenet20", 64)])
def test_other_datasets_have_one(name, size, jpeg_dir):
    with pytest.raises(ValueError, match=f"^image_size must be {size} or not be given for {name}, got 96"):
        load_dataset(name, str(jpeg_dir), image_size=96)


def test_an_unknown_name_is_answered_with_a_near_one():
    with pytest.raises(
        ValueError,
        match=r"^name must be one of .*imagenet2012, tiny_imagenet20, got 'digit'\. Did you mean 'digits'\?",
    ):
        load_dataset("digit")


def test_an_outlandish_name_is_answered_with_all_names():
    with pytest.raises(
        ValueError,
        match=r"^name must be one of celeb_a, cifar10, cifar100, coco, digits, hmdb51, image_folder, imagenet2012, "
        r"tiny_imagenet20, got 'xyz'\.$",
    ):
        load_dataset("xyz")


def test_options_of_other_datasets_are_refused():
    with pytest.raises(ValueError, match=r"^options of digits are none, got fold, frames\."):
        load_dataset("digits", frames=30, fold=1)
    with pytest.raises(ValueError, match=r"^options of hmdb51 are fold, frames, seconds, got splits\."):
        load_dataset("hmdb51", splits=30)


@pytest.mark.parametrize("name", datasets._OUTLINES)
def test_without_files_there_is_all_but_examples(name):
    known, dataset = outline(name), load_dataset(name, "/nowhere", files=False)
    assert (dataset.num_classes, dataset.resolution, dataset.channels) == (
        known.classes,
        known.resolution,
        known.channels,
    )
    assert (dataset.mean, dataset.std, dataset.multi_label) == (known.mean, known.std, known.multi_label)
    assert (dataset.frames is None) == (name != "hmdb51")
    assert len(dataset.splits["train"]) == known.images
    assert isinstance(dataset.splits["train"], Source)
    with pytest.raises(ValueError, match=r"example 3 of .* without its files"):
        dataset.splits["train"][3]


def test_digits_are_what_their_outline_says(digits):
    described = load_dataset("digits", files=False)
    assert len(described.splits["train"]) == len(digits.splits["train"])
    for field in ("resolution", "num_classes", "channels", "mean", "std", "multi_label", "frames", "title"):
        assert getattr(described, field) == getattr(digits, field)


def test_outlines_take_the_options_of_their_datasets():
    assert load_dataset("imagenet2012", image_size=96, files=False).resolution == 96
    assert load_dataset("hmdb51", frames=7, files=False).frames == 7
    with pytest.raises(ValueError, match=r"^image_size must be 32 or not be given for cifar10, got 96\."):
        load_dataset("cifar10", image_size=96, files=False)
    with pytest.raises(ValueError, match=r"^options of digits are none, got frames\."):
        load_dataset("digits", frames=30, files=False)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar10_full"), ("tiny_imagenet20", "imagenet_tfds")])
def test_whole_datasets_have_as_many_images_as_their_outlines(name, folder, shared):
    dataset = load_dataset(name, str(shared / "data" / folder))
    assert (len(dataset.splits["train"]), dataset.num_classes) == (outline(name).images, outline(name).classes)
