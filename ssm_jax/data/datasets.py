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
    )


def cifar10(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """CIFAR-10 as prepared by TensorFlow Datasets in array_record form; the last tenth of train is val."""
    _one_size("cifar10", 32, image_size)
    return Dataset(
        splits=_tfds("cifar10", dir, {"train": "train[:90%]", "val": "train[90%:]", "test": "test"}),
        resolution=32,
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.243, 0.261),
    )


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
    )


def _one_size(name: str, resolution: int, image_size: int | None) -> None:
    if image_size not in (None, resolution):
        raise ValueError(f"image_size must be {resolution} or not be given for {name}, got {image_size}.")


def _tfds(name: str, dir: str | None, splits: Mapping[str, str]) -> dict[str, Source]:
    """Opens splits of a prepared dataset, after checking for the mistakes that tfds explains badly."""
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
    import tensorflow_datasets as tfds

    opened = tfds.data_source(name, split=list(splits.values()), data_dir=str(folder.parent), download=False)
    return dict(zip(splits, opened, strict=True))


_DATASETS: dict[str, Callable[..., Dataset]] = {"cifar10": cifar10, "digits": digits, "image_folder": image_folder}


def load_dataset(name: str, dir: str | None = None, *, image_size: int | None = None) -> Dataset:
    """Opens a dataset by name.

    Args:
        name: `cifar10`, `digits` or `image_folder`.
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
