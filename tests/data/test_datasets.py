import json

import numpy as np
import pytest

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
        ValueError, match=r"^name must be one of cifar10, digits, got 'digit'\. Did you mean 'digits'\?"
    ):
        load_dataset("digit")


def test_an_outlandish_name_is_answered_with_all_names():
    with pytest.raises(ValueError, match=r"^name must be one of cifar10, digits, got 'xyz'\.$"):
        load_dataset("xyz")
