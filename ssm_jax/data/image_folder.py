"""Image files in a folder for each class."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ssm_jax.data.datasets import Dataset, outline
from ssm_jax.data.decode import BrokenExampleError

_SUFFIXES = (".jpeg", ".jpg", ".png")
_THREADS = 16  # they wait for the disk or the network


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFiles:
    """Files root/CLASS/NAME, encoded; the label is the number of the class.

    1.28 million of them, ImageNet's, take 60 MB.
    """

    root: str
    classes: Sequence[str]
    names: np.ndarray
    """(n,) of numpy's StringDType."""
    labels: np.ndarray
    """(n,) int32."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one. Raises BrokenExampleError if that fails."""
        return {"image": read_file(self.name(index)), "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        """The path of one file."""
        return f"{self.root}/{self.classes[self.labels[index]]}/{self.names[index]}"


def image_folder(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """A folder as ImageNet's: train/CLASS/*.JPEG and val/CLASS/*.JPEG (or .jpg, .png); the test images are val's too.

    `dir` is `~/imagenet` by default, `image_size`, the base resolution of the model's input, 224. Mean and standard
    deviation are those that are in use for ImageNet, whatever the images are.
    """
    root = epath.Path(dir or "~/imagenet").expanduser()
    folders = {split: root / split for split in ("train", "val")}
    if absent := [str(folder) for folder in folders.values() if not folder.is_dir()]:
        raise ValueError(
            f"dir must hold train/CLASS/*.JPEG and val/CLASS/*.JPEG, got {root}: no {' and no '.join(absent)}."
        )
    listings = {split: _listing(folder) for split, folder in folders.items()}
    classes = tuple(listings["train"])
    if unknown := sorted(set(listings["val"]) - set(classes)):
        raise ValueError(f"dir has classes in {folders['val']} that train has not: {', '.join(unknown[:5])}.")
    sources = {split: _source(folders[split], classes, listing) for split, listing in listings.items()}
    splits = {**sources, "test": sources["val"]}
    return outline("image_folder").dataset(splits, classes, image_size=image_size, title=root.name)


def file_names(folder: epath.Path) -> list[str]:
    """What is in a folder, in no order, without a look at each file."""
    return [path.name for path in folder.iterdir()] if "://" in os.fspath(folder) else os.listdir(folder)


def read_file(path: str) -> bytes:
    """The bytes of an image file. Raises BrokenExampleError, naming it, if it cannot be read."""
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise BrokenExampleError(f"{path} cannot be read: {error}") from error


def _listing(folder: epath.Path) -> dict[str, np.ndarray]:
    """Names of the image files of each class, both in alphabetical order."""

    def images(name: str) -> np.ndarray | None:
        if not (folder / name).is_dir():
            return None
        found = sorted(file for file in file_names(folder / name) if file.lower().endswith(_SUFFIXES))
        return np.array(found, np.dtypes.StringDType())  # here already: as a list they would take three times as much

    names = sorted(name for name in file_names(folder) if not name.startswith("."))  # .ipynb_checkpoints is no class
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return {name: files for name, files in zip(names, pool.map(images, names), strict=True) if files is not None}


def _source(folder: epath.Path, classes: Sequence[str], listing: Mapping[str, np.ndarray]) -> ImageFiles:
    counts = [len(listing.get(name, ())) for name in classes]
    if not sum(counts):
        raise ValueError(f"dir has no .JPEG, .jpg or .png files in {folder}/CLASS.")
    names = np.concatenate([listing[name] for name in classes if name in listing])
    return ImageFiles(str(folder), classes, names, np.repeat(np.arange(len(classes), dtype=np.int32), counts))
