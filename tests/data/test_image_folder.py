import pickle

import numpy as np
import pytest
from PIL import Image

from ssm_jax.data.datasets import Source, load_dataset
from ssm_jax.data.decode import BrokenExampleError, decode_image


@pytest.fixture
def folder(tmp_path):
    """Two classes in train and one of them in val."""
    for i, name in enumerate(["train/bee/c.jpg", "train/ant/b.png", "train/ant/a.JPEG", "val/bee/d.Png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (50 * i, 0, 0)).save(path)
    (tmp_path / "train/ant/notes.txt").write_text("no image")
    (tmp_path / "train/words.txt").write_text("no class")
    return tmp_path


def test_files_are_labelled_by_class_in_alphabetical_order(folder):
    dataset = load_dataset("image_folder", str(folder))
    assert dataset.class_names == ("ant", "bee")
    train, val, test = (dataset.splits[name] for name in ("train", "val", "test"))
    names = [f"{folder}/train/ant/a.JPEG", f"{folder}/train/ant/b.png", f"{folder}/train/bee/c.jpg"]
    assert [train.name(i) for i in range(len(train))] == names
    assert [example["label"] for example in train] == [0, 0, 1]
    assert [example["label"] for example in test] == [1]
    assert val is test


def test_examples_are_the_files_bytes(folder):
    train = load_dataset("image_folder", str(folder)).splits["train"]
    for i in range(3):
        with open(train.name(i), "rb") as file:
            assert train[i]["image"] == file.read()


def test_sources_are_what_the_pipeline_wants(folder):
    train = load_dataset("image_folder", str(folder)).splits["train"]
    assert isinstance(train, Source)
    copy = pickle.loads(pickle.dumps(train))
    assert [copy[i] for i in range(3)] == [train[i] for i in range(3)]


def test_the_models_resolution_is_224_or_asked_for(folder):
    assert load_dataset("image_folder", str(folder)).resolution == 224
    assert load_dataset("image_folder", str(folder), image_size=8).resolution == 8
    with pytest.raises(
        ValueError, match=r"^image_size must be the resolution of the model's input, at least 1, got 0\."
    ):
        load_dataset("image_folder", str(folder), image_size=0)


def test_a_file_that_is_gone_is_named(folder):
    train = load_dataset("image_folder", str(folder)).splits["train"]
    (folder / "train/ant/b.png").unlink()
    with pytest.raises(BrokenExampleError, match=r"^.*train/ant/b\.png cannot be read: "):
        train[1]


def test_image_folders_that_are_none_are_refused(folder):
    with pytest.raises(ValueError, match=r"^dir must hold train/CLASS.* no .*/nowhere/train and no .*/nowhere/val"):
        load_dataset("image_folder", str(folder / "nowhere"))
    (folder / "val" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"^dir has classes in .*val that train has not: cat"):
        load_dataset("image_folder", str(folder))
    (folder / "val" / "cat").rmdir()
    (folder / "val/bee/d.Png").unlink()
    with pytest.raises(ValueError, match=r"^dir has no .JPEG, .jpg or .png files in .*val/CLASS"):
        load_dataset("image_folder", str(folder))


def test_the_home_folder_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"got {tmp_path}/imagenet: no"):
        load_dataset("image_folder")


def test_20_classes_of_tiny_imagenet_are_read_whole(shared):
    dataset = load_dataset("image_folder", str(shared / "data" / "imagefolder_mini"))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 4000, "val": 1000, "test": 1000}
    for source, of_each in zip(dataset.splits.values(), (200, 50, 50), strict=True):
        np.testing.assert_array_equal(np.bincount(source.labels), np.full(20, of_each))
        assert decode_image(source[0]["image"]).size == (64, 64)
        last = source[len(source) - 1]
        assert f"/{dataset.class_names[last['label']]}/" in source.name(len(source) - 1)


def test_hidden_folders_are_no_classes(tmp_path):
    for name in ("train/ant/a.png", "val/ant/b.png", "train/.ipynb_checkpoints/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    dataset = load_dataset("image_folder", str(tmp_path))
    assert dataset.class_names == ("ant",)
    assert len(dataset.splits["train"]) == 1
