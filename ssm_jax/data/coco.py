"""COCO 2017: images with the objects in them."""

import dataclasses
import gc
import itertools
import json
from typing import Any

import numpy as np
from etils import epath

from ssm_jax.data.datasets import Dataset, outline
from ssm_jax.data.image_folder import file_names, read_file


@dataclasses.dataclass(frozen=True, eq=False)
class Objects:
    """The objects of all images, those of image i from `starts[i]` to `starts[i + 1]`, in one array of each kind."""

    starts: np.ndarray
    """(images + 1,) int64."""
    boxes: np.ndarray
    """(objects, 4) float32: left, top, right, bottom in pixels."""
    classes: np.ndarray
    """(objects,) int32: numbers of categories in the order of their ids."""
    crowd: np.ndarray
    """(objects,) bool: a group of objects, as a run-length mask."""
    area: np.ndarray
    """(objects,) float32: of the mask, in pixels."""
    points: np.ndarray
    """(numbers,) float32: x and y in turn of all corners of all polygons."""
    polygons: np.ndarray
    """(polygons + 1,) int64: where each begins in `points`."""
    first_polygon: np.ndarray
    """(objects + 1,) int64: the first polygon of each object, which has several where it is cut by others."""
    masks: dict[int, tuple[np.ndarray, np.ndarray]]
    """Run-length masks by object: (runs,) int32, pixels outside and inside in turn, and height and width."""

    def of_image(self, index: int) -> dict[str, Any]:
        """Those of one image, under the names that `Images` gives them."""
        part = slice(self.starts[index], self.starts[index + 1])
        return {
            "boxes": self.boxes[part],
            "classes": self.classes[part],
            "crowd": self.crowd[part],
            "area": self.area[part],
            "segmentation": [self._segmentation(i) for i in range(part.start, part.stop)],
        }

    def _segmentation(self, index: int) -> list[np.ndarray] | dict[str, Any]:
        if index in self.masks:
            runs, size = self.masks[index]
            return {"counts": runs, "size": size.tolist()}
        numbers = range(self.first_polygon[index], self.first_polygon[index + 1])
        return [self.points[self.polygons[i] : self.polygons[i + 1]] for i in numbers]


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images, encoded, in the order of their ids.

    An example is {"image": bytes, "image_id": int, "boxes": (n, 4), "classes": (n,), "crowd": (n,), "area": (n,),
    "segmentation": [n], "label": (classes,) uint8}: the n objects as in `Objects`, in the order of the file, none for
    some images; of each the segmentation as in the file, but with arrays: a list of polygons, (2 corners,) float32, or
    a run-length mask {"counts": (runs,) int32, "size": [height, width]}; and which classes there are, crowds included.
    """

    folder: str
    files: np.ndarray
    """(images,) of numpy's StringDType."""
    image_ids: np.ndarray
    objects: Objects
    num_classes: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one. Raises BrokenExampleError if the file cannot be read."""
        objects = self.objects.of_image(index)
        label = np.zeros(self.num_classes, np.uint8)
        label[objects["classes"]] = 1
        image = {"image": read_file(self.name(index)), "image_id": int(self.image_ids[index])}
        return {**image, **objects, "label": label}

    def name(self, index: int) -> str:
        """The file's path."""
        return f"{self.folder}/{self.files[index]}"


def coco(dir: str | None = None, image_size: int | None = None) -> Dataset:
    """COCO 2017 as it is unpacked: annotations/instances_{train,val}2017.json, train2017/ and val2017/.

    Of its uses this is the one that every network here has: multi-label classification, whose labels are the categories
    in an image. The test images are val's too, as the labels of COCO's are secret. `dir` is `~/coco` by default,
    `image_size` 224. Mean and standard deviation are ImageNet's, as in most work on COCO.
    """
    root = epath.Path(dir or "~/coco").expanduser()
    needed = [root / part / name for split in ("train", "val") for part, name in _parts(split)]
    if absent := [str(path) for path in needed if not path.exists()]:
        raise ValueError(
            f"dir must hold annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/*.jpg "
            f"and val2017/*.jpg, got {root}: no {' and no '.join(absent)}. They are in annotations_trainval2017.zip, "
            "train2017.zip and val2017.zip of https://cocodataset.org/#download."
        )
    (train, names), (val, val_names) = _open(root, "train"), _open(root, "val")
    if names != val_names:
        raise ValueError(
            f"dir has other categories in instances_val2017.json than in instances_train2017.json: {root}."
        )
    return outline("coco").dataset({"train": train, "val": val, "test": val}, names, image_size=image_size)


def _parts(split: str) -> tuple[tuple[str, str], ...]:
    return ("annotations", f"instances_{split}2017.json"), ("", f"{split}2017")


def _open(root: epath.Path, split: str) -> tuple[Images, tuple[str, ...]]:
    """One split, and the names of its categories."""
    file, folder = (root / part / name for part, name in _parts(split))
    try:
        content = _parse(file.read_bytes())
        images = sorted(content["images"], key=lambda image: image["id"])
        categories = sorted(content["categories"], key=lambda category: category["id"])
        ids = np.array([image["id"] for image in images], np.int64)
        objects = _objects(content["annotations"], ids, np.array([c["id"] for c in categories], np.int64))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"dir has a {file} that is cut off or no file of COCO instances: {error!r}.") from error
    files = np.array([image["file_name"] for image in images], np.dtypes.StringDType())
    there = set(file_names(folder))
    if missing := [name for name in files if name not in there]:
        raise ValueError(
            f"dir lacks {len(missing)} of the {len(files)} images of {file.name}, the first of them {missing[0]}: "
            f"looked for in {folder}."
        )
    names = tuple(category["name"] for category in categories)
    return Images(str(folder), files, ids, objects, len(names)), names


def _parse(content: bytes) -> dict[str, Any]:
    """json.loads in a third of the time, without the garbage collector, which would visit millions of lists often."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return json.loads(content)
    finally:
        if enabled:
            gc.enable()


def _objects(annotations: list[dict[str, Any]], images: np.ndarray, categories: np.ndarray) -> Objects:
    """Sorts annotations by image and packs them; `images` and `categories` are ids in ascending order.

    As Python's lists and dicts COCO's 860,001 would take ten times the memory, in each process that reads.
    """
    owner = _positions([a["image_id"] for a in annotations], images, "image_id")
    order = np.argsort(owner, kind="stable")
    annotations = [annotations[i] for i in order]
    corners = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)  # left, top, width, height
    segmentations = [a["segmentation"] for a in annotations]
    polygons = [s if isinstance(s, list) else [] for s in segmentations]
    flat = [*itertools.chain.from_iterable(polygons)]
    return Objects(
        starts=np.searchsorted(owner[order], np.arange(len(images) + 1)),
        boxes=np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1).astype(np.float32),
        classes=_positions([a["category_id"] for a in annotations], categories, "category_id").astype(np.int32),
        crowd=np.array([a["iscrowd"] for a in annotations], bool),
        area=np.array([a["area"] for a in annotations], np.float32),
        points=np.fromiter(itertools.chain.from_iterable(flat), np.float32),
        polygons=_starts(flat),
        first_polygon=_starts(polygons),
        masks={
            i: (np.array(mask["counts"], np.int32), np.array(mask["size"], np.int32))
            for i, mask in enumerate(segmentations)
            if not isinstance(mask, list)
        },
    )


def _positions(ids: list[int], known: np.ndarray, field: str) -> np.ndarray:
    """Where in `known`, which ascends, `ids` are. Raises ValueError if one is not."""
    unknown = np.setdiff1d(ids, known)
    if len(unknown):
        raise ValueError(f"{field} {unknown[0]} of an annotation is unknown")
    return np.searchsorted(known, np.array(ids, np.int64))


def _starts(lists: list[list[Any]]) -> np.ndarray:
    """Where each of the lists begins when they are joined, and where the last ends."""
    return np.cumsum([0, *map(len, lists)], dtype=np.int64)
