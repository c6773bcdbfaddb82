"""Image and video datasets as random-access sources of encoded examples, by name."""

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ssm_jax.data.prepared import PreparedSplit, prepared_splits

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of ImageNet's training images, as torchvision and timm have them."""


@runtime_checkable
class Source(Protocol):
    """Random access to examples, from several threads, and picklable.

    Nothing is decoded here: an example is a dict with `image`, encoded bytes or (H, W, C) uint8, `label`, an int or
    (num_classes,) zeros and ones, and whatever else the dataset has.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...

    def name(self, index: int, /) -> str:
        """The example's file, or what it is the n-th of, for messages."""
        ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images or videos with labels, in splits `train`, `val` and `test`.

    `mean` and `std` are those of the training images' channels, in units of the full range 0 .. 255 -> 0 .. 1.
    """

    splits: Mapping[str, Source]
    resolution: int
    """Base resolution of the model's input; the files may have any."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    title: str
    """What the images are, for tables."""
    multi_label: bool = False
    """Whether an example has any number of classes, in place of one."""
    frames: int | None = None
    """Of a clip, for videos."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.mean)


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Examples that are in memory: `images` (n, H, W, C) uint8 and `labels` (n,)."""

    title: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        """Of one example, for messages."""
        return f"example {index} of {self.title}"


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
            name: Arrays(f"digits {name}", images[part], labels[part])
            for name, part in [("train", train), ("val", val), ("test", test)]
        },
        resolution=8,
        class_names=tuple(map(str, range(10))),
        mean=(0.305,),
        std=(0.376,),
        title="scanned digits",
    )


def cifar10(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """CIFAR-10; the last tenth of train is val. Where its images are JPEG files they are copies: the title says so."""
    _one_size("cifar10", 32, image_size)
    splits, features = prepared_splits("cifar10", dir, _last_tenth(test="test"))
    return Dataset(
        splits=splits,
        resolution=32,
        class_names=tuple(features["label"].names),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.243, 0.261),
        title="CIFAR-10, JPEG copy" if features["image"].encoding_format == "jpeg" else "CIFAR-10",
    )


def cifar100(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """CIFAR-100, with its 100 fine classes; the last tenth of train is val.

    Mean and standard deviation are the values in common use, of all 50,000 training images.
    """
    _one_size("cifar100", 32, image_size)
    splits, features = prepared_splits("cifar100", dir, _last_tenth(test="test"))
    return Dataset(
        splits=splits,
        resolution=32,
        class_names=tuple(features["label"].names),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        title="CIFAR-100",
    )


def tiny_imagenet20(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """20 of the 200 classes of Tiny ImageNet, 64 x 64; the last tenth of train is val, its validation images test."""
    _one_size("tiny_imagenet20", 64, image_size)
    splits, features = prepared_splits("tiny_imagenet20", dir, _last_tenth(test="validation"))
    return Dataset(
        splits=splits,
        resolution=64,
        class_names=tuple(features["label"].names),
        mean=(0.487, 0.442, 0.385),
        std=(0.282, 0.276, 0.286),
        title="tiny_imagenet20",
    )


def imagenet2012(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """ILSVRC 2012; its 50,000 validation images are val and test, as everywhere: the test images' labels are secret.

    Class names are WordNet ids. `image_size` is 224 by default.
    """
    resolution = model_resolution(image_size, 224)
    splits, features = prepared_splits("imagenet2012", dir, {"train": "train", "val": "validation"})
    return Dataset(
        splits={**splits, "test": splits["val"]},
        resolution=resolution,
        class_names=tuple(features["label"].names),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        title="ImageNet",
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Attributes:
    """Examples whose label is which of their attributes are true: (names,) uint8."""

    examples: PreparedSplit
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        return {**example, "label": np.array([example["attributes"][name] for name in self.names], np.uint8)}

    def name(self, index: int) -> str:
        """Of one example, for messages."""
        return self.examples.name(index)


def celeb_a(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """CelebA, faces aligned and cropped to 178 x 218, with 40 attributes: multi-label.

    `image_size` is 160 by default. Mean and standard deviation are ImageNet's, not these images' own.
    """
    resolution = model_resolution(image_size, 160)
    splits, features = prepared_splits("celeb_a", dir, {"train": "train", "val": "validation", "test": "test"})
    names = tuple(sorted(features["attributes"]))  # the authors' order; the feature file, a hash map, has none
    return Dataset(
        splits={split: Attributes(examples, names) for split, examples in splits.items()},
        resolution=resolution,
        class_names=names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        title="CelebA",
        multi_label=True,
    )


def model_resolution(image_size: int | None, default: int) -> int:
    """`image_size`, or `default` for None. Raises ValueError if it is less than 1."""
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be the resolution of the model's input, at least 1, got {image_size}.")
    return image_size or default


def _one_size(name: str, resolution: int, image_size: int | None) -> None:
    if image_size not in (None, resolution):
        raise ValueError(f"image_size must be {resolution} or not be given for {name}, got {image_size}.")


def _last_tenth(test: str) -> dict[str, str]:
    return {"train": "train[:90%]", "val": "train[90%:]", "test": test}


# Names to modules, whose functions of those names make the datasets.
_DATASETS = {
    "celeb_a": "datasets",
    "cifar10": "datasets",
    "cifar100": "datasets",
    "coco": "coco",
    "digits": "datasets",
    "hmdb51": "hmdb51",
    "image_folder": "image_folder",
    "imagenet2012": "datasets",
    "tiny_imagenet20": "datasets",
}


def load_dataset(name: str, dir: str | None = None, *, image_size: int | None = None, **options: Any) -> Dataset:
    """Opens a dataset by name.

    Args:
        name: `celeb_a`, `cifar10`, `cifar100`, `coco`, `digits`, `hmdb51`, `image_folder`, `imagenet2012` or
            `tiny_imagenet20`.
        dir: where it is: for those that TensorFlow Datasets has prepared, its data_dir, by default
            `~/tensorflow_datasets`; for others their folder, by default `~/imagenet` and so on.
        image_size: base resolution of the model's input, for images that have no one small size.
        options: keyword arguments that only some have: of `hmdb51`, `fold`, `frames` and `seconds`.

    Raises:
        ValueError: if there is none of that name, it has no such option or its files are missing.
    """
    if name not in _DATASETS:
        near = difflib.get_close_matches(name, _DATASETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name must be one of {', '.join(_DATASETS)}, got {name!r}.{hint}")
    dataset: Callable[..., Dataset] = getattr(importlib.import_module(f"ssm_jax.data.{_DATASETS[name]}"), name)
    known = [p.name for p in inspect.signature(dataset).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(options.keys() - {*known}):
        raise ValueError(f"options of {name} are {', '.join(known) or 'none'}, got {', '.join(unknown)}.")
    return dataset(dir, image_size, **options)
