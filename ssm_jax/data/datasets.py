"""Image classification datasets as random-access sources."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

Source = Sequence[Mapping[str, Any]] | grain.sources.RandomAccessDataSource
"""Random access to examples: dicts with `image` (H, W, C) uint8 and `label`."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images of one size with one label each, in splits `train`, `val` and `test`.

    `mean` and `std` are those of the training images' channels, in units of the full range 0 .. 255 -> 0 .. 1.
    """

    splits: Mapping[str, Source]
    resolution: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    title: str
    """What the images are, for tables."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.mean)


def digits(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """The 1,797 scanned 8 x 8 digits that scikit-learn ships (UCI ML hand-written digits, test part).

    They have no official split: 70 % train, 10 % val, 20 % test, drawn once, with equal shares of each class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    del dir  # they come with scikit-learn
    _one_size("digits", 8, image_size)
    raw: Any = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = raw.target.astype(np.int32)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    train, val = train_test_split(rest, test_size=0.125, random_state=0, stratify=labels[rest])
    return Dataset(
        splits={
            name: [{"image": images[i], "label": labels[i]} for i in part]
            for name, part in [("train", train), ("val", val), ("test", test)]
        },
        resolution=8,
        class_names=tuple(map(str, range(10))),
        mean=(0.305,),
        std=(0.376,),
        title="scanned digits",
    )


def cifar10(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """CIFAR-10. Where its images are JPEG files, they are copies of the originals, and the title says so."""
    _one_size("cifar10", 32, image_size)
    dataset, encoding = _prepared(
        "cifar10", dir, resolution=32, test="test", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.243, 0.261)
    )
    title = "CIFAR-10, JPEG copy" if encoding == "jpeg" else "CIFAR-10"
    return dataclasses.replace(dataset, title=title)


def tiny_imagenet20(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """20 of the 200 classes of Tiny ImageNet, 64 x 64; its validation images are the test images."""
    _one_size("tiny_imagenet20", 64, image_size)
    dataset, _ = _prepared(
        "tiny_imagenet20", dir, resolution=64, test="validation", mean=(0.487, 0.442, 0.385), std=(0.282, 0.276, 0.286)
    )
    return dataset


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files with a label each; the largest square in the middle of an image is resized to `size`."""

    files: Sequence[tuple[str, int]]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decodes one, to RGB. Raises ValueError, naming the file, if that is not an image."""
        from PIL import Image, ImageOps

        path, label = self.files[index]
        try:
            with epath.Path(path).open("rb") as file, Image.open(file) as image:
                image = ImageOps.fit(image.convert("RGB"), (self.size, self.size), Image.Resampling.BICUBIC)
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        return {"image": np.asarray(image), "label": label}


def image_folder(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """A folder as ImageNet's: train/CLASS/*.JPEG and val/CLASS/*.JPEG (or .jpg, .png); the test images are val's too.

    `image_size` is their resolution after resizing and cutting.
    """
    if image_size is None or image_size < 1:
        raise ValueError(f"image_size must be the resolution of the images, at least 1, got {image_size}.")
    root = epath.Path(dir or "~/imagenet").expanduser()
    folders = {split: root / split for split in ("train", "val")}
    if absent := [str(folder) for folder in folders.values() if not folder.is_dir()]:
        raise ValueError(
            f"dir must hold train/CLASS/*.JPEG and val/CLASS/*.JPEG, got {root}: no {' and no '.join(absent)}."
        )
    classes = sorted(folder.name for folder in folders["train"].iterdir() if folder.is_dir())
    if unknown := sorted({folder.name for folder in folders["val"].iterdir() if folder.is_dir()} - set(classes)):
        raise ValueError(f"dir has classes in {folders['val']} that train has not: {', '.join(unknown[:5])}.")

    def source(split: str) -> ImageFiles:
        files = [
            (str(path), label)
            for label, name in enumerate(classes)
            if (folders[split] / name).is_dir()
            for path in sorted((folders[split] / name).iterdir())
            if path.suffix.lower() in (".jpeg", ".jpg", ".png")
        ]
        if not files:
            raise ValueError(f"dir has no .JPEG, .jpg or .png files in {folders[split]}/CLASS.")
        return ImageFiles(files, image_size)

    val = source("val")
    return Dataset(
        splits={"train": source("train"), "val": val, "test": val},
        resolution=image_size,
        class_names=tuple(classes),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        title=root.name,
    )


def _one_size(name: str, resolution: int, image_size: int | None) -> None:
    if image_size not in (None, resolution):
        raise ValueError(f"image_size must be {resolution} or not be given for {name}, got {image_size}.")


def _prepared(
    name: str, dir: str | None, *, resolution: int, test: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Dataset, str]:
    """A dataset that TensorFlow Datasets has prepared in array_record form, and how its images are encoded.

    The last tenth of train is val, and `test` the split with the test images.
    """
    folder = _folder(name, dir)
    splits = {"train": "train[:90%]", "val": "train[90%:]", "test": test}
    import tensorflow_datasets as tfds

    sources: Any = tfds.data_source(
        name, split=list(splits.values()), data_dir=str(folder.parent.parent), download=False
    )
    dataset = Dataset(
        splits=dict(zip(splits, sources, strict=True)),
        resolution=resolution,
        class_names=tuple(sources[0].dataset_info.features["label"].names),
        mean=mean,
        std=std,
        title=name,
    )
    features = json.loads((folder / "features.json").read_text())["featuresDict"]["features"]
    return dataset, features["image"]["image"].get("encodingFormat", "png")


def _folder(name: str, dir: str | None) -> epath.Path:
    """The folder of a prepared dataset's newest version, after checking for the mistakes that tfds explains badly."""
    folder = epath.Path(dir or "~/tensorflow_datasets").expanduser() / name
    versions = sorted(folder.glob("*/dataset_info.json")) if folder.exists() else []
    if not versions:
        raise ValueError(
            f"dir holds no prepared {name}: looked for {folder}/VERSION/dataset_info.json. Set it to the folder that "
            f"has {name}/ in it: the data_dir of tfds.builder({name!r}, data_dir=..., file_format='array_record')."
        )
    file_format = json.loads(versions[-1].read_text()).get("fileFormat", "tfrecord")
    if file_format != "array_record":
        raise ValueError(
            f"dir holds {name} as {file_format}, which has no random access: {versions[-1].parent}. "
            "Prepare it with file_format='array_record'."
        )
    return versions[-1].parent


_DATASETS: dict[str, Callable[..., Dataset]] = {
    "cifar10": cifar10,
    "digits": digits,
    "image_folder": image_folder,
    "tiny_imagenet20": tiny_imagenet20,
}


def load_dataset(name: str, dir: str | None = None, *, image_size: int | None = None) -> Dataset:
    """Opens a dataset by name.

    Args:
        name: `cifar10`, `digits`, `image_folder` or `tiny_imagenet20`.
        dir: where it is: for prepared ones, of TensorFlow Datasets, by default `~/tensorflow_datasets`; for an image
            folder, `~/imagenet`.
        image_size: resolution of an image folder, whose files may have any.

    Raises:
        ValueError: if there is none of that name or its files are missing.
    """
    if name not in _DATASETS:
        near = difflib.get_close_matches(name, _DATASETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name must be one of {', '.join(_DATASETS)}, got {name!r}.{hint}")
    return _DATASETS[name](dir, image_size)
