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


@dataclasses.dataclass(frozen=True)
class Outline:
    """What is known of a dataset without its files; of one that is whatever a folder has, what it is taken to be."""

    name: str
    title: str
    resolution: int
    """Base resolution, unless another is asked for."""
    classes: int
    images: int
    """In `train`; of videos, these."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    one_size: bool = False
    """Whether no other resolution can be asked for."""
    multi_label: bool = False
    frames: int | None = None
    """Of a clip, unless another number is asked for."""

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    def resolution_for(self, image_size: int | None) -> int:
        """`image_size`, or the default for None. Raises ValueError for one that cannot be."""
        if self.one_size and image_size not in (None, self.resolution):
            raise ValueError(f"image_size must be {self.resolution} or not be given for {self.name}, got {image_size}.")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size must be the resolution of the model's input, at least 1, got {image_size}.")
        return image_size or self.resolution

    def dataset(
        self,
        splits: Mapping[str, Source],
        class_names: tuple[str, ...],
        *,
        image_size: int | None,
        title: str | None = None,
        frames: int | None = None,
    ) -> Dataset:
        """The dataset, as `resolution_for` and `title` change the outline. Raises ValueError for an `image_size`."""
        return Dataset(
            splits=splits,
            resolution=self.resolution_for(image_size),
            class_names=class_names,
            mean=self.mean,
            std=self.std,
            title=title or self.title,
            multi_label=self.multi_label,
            frames=frames,
        )


_OUTLINES = {
    outline.name: outline
    for outline in (
        # Mean and standard deviation are ImageNet's, not these images' own.
        Outline("celeb_a", "CelebA", 160, 40, 162_770, multi_label=True),
        Outline("cifar10", "CIFAR-10", 32, 10, 45_000, (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), one_size=True),
        # In common use, and of all 50,000 training images.
        Outline(
            "cifar100", "CIFAR-100", 32, 100, 45_000, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), one_size=True
        ),
        Outline("coco", "COCO 2017", 224, 80, 118_287, multi_label=True),
        Outline("digits", "scanned digits", 8, 10, 1_257, (0.305,), (0.376,), one_size=True),
        Outline(
            *("hmdb51", "HMDB-51", 224, 51, 3_570),
            mean=(110.2 / 255, 100.64 / 255, 96.0 / 255),
            std=(58.15 / 255, 56.47 / 255, 55.33 / 255),
            frames=30,
        ),
        Outline("image_folder", "a folder like ImageNet's", 224, 1000, 1_281_167),
        Outline("imagenet2012", "ImageNet", 224, 1000, 1_281_167),
        Outline(
            *("tiny_imagenet20", "tiny_imagenet20", 64, 20, 9_000),
            mean=(0.487, 0.442, 0.385),
            std=(0.282, 0.276, 0.286),
            one_size=True,
        ),
    )
}


def outline(name: str) -> Outline:
    """What is known of a dataset without its files. Raises ValueError if there is none of that name."""
    if name not in _OUTLINES:
        near = difflib.get_close_matches(name, _OUTLINES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name must be one of {', '.join(_OUTLINES)}, got {name!r}.{hint}")
    return _OUTLINES[name]


@dataclasses.dataclass(frozen=True)
class Absent:
    """As many examples as a split has, of which none can be read."""

    title: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise ValueError(f"{self.name(index)} cannot be read: the dataset was described without its files.")

    def name(self, index: int) -> str:
        """Of one example, for messages."""
        return f"example {index} of {self.title}"


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
    raw: Any = load_digits()
    images = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = raw.target.astype(np.int32)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    train, val = train_test_split(rest, test_size=0.125, random_state=0, stratify=labels[rest])
    splits = {
        name: Arrays(f"digits {name}", images[part], labels[part])
        for name, part in [("train", train), ("val", val), ("test", test)]
    }
    return outline("digits").dataset(splits, tuple(map(str, range(10))), image_size=image_size)


def cifar10(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """CIFAR-10; the last tenth of train is val. Where its images are JPEG files they are copies: the title says so."""
    splits, features = prepared_splits("cifar10", dir, _last_tenth(test="test"))
    title = "CIFAR-10, JPEG copy" if features["image"].encoding_format == "jpeg" else None
    return outline("cifar10").dataset(splits, tuple(features["label"].names), image_size=image_size, title=title)


def cifar100(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """CIFAR-100, with its 100 fine classes; the last tenth of train is val."""
    splits, features = prepared_splits("cifar100", dir, _last_tenth(test="test"))
    return outline("cifar100").dataset(splits, tuple(features["label"].names), image_size=image_size)


def tiny_imagenet20(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """20 of the 200 classes of Tiny ImageNet, 64 x 64; the last tenth of train is val, its validation images test."""
    splits, features = prepared_splits("tiny_imagenet20", dir, _last_tenth(test="validation"))
    return outline("tiny_imagenet20").dataset(splits, tuple(features["label"].names), image_size=image_size)


def imagenet2012(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """ILSVRC 2012; its 50,000 validation images are val and test, as everywhere: the test images' labels are secret.

    Class names are WordNet ids. `image_size` is 224 by default.
    """
    splits, features = prepared_splits("imagenet2012", dir, {"train": "train", "val": "validation"})
    splits = {**splits, "test": splits["val"]}
    return outline("imagenet2012").dataset(splits, tuple(features["label"].names), image_size=image_size)


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

    `image_size` is 160 by default.
    """
    splits, features = prepared_splits("celeb_a", dir, {"train": "train", "val": "validation", "test": "test"})
    names = tuple(sorted(features["attributes"]))  # the authors' order; the feature file, a hash map, has none
    labelled = {split: Attributes(examples, names) for split, examples in splits.items()}
    return outline("celeb_a").dataset(labelled, names, image_size=image_size)


def _last_tenth(test: str) -> dict[str, str]:
    return {"train": "train[:90%]", "val": "train[90%:]", "test": test}


_MODULES = {"coco": "coco", "hmdb51": "hmdb51", "image_folder": "image_folder"}
"""Where the functions that open datasets are, which have their names; the others are here."""


def load_dataset(
    name: str, dir: str | None = None, *, image_size: int | None = None, files: bool = True, **options: Any
) -> Dataset:
    """Opens a dataset by name, or describes it.

    Args:
        name: `celeb_a`, `cifar10`, `cifar100`, `coco`, `digits`, `hmdb51`, `image_folder`, `imagenet2012` or
            `tiny_imagenet20`.
        dir: where it is: for those that TensorFlow Datasets has prepared, its data_dir, by default
            `~/tensorflow_datasets`; for others their folder, by default `~/imagenet` and so on.
        image_size: base resolution of the model's input, for images that have no one small size.
        files: False for a dataset that needs none: it has the shapes and numbers of its `outline`, and examples that
            cannot be read.
        options: keyword arguments that only some have: of `hmdb51`, `fold`, `frames` and `seconds`; of `coco`,
            `bad_annotations` and `max_broken`.

    Raises:
        ValueError: if there is none of that name, it has no such option or its files are missing.
    """
    known = outline(name)
    known.resolution_for(image_size)
    module = importlib.import_module(f"ssm_jax.data.{_MODULES.get(name, 'datasets')}")
    dataset: Callable[..., Dataset] = getattr(module, name)
    accepted = [p.name for p in inspect.signature(dataset).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(options.keys() - {*accepted}):
        raise ValueError(f"options of {name} are {', '.join(accepted) or 'none'}, got {', '.join(unknown)}.")
    if files:
        return dataset(dir, image_size, **options)
    train = Absent(f"{known.title} train", known.images)
    classes = tuple(f"class {i}" for i in range(known.classes))
    return known.dataset({"train": train}, classes, image_size=image_size, frames=options.get("frames", known.frames))
