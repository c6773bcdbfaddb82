import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo

from ssm_jax.data.datasets import load_dataset
from ssm_jax.data.decode import decode_image
from ssm_jax.data.prepare import PrepareError, prepare


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def jpeg(colour, mode="RGB", size=(20, 10)):
    return encoded(Image.new(mode, size, colour), format="JPEG", quality=95)


def tar(files, mode="w"):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=mode) as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def put(monkeypatch, folder, name, files):
    """Puts files where a user would, by hand, and tells tfds their sizes and hashes in place of the real ones'."""
    manual = folder / "downloads" / "manual"
    manual.mkdir(parents=True, exist_ok=True)
    builder = tfds.builder_cls(name)
    infos = {}
    for url, info in builder.url_infos.items():
        file = info.filename or pathlib.Path(url).name
        (manual / file).write_bytes(files[file])
        infos[url] = UrlInfo(
            size=len(files[file]), checksum=hashlib.sha256(files[file]).hexdigest(), filename=info.filename
        )
    monkeypatch.setattr(builder, "url_infos", infos)


def cifar_images(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def cifar_file(images, *labels):
    """As CIFAR's authors write it: for each image its labels, then all red, green and blue values."""
    rows = zip(*labels, images.transpose(0, 3, 1, 2), strict=True)
    return b"".join(bytes(map(int, row[:-1])) + row[-1].tobytes() for row in rows)


@pytest.fixture
def cifar10_files():
    labels = np.arange(10)
    batches = {f"data_batch_{k}.bin": cifar_file(cifar_images(10, k), labels) for k in range(1, 6)}
    batches["test_batch.bin"] = cifar_file(cifar_images(10, 6), labels)
    batches["batches.meta.txt"] = b"\n".join(b"class %d" % i for i in range(10)) + b"\n\n"
    files = {f"cifar-10-batches-bin/{name}": content for name, content in batches.items()}
    return {"cifar-10-binary.tar.gz": tar(files, "w:gz")}


def by_id(source):
    return {source[i]["id"].decode(): source[i] for i in range(len(source))}


def test_cifar10_is_prepared_without_loss(tmp_path, monkeypatch, cifar10_files):
    put(monkeypatch, tmp_path, "cifar10", cifar10_files)
    assert prepare("cifar10", tmp_path)
    assert "tensorflow" not in sys.modules
    dataset = load_dataset("cifar10", str(tmp_path))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 45, "val": 5, "test": 10}
    assert dataset.class_names == tuple(f"class {i}" for i in range(10))
    assert dataset.title == "CIFAR-10"
    train = by_id(dataset.splits["train"]) | by_id(dataset.splits["val"])
    originals = np.concatenate([cifar_images(10, k) for k in range(1, 6)])
    for i, original in enumerate(originals):
        example = train[f"train_{i:05}"]
        np.testing.assert_array_equal(np.asarray(decode_image(example["image"])), original)
        assert example["label"] == i % 10


def test_cifar100_is_labelled_with_its_fine_classes(tmp_path, monkeypatch):
    fine = np.array([7, 99, 0])
    files = {
        "train.bin": cifar_file(cifar_images(3, 0).repeat(4, 0), np.full(12, 19), fine.repeat(4)),
        "test.bin": cifar_file(cifar_images(3, 1), np.full(3, 19), fine),
        "coarse_label_names.txt": "\n".join(f"coarse {i}" for i in range(20)).encode(),
        "fine_label_names.txt": "\n".join(f"fine {i}" for i in range(100)).encode(),
    }
    archive = tar({f"cifar-100-binary/{name}": content for name, content in files.items()}, "w:gz")
    put(monkeypatch, tmp_path, "cifar100", {"cifar-100-binary.tar.gz": archive})
    assert prepare("cifar100", tmp_path)
    dataset = load_dataset("cifar100", str(tmp_path))
    assert dataset.class_names[99] == "fine 99"
    test = by_id(dataset.splits["test"])
    assert [test[f"test_{i:05}"]["label"] for i in range(3)] == [7, 99, 0]
    np.testing.assert_array_equal(np.asarray(decode_image(test["test_00001"]["image"])), cifar_images(3, 1)[1])


@pytest.fixture
def imagenet_files():
    """Two classes; one image is among the 22 of ImageNet that are CMYK, another is its one PNG file."""
    cmyk, png = "n01739381_1309.JPEG", "n02105855_2933.JPEG"
    one = {"n01739381_7.JPEG": jpeg((200, 0, 0)), cmyk: jpeg((0, 255, 255, 0), "CMYK")}
    two = {png: encoded(Image.new("RGB", (20, 10), (0, 0, 200)), format="PNG")}
    val = {f"ILSVRC2012_val_0000000{i}.JPEG": jpeg((0, 90 * i, 0)) for i in (1, 2)}
    return {
        "ILSVRC2012_img_train.tar": tar({"n01739381.tar": tar(one), "n02105855.tar": tar(two)}),
        "ILSVRC2012_img_val.tar": tar(val),
    }


def test_imagenet_is_prepared_from_its_tar_files(tmp_path, monkeypatch, imagenet_files):
    put(monkeypatch, tmp_path, "imagenet2012", imagenet_files)
    assert prepare("imagenet2012", tmp_path)
    dataset = load_dataset("imagenet2012", str(tmp_path))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 3, "val": 2, "test": 2}
    assert (dataset.num_classes, dataset.resolution) == (1000, 224)
    train = {example["file_name"].decode(): example for example in dataset.splits["train"]}
    colours = {
        "n01739381_7.JPEG": (200, 0, 0),
        "n01739381_1309.JPEG": (255, 0, 0),
        "n02105855_2933.JPEG": (0, 0, 200),
    }
    for name, colour in colours.items():
        assert dataset.class_names[train[name]["label"]] == name.partition("_")[0]
        with Image.open(io.BytesIO(train[name]["image"])) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            np.testing.assert_allclose(np.asarray(image), np.broadcast_to(colour, (10, 20, 3)), atol=8)
    assert train["n01739381_7.JPEG"]["image"] == jpeg((200, 0, 0))  # the other files are as they were


def test_imagenet_needs_files_that_only_users_can_get(tmp_path, monkeypatch, imagenet_files):
    with pytest.raises(PrepareError) as error:
        prepare("imagenet2012", tmp_path)
    message = str(error.value)
    assert f"In {tmp_path}/downloads/manual, which is tfds's manual_dir, ILSVRC2012_img_train.tar is missing" in message
    assert "You need to register on https://image-net.org/download-images" in message
    assert not list(tmp_path.iterdir())
    put(monkeypatch, tmp_path, "imagenet2012", imagenet_files)
    val = tmp_path / "downloads/manual/ILSVRC2012_img_val.tar"
    val.write_bytes(imagenet_files[val.name][:-1024])
    with pytest.raises(PrepareError, match=r"manual_dir, ILSVRC2012_img_val\.tar has 9,216 bytes of 10,240\."):
        prepare("imagenet2012", tmp_path)


def test_celeb_a_is_prepared_with_its_attributes(tmp_path, monkeypatch):
    from tensorflow_datasets.datasets.celeb_a import celeb_a_dataset_builder

    names, landmarks = celeb_a_dataset_builder.ATTR_HEADINGS, celeb_a_dataset_builder.LANDMARK_HEADINGS
    attributes = np.random.default_rng(0).choice([-1, 1], (6, 40))
    photos = [jpeg((40 * i, 0, 0), size=(178, 218)) for i in range(6)]

    def table(header, rows):
        lines = [f"{i + 1:06}.jpg {' '.join(map(str, row))}" for i, row in enumerate(rows)]
        return "\n".join([*header, *lines, ""]).encode()

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as out:
        for i, photo in enumerate(photos):
            out.writestr(f"img_align_celeba/{i + 1:06}.jpg", photo)
    files = {
        "img_align_celeba.zip": archive.getvalue(),
        "list_eval_partition.txt": table([], [[0], [0], [0], [1], [1], [2]]),
        "list_attr_celeba.txt": table(["6", " ".join(names)], attributes),
        "list_landmarks_align_celeba.txt": table(["6", " ".join(landmarks)], [range(10)] * 6),
        "identity_CelebA.txt": table([], [[i] for i in range(6)]),
    }
    put(monkeypatch, tmp_path, "celeb_a", files)
    assert prepare("celeb_a", tmp_path)
    dataset = load_dataset("celeb_a", str(tmp_path))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 3, "val": 2, "test": 1}
    assert dataset.multi_label
    assert dataset.class_names == tuple(names)
    (test,) = dataset.splits["test"]
    assert test["image"] == photos[5]
    assert test["label"].dtype == np.uint8
    np.testing.assert_array_equal(test["label"], attributes[5] > 0)
    train = {example["image"]: example["label"] for example in dataset.splits["train"]}
    for i in range(3):
        np.testing.assert_array_equal(train[photos[i]], attributes[i] > 0)


def test_what_is_there_is_left_alone(cifar10_dir):
    before = {path: path.stat().st_mtime_ns for path in cifar10_dir.rglob("*")}
    assert not prepare("cifar10", cifar10_dir)
    assert {path: path.stat().st_mtime_ns for path in cifar10_dir.rglob("*")} == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda info: info.write_text('{"fileFormat": "tfrecord"}'), "^dir holds cifar10 as tfrecord, which has no"),
        (lambda info: info.unlink(), "^dir holds an incomplete cifar10: .*dataset_info.json is missing.* delete"),
    ],
)
def test_what_is_there_and_of_no_use_is_not_overwritten(tmp_path, cifar10_dir, damage, message):
    shutil.copytree(cifar10_dir, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "cifar10" / "3.0.2" / "dataset_info.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PrepareError, match=message):
        prepare("cifar10", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_download_leaves_nothing_and_is_tried_again(tmp_path, monkeypatch, cifar10_files):
    def get(*args, **kwargs):
        raise requests.ConnectionError("no network")

    with monkeypatch.context() as context:
        context.setattr(requests.Session, "get", get)
        with pytest.raises(PrepareError) as error:
            prepare("cifar10", tmp_path)
    assert str(error.value) == (
        "cifar10 cannot be prepared: no network. What cannot be downloaded can be put into "
        f"{tmp_path}/downloads/manual by hand: cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz."
    )
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("downloads", "extracted", "cifar10")]
    assert not (tmp_path / "cifar10").exists()
    put(monkeypatch, tmp_path, "cifar10", cifar10_files)
    assert prepare("cifar10", tmp_path)


def test_a_file_that_is_not_what_it_should_be_is_refused(tmp_path, monkeypatch, cifar10_files):
    put(monkeypatch, tmp_path, "cifar10", cifar10_files)
    with (tmp_path / "downloads/manual/cifar-10-binary.tar.gz").open("ab") as file:
        file.write(b"more")
    with pytest.raises(PrepareError, match=r"cifar-10-binary\.tar\.gz, has wrong checksum"):
        prepare("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()


def test_a_preparation_that_is_stopped_leaves_nothing(tmp_path, monkeypatch, cifar10_files):
    put(monkeypatch, tmp_path, "cifar10", cifar10_files)
    seen = []

    def interrupted(image, *args, **kwargs):
        seen.extend((tmp_path / "cifar10").iterdir())
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Image, "fromarray", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("cifar10", tmp_path)
    assert [path.name.partition(".")[0] for path in seen] == ["incomplete"]
    assert not (tmp_path / "cifar10").exists()
    assert prepare("cifar10", tmp_path)


def command(*arguments):
    offline = {"HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}
    return subprocess.run(
        [sys.executable, "-m", "ssm_jax.data.prepare", *arguments],
        env=os.environ | offline,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_fails_with_one_message(tmp_path):
    done = command("cifar10", f"--data_dir={tmp_path}")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("error: cifar10 cannot be prepared: ")
    assert f"{tmp_path}/downloads/manual by hand: cifar-10-binary.tar.gz from https://www.cs.toronto.edu" in last
    assert "Traceback" not in done.stderr
    assert "Retrying" not in done.stderr


def test_the_command_says_what_is_there(cifar10_dir):
    done = command("cifar10", f"--data_dir={cifar10_dir}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (f"already there: CIFAR-10, 10 classes, 54 train, 6 val, 10 test examples in {cifar10_dir}\n")


def test_the_command_wants_a_name_it_knows():
    done = command("cifar11")
    assert done.returncode == 2
    assert done.stderr == (
        "error: give the name of one dataset, celeb_a, cifar10, cifar100, imagenet2012, got cifar11.\n"
    )
