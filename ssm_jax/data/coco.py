"""COCO 2017: images with the objects in them."""

import contextlib
import dataclasses
import gc
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from ssm_jax.data.datasets import Dataset, outline
from ssm_jax.data.image_folder import file_names, read_file


@dataclasses.dataclass(frozen=True, eq=False)
class Objects:
    """The objects of all images, those of an image one after the other, in one array of each kind."""

    spans: np.ndarray
    """(images, 2) int64: of each image the first object, and the one after the last."""
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

    def counts(self) -> np.ndarray:
        """(images,) int64: objects of each image, without crowds."""
        before = np.concatenate([[0], np.cumsum(~self.crowd)])
        return before[self.spans[:, 1]] - before[self.spans[:, 0]]

    def of_image(self, index: int) -> dict[str, Any]:
        """Those of one image, under the names that `Images` gives them."""
        part = slice(*self.spans[index].tolist())
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

    An example is {"image": bytes, "image_id": int, "size": (2,), "boxes": (n, 4), "classes": (n,), "crowd": (n,),
    "area": (n,), "segmentation": [n], "label": (classes,) uint8}: height and width as in the file of annotations; the n
    objects as in `Objects`, in the order of the file, none for some images; of each the segmentation as in the file,
    but with arrays: a list of polygons, (2 corners,) float32, or a run-length mask {"counts": (runs,) int32, "size":
    [height, width]}; and which classes there are, crowds included.
    """

    folder: str
    files: np.ndarray
    """(images,) of numpy's StringDType."""
    image_ids: np.ndarray
    """(images,) int64, ascending."""
    sizes: np.ndarray
    """(images, 2) int32: height and width."""
    objects: Objects
    category_ids: tuple[int, ...]
    """COCO's, of each class, ascending."""
    instances: str
    """The file of annotations."""
    left_out: frozenset[int]
    """Numbers of the annotations in it, from 0, that are bad."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one. Raises BrokenExampleError if the file cannot be read."""
        objects = self.objects.of_image(index)
        label = np.zeros(len(self.category_ids), np.uint8)
        label[objects["classes"]] = 1
        image = {"image": read_file(self.name(index)), "image_id": int(self.image_ids[index])}
        return {**image, "size": self.sizes[index], **objects, "label": label}

    def name(self, index: int) -> str:
        """The file's path."""
        return f"{self.folder}/{self.files[index]}"

    def with_objects(self) -> "Images":
        """Those with objects besides crowds, which detectors are trained on: 117,266 of COCO's 118,287.

        Raises ValueError if there are none.
        """
        having = self.objects.counts() > 0
        if not having.any():
            raise ValueError(f"dir has no image with an object, crowds aside, in {self.instances}.")
        return self.part(having)

    def part(self, which: np.ndarray) -> "Images":
        """Those where `which`, (images,) bool, is True."""
        arrays = {name: getattr(self, name)[which] for name in ("files", "image_ids", "sizes")}
        objects = dataclasses.replace(self.objects, spans=self.objects.spans[which])
        return dataclasses.replace(self, objects=objects, **arrays)

    @property
    def most_objects(self) -> int:
        """The largest number of objects, crowds aside, that an image has."""
        return int(self.objects.counts().max())

    @property
    def annotations(self) -> dict[str, Any]:
        """What is in the file, for these images and without what was left out: what COCO's scores are computed from."""
        with _uncollected():
            content = json.loads(epath.Path(self.instances).read_bytes())
        ids = {*self.image_ids.tolist()}
        of_these = [a for i, a in enumerate(content["annotations"]) if i not in self.left_out and a["image_id"] in ids]
        return {**content, "images": [i for i in content["images"] if i["id"] in ids], "annotations": of_these}


def coco(
    dir: str | None = None, image_size: int | None = None, *, bad_annotations: str = "skip", max_broken: float = 0.01
) -> Dataset:
    """COCO 2017 as it is unpacked: annotations/instances_{train,val}2017.json, train2017/ and val2017/.

    The labels are those of multi-label classification: the categories in an image. The test images are val's too, as
    the labels of COCO's are secret. `dir` is `~/coco` by default, `image_size` 224. Mean and standard deviation are
    ImageNet's, as in most work on COCO.

    Args:
        dir: the folder.
        image_size: base resolution of a classifier's input.
        bad_annotations: what is done about annotations that are of no use: boxes that are empty, not finite or outside
            of the image; objects without a mask; polygons of less than three points, of an odd number of coordinates
            or with one that is not finite; run-length masks of another size than the image; unknown images and
            categories; ids that were there before; and about images without a file. "skip" leaves them out, images with
            all their objects, and says so in one warning for each file; "refuse" raises. The default is "skip" as COCO
            2017 itself has two such annotations, 918 and 2206849, whose boxes have no height: torchvision and
            mmdetection leave them out, too.
        max_broken: share of a split's images that may be without a file if these are skipped: with more of them
            missing, a folder is not yet all there.

    Raises:
        ValueError: beginning with the argument's name, for files that are missing, cut off or of another kind, and for
            bad annotations if they are to be refused: how many of each kind, and the first of them.
    """
    if bad_annotations not in ("refuse", "skip"):
        raise ValueError(f"bad_annotations must be refuse or skip, got {bad_annotations!r}.")
    root = epath.Path(dir or "~/coco").expanduser()
    needed = [root / part / name for split in ("train", "val") for part, name in _parts(split)]
    if absent := [str(path) for path in needed if not path.exists()]:
        raise ValueError(
            f"dir must hold annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/*.jpg "
            f"and val2017/*.jpg, got {root}: no {' and no '.join(absent)}. They are in annotations_trainval2017.zip, "
            "train2017.zip and val2017.zip of https://cocodataset.org/#download."
        )
    with _uncollected():
        (train, names), (val, val_names) = (
            _open(root, split, bad_annotations, max_broken) for split in ("train", "val")
        )
    if (names, train.category_ids) != (val_names, val.category_ids):
        raise ValueError(
            f"dir has other categories in instances_val2017.json than in instances_train2017.json: {root}."
        )
    return outline("coco").dataset({"train": train, "val": val, "test": val}, names, image_size=image_size)


def _parts(split: str) -> tuple[tuple[str, str], ...]:
    return ("annotations", f"instances_{split}2017.json"), ("", f"{split}2017")


def _open(root: epath.Path, split: str, bad_annotations: str, max_broken: float) -> tuple[Images, tuple[str, ...]]:
    """One split, and the names of its categories."""
    file, folder = (root / part / name for part, name in _parts(split))
    try:
        content = json.loads(file.read_bytes())
        images, categories = (sorted(content[part], key=lambda one: one["id"]) for part in ("images", "categories"))
        ids, category_ids = (_array(entries, "id", np.int64) for entries in (images, categories))
        sizes = np.stack([_array(images, side, np.int32) for side in ("height", "width")], axis=1)
        if not len(ids) or (ids[1:] == ids[:-1]).any() or (sizes < 1).any():
            raise ValueError("images need an id of their own, a height and a width")
        files = _array(images, "file_name", np.dtypes.StringDType())
        names = tuple(category["name"] for category in categories)
        annotations = content["annotations"]
        faults = _faults(annotations, ids, sizes, category_ids)
        bad = np.logical_or.reduce([*faults.values()])
        objects = _objects([*itertools.compress(annotations, ~bad)], ids, category_ids)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"dir has a {file} that is cut off or no file of COCO instances: {error!r}.") from error
    there = {*file_names(folder)}
    present = np.array([name in there for name in files])
    if not present.any():
        raise ValueError(f"dir lacks all {len(ids)} images of {file.name}, such as {files[0]}: looked for in {folder}.")
    named = {
        fault: [f"{annotations[i]['id']} of image {annotations[i]['image_id']}" for i in np.flatnonzero(which)]
        for fault, which in faults.items()
    }
    named[f"of {len(ids)} images not in {folder}"] = [*files[~present]]
    if found := "; ".join(_some(fault, bad_ones) for fault, bad_ones in named.items() if bad_ones):
        if bad_annotations == "refuse":
            raise ValueError(
                f"dir has a {file} with bad annotations: {found}. config.data.bad_annotations='skip' leaves them out."
            )
        if (missing := np.count_nonzero(~present)) > max_broken * len(ids):
            raise ValueError(
                f"max_broken must be at least {missing} / {len(ids)} to do without the {missing} of {len(ids)} images "
                f"of {file.name} that are not in {folder}, such as {files[~present][0]}; got {max_broken}."
            )
        logging.warning("%s has bad annotations, which are left out: %s.", file, found)
    left_out = frozenset(np.flatnonzero(bad).tolist())
    everything = Images(str(folder), files, ids, sizes, objects, (*category_ids.tolist(),), str(file), left_out)
    return everything.part(present), names


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Leaves the garbage collector out, which would visit millions of lists again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _some(fault: str, names: list[str]) -> str:
    """How many have a fault, and the first of them."""
    return f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _faults(
    annotations: list[Any], images: np.ndarray, sizes: np.ndarray, categories: np.ndarray
) -> dict[str, np.ndarray]:
    """Which annotations, (n,) bool, are bad in which way; one that is in several ways is in the first of them only.

    `images`, with their `sizes`, and `categories` are ids in ascending order.
    """
    count = len(annotations)
    image_ids = _array(annotations, "image_id", np.int64)
    of_image = sizes[np.searchsorted(images, image_ids).clip(max=len(images) - 1)]
    boxes = _boxes(annotations)
    inside = np.clip(boxes, 0, np.tile(of_image[:, ::-1], 2))
    repeated = np.ones(count, bool)
    repeated[np.unique(_array(annotations, "id", np.int64), return_index=True)[1]] = False
    segmentations = [a["segmentation"] for a in annotations]
    polygons = _polygons(segmentations)
    flat = [*itertools.chain.from_iterable(polygons)]
    owner = np.repeat(np.arange(count), [*map(len, polygons)])
    numbers = np.array([*map(len, flat)], np.int64)
    absent, misfit, run_length = np.zeros((3, count), bool)
    for i, mask in enumerate(segmentations):
        if not isinstance(mask, list) and mask is not None:
            run_length[i] = True
            absent[i] = not any(mask["counts"][1::2])
            misfit[i] = not _fits(mask, of_image[i].tolist())
        else:
            absent[i] = not mask

    def having(which: np.ndarray) -> np.ndarray:
        return np.isin(np.arange(count), owner[which])

    faults = {
        "of unknown images": ~np.isin(image_ids, images),
        "of unknown categories": ~np.isin(_array(annotations, "category_id", np.int64), categories),
        "with an id that another has": repeated,
        "with a box that is not finite": ~np.isfinite(boxes).all(1),
        "with an empty box": (boxes[:, 2:] <= boxes[:, :2]).any(1),
        "with a box outside of the image": (inside[:, 2:] <= inside[:, :2]).any(1),
        "without a mask": absent & ~(run_length & _array(annotations, "iscrowd", bool)),
        "with an odd number of coordinates": having(numbers % 2 == 1),
        "with a polygon of less than three points": having(numbers < 6),
        "with a polygon that is not finite": having(~np.isfinite(np.array([*map(sum, flat)], np.float64))),
        "with a run-length mask that is compressed, or of another size than the image": misfit,
    }
    seen = np.zeros(count, bool)
    for fault, which in faults.items():
        faults[fault] = which & ~seen
        seen |= which
    return faults


def _fits(mask: dict[str, Any], size: list[int]) -> bool:
    """Whether a run-length mask has `size`, height and width, and as many pixels; compressed ones are not read."""
    runs = mask["counts"]
    return isinstance(runs, list) and mask["size"] == size and sum(runs) == size[0] * size[1] and min(runs) >= 0


def _objects(annotations: list[Any], images: np.ndarray, categories: np.ndarray) -> Objects:
    """Sorts annotations by image and packs them; `images` and `categories` are ids in ascending order.

    As Python's lists and dicts COCO's 860,001 would take ten times the memory, in each process that reads.
    """
    owner = np.searchsorted(images, _array(annotations, "image_id", np.int64))
    order = np.argsort(owner, kind="stable")
    annotations = [annotations[i] for i in order]
    starts = np.searchsorted(owner[order], np.arange(len(images) + 1))
    segmentations = [a["segmentation"] for a in annotations]
    polygons = _polygons(segmentations)
    flat = [*itertools.chain.from_iterable(polygons)]
    return Objects(
        spans=np.stack([starts[:-1], starts[1:]], axis=1),
        boxes=_boxes(annotations),
        classes=np.searchsorted(categories, _array(annotations, "category_id", np.int64)).astype(np.int32),
        crowd=_array(annotations, "iscrowd", bool),
        area=_array(annotations, "area", np.float32),
        points=np.fromiter(itertools.chain.from_iterable(flat), np.float32),
        polygons=_starts(flat),
        first_polygon=_starts(polygons),
        masks={
            i: (np.array(mask["counts"], np.int32), np.array(mask["size"], np.int32))
            for i, mask in enumerate(segmentations)
            if isinstance(mask, dict)
        },
    )


def _boxes(annotations: list[Any]) -> np.ndarray:
    """(n, 4) float32: left, top, right, bottom, where the file has width and height."""
    corners = _array(annotations, "bbox", np.float64).reshape(len(annotations), 4)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1).astype(np.float32)


def _polygons(segmentations: list[Any]) -> list[list[Any]]:
    return [s if isinstance(s, list) else [] for s in segmentations]


def _array(entries: list[Any], field: str, dtype: Any) -> np.ndarray:
    return np.array([entry[field] for entry in entries], dtype)


def _starts(lists: list[list[Any]]) -> np.ndarray:
    """Where each of the lists begins when they are joined, and where the last ends."""
    return np.cumsum([0, *map(len, lists)], dtype=np.int64)
