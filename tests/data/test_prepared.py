import json
import shutil

import pytest

from ssm_jax.data.datasets import load_dataset
from ssm_jax.data.decode import BrokenExampleError
from ssm_jax.data.prepared import prepared_splits

PREPARE = r" To prepare it: python -m ssm_jax\.data\.prepare cifar10 --data_dir="


@pytest.fixture
def folder(tmp_path, cifar10_dir):
    """A prepared CIFAR-10 whose train split is in three files of 60 images, which are the same."""
    version = tmp_path / "cifar10" / "3.0.2"
    shutil.copytree(cifar10_dir / "cifar10" / "3.0.2", version)
    (one,) = version.glob("*train*")
    for i in range(3):
        shutil.copyfile(one, version / f"cifar10-train.array_record-0000{i}-of-00003")
    one.unlink()
    info = json.loads((version / "dataset_info.json").read_text())
    (train,) = (split for split in info["splits"] if split["name"] == "train")
    train["shardLengths"] = ["60"] * 3
    (version / "dataset_info.json").write_text(json.dumps(info))
    return version


def refused(folder, message):
    with pytest.raises(ValueError, match=message):
        load_dataset("cifar10", str(folder.parent.parent))


def shard(folder, i):
    return folder / f"cifar10-train.array_record-0000{i}-of-00003"


def test_files_follow_each_other(folder):
    splits, _ = prepared_splits("cifar10", str(folder.parent.parent), {"a": "train", "b": "train[60:100]"})
    assert {name: len(split) for name, split in splits.items()} == {"a": 180, "b": 40}
    assert [splits["a"][i]["label"] for i in (0, 59, 60, 179)] == [0, 9, 0, 9]
    assert [splits["b"][i]["label"] for i in (0, 39)] == [0, 9]
    assert splits["b"].name(3) == "example 3 of cifar10 train[60:100]"


def test_a_missing_folder_is_answered_with_where_it_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"^dir holds no prepared cifar10: looked for .*/VERSION.*" + PREPARE) as error:
        load_dataset("cifar10", str(tmp_path / "nowhere"))
    assert f"looked for {tmp_path}/nowhere/cifar10/VERSION/dataset_info.json" in str(error.value)
    assert str(error.value).endswith(f"--data_dir={tmp_path}/nowhere")


def test_a_folder_without_versions_is_answered_like_a_missing_one(tmp_path):
    (tmp_path / "cifar10" / "notes").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^dir holds no prepared cifar10: looked for .*/cifar10/VERSION"):
        load_dataset("cifar10", str(tmp_path))


def test_the_command_that_prepares_is_not_named_for_what_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"^dir holds no prepared tiny_imagenet20: .* has tiny_imagenet20/ in it\.$"):
        load_dataset("tiny_imagenet20", str(tmp_path))


def test_the_home_folder_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="looked for") as error:
        load_dataset("cifar10")
    assert f"{tmp_path}/tensorflow_datasets/cifar10" in str(error.value)


def test_an_unfinished_preparation_is_not_read(folder):
    """tfds writes dataset_info.json there last, but before it renames the folder."""
    folder.rename(folder.parent / "incomplete.A1B2C3_3.0.2")
    refused(folder, r"^dir holds an incomplete cifar10: .*/cifar10/incomplete\.A1B2C3_3\.0\.2, which.*" + PREPARE)


def test_an_unfinished_preparation_beside_a_version_does_not_matter(folder):
    (folder.parent / "incomplete.A1B2C3_3.0.2").mkdir()
    assert len(load_dataset("cifar10", str(folder.parent.parent)).splits["train"]) == 162


def test_the_newest_version_is_read(folder):
    """By number: 10 is newer than 3."""
    folder.rename(folder.parent / "10.0.0")
    (folder.parent / "3.0.2").mkdir()
    assert len(load_dataset("cifar10", str(folder.parent.parent)).splits["test"]) == 10


@pytest.mark.parametrize("info", [{"fileFormat": "tfrecord"}, {}])
def test_files_without_random_access_are_refused_with_the_remedy(folder, info):
    (folder / "dataset_info.json").write_text(json.dumps(info))
    refused(
        folder, r"^dir holds cifar10 as tfrecord, which has no random access.*Prepare it as array_record.*" + PREPARE
    )


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_descriptions_that_were_not_copied_whole_are_named(folder, file):
    content = (folder / file).read_text()
    (folder / file).write_text(content[: len(content) // 2])
    refused(folder, rf"^dir holds an incomplete cifar10: .*/3\.0\.2/{file} is missing or is no JSON\..*{PREPARE}")
    (folder / file).unlink()
    refused(folder, rf"^dir holds an incomplete cifar10: .*/3\.0\.2/{file} is missing or is no JSON\..*{PREPARE}")


def test_missing_files_are_counted_and_the_first_is_named(folder):
    shard(folder, 1).unlink()
    refused(
        folder,
        "^dir holds an incomplete cifar10: of the 3 files of split train in .*, 1 is missing: "
        rf"cifar10-train.array_record-00001-of-00003\. Copy them again, or delete .*{PREPARE}",
    )
    shard(folder, 2).unlink()
    refused(folder, r"2 are missing: cifar10-train.array_record-00001-of-00003 and 1 more\.")


@pytest.mark.parametrize("size", [0, 1000, 65536 + 1])
def test_truncated_files_are_found_before_they_are_read(folder, size):
    content = shard(folder, 2).read_bytes()
    shard(folder, 2).write_bytes((2 * content)[:size])
    refused(folder, r"1 is empty or truncated: cifar10-train\.array_record-00002-of-00003\.")


def test_files_of_splits_that_are_not_used_may_be_missing(folder):
    for path in folder.glob("*train*"):
        path.unlink()
    splits, _ = prepared_splits("cifar10", str(folder.parent.parent), {"test": "test"})
    assert len(splits["test"]) == 10


def test_a_missing_split_is_named(folder):
    with pytest.raises(ValueError, match=r"^dir holds cifar10 without the split validation: .* has test, train\."):
        prepared_splits("cifar10", str(folder.parent.parent), {"train": "train", "val": "validation[:50%]"})


def test_a_damaged_example_is_named(folder):
    content = bytearray(shard(folder, 1).read_bytes())
    content[200:2000] = bytes(1800)
    shard(folder, 1).write_bytes(content)
    splits, _ = prepared_splits("cifar10", str(folder.parent.parent), {"train": "train"})
    assert splits["train"][59]["label"] == 9
    assert splits["train"][120]["label"] == 0
    with pytest.raises(BrokenExampleError, match=r"^example 60 of cifar10 train cannot be read: "):
        splits["train"][60]
