r"""COCO's scores of detections, on the host.

    python -m ssm_jax.detection.evaluation --annotations=FILE --results=FILE [--kind=bbox,segm]

prints the twelve numbers and a table of categories for results in COCO's format. The numbers are pycocotools'.
"""

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from etils import epath
from jaxtyping import Bool, Float, Integer, Real
from rich.console import Console
from rich.table import Table

from ssm_jax.detection.structures import Detections

Result = dict[str, Any]
"""An entry of COCO's results format: image_id, category_id, score, and the field of at least one kind.

`bbox` is [left, top, width, height] in pixels of the original image, and `segmentation` a compressed run-length mask,
{"size": [height, width], "counts": str}. All are plain types of Python.
"""

FIELDS = {"bbox": "bbox", "segm": "segmentation"}
"""What of an object is compared, by the kind of evaluation."""

_SCORES = [
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
]
"""The twelve numbers, in the order in which pycocotools gives them."""


class CocoScores(NamedTuple):
    """What an evaluation says."""

    scores: dict[str, float]
    """The twelve numbers of each kind, `bbox_AP` to `segm_AR_large`, from 0 to 1; -1 where there are no objects."""
    categories: list[dict[str, Any]]
    """By id: id, name, objects (without crowds), and AP and AP50 of each kind, None where there are no objects."""


def coco_results(
    detections: Detections,
    image_ids: Integer[np.ndarray, "n"],
    sizes: Real[np.ndarray, "n 2"],
    original_sizes: Real[np.ndarray, "n 2"],
    category_ids: Sequence[int],
    mask: Bool[np.ndarray, "n"] | None = None,
) -> list[Result]:
    """Detections of n images as COCO wants them: in pixels of the original images, with scores as they are.

    Args:
        detections: numpy arrays, boxes in pixels of the network's input. With masks, results have both kinds.
        image_ids: COCO's.
        sizes: height and width of each image as the network got it, without padding.
        original_sizes: those of the file.
        category_ids: COCO's, of each class.
        mask: the images that count. All by default.
    """
    results = []
    for i in range(len(image_ids)) if mask is None else np.flatnonzero(mask):
        valid = detections.valid[i]
        size = int(original_sizes[i][0]), int(original_sizes[i][1])
        scale = original_sizes[i].astype(np.float32) / sizes[i].astype(np.float32)
        boxes = np.asarray(detections.boxes[i][valid]) * scale[[1, 0, 1, 0]]
        found = [
            {"image_id": int(image_ids[i]), "category_id": int(category_ids[c]), "bbox": bbox, "score": score}
            for c, bbox, score in zip(
                detections.classes[i][valid],
                np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist(),
                detections.scores[i][valid].tolist(),
                strict=True,
            )
        ]
        if detections.masks is not None:
            parts = _parts(np.asarray(detections.masks[i][valid]), boxes, size)
            for result, (rows, columns, part) in zip(found, parts, strict=True):
                inside = np.zeros(size, bool, order="F")
                inside[rows, columns] = part > 0.5
                result["segmentation"] = encode_mask(inside)
        results += found
    return results


def paste_masks(
    masks: Float[np.ndarray, "d m m"], boxes: Float[np.ndarray, "d 4"], size: tuple[int, int]
) -> Float[np.ndarray, "d h w"]:
    """Masks over boxes as masks over an image of `size`, height and width, interpolated as torchvision does.

    A ring of zeros is put around each mask, its box widened by as much and cut to whole pixels, of which the first and
    the last both belong to it. In the box the mask is interpolated linearly along both axes; elsewhere it is 0.
    """
    image = np.zeros((len(masks), *size), np.float32)
    for whole, (rows, columns, part) in zip(image, _parts(masks, boxes, size), strict=True):
        whole[rows, columns] = part
    return image


def _parts(
    masks: Float[np.ndarray, "d m m"], boxes: Float[np.ndarray, "d 4"], size: tuple[int, int]
) -> Iterator[tuple[slice, slice, Float[np.ndarray, "h w"]]]:
    """Of each pasted mask the rows and columns of the image that it covers, and what is there."""
    cells = masks.shape[-1] + 2
    middle, half = (boxes[:, :2] + boxes[:, 2:]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5
    half = half * np.float32(cells / masks.shape[-1])
    ends = np.concatenate([middle - half, middle + half], axis=1).astype(int).tolist()
    for mask, (x0, y0, x1, y1) in zip(np.pad(masks, ((0, 0), (1, 1), (1, 1))), ends, strict=True):
        rows, columns = _interpolation(y0, y1, cells, size[0]), _interpolation(x0, x1, cells, size[1])
        top, left = max(y0, 0), max(x0, 0)
        yield slice(top, top + len(rows)), slice(left, left + len(columns)), rows @ mask @ columns.T


def _interpolation(first: int, last: int, cells: int, length: int) -> Float[np.ndarray, "pixels {cells}"]:
    """Weights of cells that are stretched over pixels first .. last, for those of the pixels in 0 .. length - 1."""
    pixels = np.arange(max(first, 0), min(last + 1, length))
    at = (pixels - first + 0.5) * (cells / max(last - first + 1, 1)) - 0.5
    at = np.clip(at, 0, cells - 1).astype(np.float32)[:, None]
    return np.maximum(0, 1 - np.abs(at - np.arange(cells, dtype=np.float32)))


def encode_mask(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """A mask over an image as COCO's compressed run-length mask, of plain types."""
    from pycocotools.mask import encode

    encoded: Any = encode(np.asfortranarray(mask).view(np.uint8))
    return {"size": [*mask.shape], "counts": encoded["counts"].decode()}


def decode_mask(segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The mask over an image of `size`, height and width, of polygons or of a run-length mask, compressed or not."""
    from pycocotools.mask import decode, frPyObjects, merge

    encoded: Any = segmentation
    if isinstance(segmentation, list) or not isinstance(segmentation["counts"], str | bytes):
        encoded = frPyObjects(encoded, *size)
    with warnings.catch_warnings():  # numpy's, of how arrays are to be copied
        warnings.simplefilter("ignore", DeprecationWarning)
        return decode(merge(encoded) if isinstance(encoded, list) else encoded).astype(bool)


def evaluate(
    annotations: epath.PathLike | Mapping[str, Any],
    results: Sequence[Result],
    *,
    kinds: Sequence[str] = ("bbox", "segm"),
    image_ids: Iterable[int] | None = None,
) -> CocoScores:
    """Scores results as COCO does, at most 100 of an image; crowds count neither way.

    Whether an object is small, medium or large is told by the area of its mask; of a detection, by the area of what is
    compared, its box or its mask.

    Args:
        annotations: a file of COCO instances, or what is in one. It is not changed.
        results: of any images, in any order. None at all score 0.
        kinds: of `bbox` and `segm`.
        image_ids: those of the images that count, all by default; annotations and results of others are left out.

    Raises:
        ValueError: for a file that is none of COCO instances, for other kinds, and for results that lack a field or
            are of unknown images or categories, or have a number that is not finite, or a mask of another size.
    """
    if not kinds or not set(kinds) <= FIELDS.keys():
        raise ValueError(f"kinds must be one or both of {', '.join(FIELDS)}, got {', '.join(kinds) or 'none'}.")
    truth = _truth(annotations)
    _check(results, truth, kinds)
    if image_ids is not None:
        wanted = set(map(int, image_ids))
        if unknown := wanted - {image["id"] for image in truth["images"]}:
            raise ValueError(f"image_ids must be of images in the annotations, got {_some(unknown)}.")
        results = [result for result in results if result["image_id"] in wanted]
        truth["images"] = [image for image in truth["images"] if image["id"] in wanted]
        truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] in wanted]
    counted = [one["category_id"] for one in truth["annotations"] if not one["iscrowd"]]
    categories = [{"id": c["id"], "name": c["name"], "objects": counted.count(c["id"])} for c in truth["categories"]]
    scores = {}
    for kind in kinds:
        numbers, precision = _evaluate(truth, results, kind)
        scores |= {f"{kind}_{name}": float(number) for name, number in zip(_SCORES, numbers, strict=True)}
        for row, of_category in zip(categories, precision, strict=True):
            row[f"{kind}_AP"] = float(of_category.mean()) if row["objects"] else None
            row[f"{kind}_AP50"] = float(of_category[0].mean()) if row["objects"] else None
    return CocoScores(scores, categories)


def _truth(annotations: epath.PathLike | Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Images, annotations and categories, these by id, in dicts that may be changed."""
    try:
        content = annotations if isinstance(annotations, Mapping) else json.loads(epath.Path(annotations).read_bytes())
        images = [{name: image[name] for name in ("id", "height", "width")} for image in content["images"]]
        fields = ("image_id", "category_id", "bbox", "segmentation", "area", "iscrowd")
        objects = [{name: one[name] for name in fields} for one in content["annotations"]]
        categories = [{name: category[name] for name in ("id", "name")} for category in content["categories"]]
    except (KeyError, TypeError, ValueError) as error:
        name = "those given" if isinstance(annotations, Mapping) else annotations
        raise ValueError(f"annotations must be COCO instances, got {name}: {error!r}.") from error
    categories.sort(key=lambda category: category["id"])
    return {"images": images, "annotations": objects, "categories": categories}


def _check(results: Sequence[Result], truth: Mapping[str, Any], kinds: Sequence[str]) -> None:
    """Raises ValueError for results that pycocotools would fail at, or wrongly score."""
    needed = {"image_id", "category_id", "score", *(FIELDS[kind] for kind in kinds)}
    for i, result in enumerate(results):
        if missing := needed - result.keys():
            raise ValueError(f"results must have {', '.join(sorted(needed))} each; entry {i} has no {min(missing)}.")
    for field, of in {"image_id": "images", "category_id": "categories"}.items():
        known = {one["id"] for one in truth[of]}
        if unknown := [*dict.fromkeys(result[field] for result in results if result[field] not in known)]:
            raise ValueError(
                f"results must be of the {of} in the annotations, of {field} {_some(sorted(known))}; "
                f"got {field} {_some(unknown)}."
            )
    _check_numbers([result["score"] for result in results], "score", ())
    if "bbox" in kinds:
        _check_numbers([result["bbox"] for result in results], "bbox", (4,))
    if "segm" in kinds:
        sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
        for i, result in enumerate(results):
            mask, size = result["segmentation"], sizes[result["image_id"]]
            if not (isinstance(mask, dict) and mask.get("size") == size and isinstance(mask.get("counts"), str)):
                raise ValueError(
                    f"results must have segmentation as a compressed run-length mask over the image, with size {size} "
                    f"in entry {i} and counts a string, got {mask!s:.80}."
                )


def _check_numbers(values: list[Any], field: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a field that is not an array of finite numbers in all results."""
    if _are_numbers(values, (len(values), *shape)):
        return
    for i, value in enumerate(values):
        if not _are_numbers(value, shape):
            what = f"{shape[0]} finite numbers" if shape else "a finite number"
            raise ValueError(f"results must have {what} as {field}, got {value!r} in entry {i}.")


def _are_numbers(values: Any, shape: tuple[int, ...]) -> bool:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        return False
    return array.shape == shape and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())


def _some(values: Iterable[Any]) -> str:
    """The first ones, and how many more there are."""
    values = [*values]
    return ", ".join(map(repr, values[:3])) + (f" and {len(values) - 3} more" if len(values) > 3 else "")


def _evaluate(truth: Mapping[str, Any], results: Sequence[Result], kind: Any) -> tuple[np.ndarray, np.ndarray]:
    """The twelve numbers, and the precision of each category by IoU threshold and recall, (categories, 10, 101)."""
    from pycocotools.cocoeval import COCOeval
    from pycocotools.mask import area

    fields = ("image_id", "category_id", "score", FIELDS[kind])
    found = [{name: result[name] for name in fields} for result in results]
    for one in found:
        one["area"] = one["bbox"][2] * one["bbox"][3] if kind == "bbox" else float(area(one["segmentation"]))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does, and the numbers
        evaluation = COCOeval(_indexed(truth, truth["annotations"]), _indexed(truth, found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # (thresholds, recalls, categories, areas, counts of detections): of all areas, with 100 detections
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return evaluation.stats, np.moveaxis(precision, -1, 0)


def _indexed(truth: Mapping[str, Any], objects: Sequence[Mapping[str, Any]]) -> Any:
    """Objects as pycocotools takes them: it writes into their dicts, and takes an id of 0 for no match."""
    from pycocotools.coco import COCO

    side: Any = COCO()
    side.dataset = {**truth, "annotations": [{**one, "id": i} for i, one in enumerate(objects, start=1)]}
    side.createIndex()
    return side


def score_table(scores: Mapping[str, float]) -> Table:
    """The twelve numbers of each kind in percent."""
    kinds = [kind for kind in FIELDS if f"{kind}_AP" in scores]
    table = Table()
    for column in ("", *kinds):
        table.add_column(column, justify="right")
    for name in _SCORES:
        table.add_row(name, *(_percent(scores.get(f"{kind}_{name}")) for kind in kinds))
    return table


def category_table(categories: Sequence[Mapping[str, Any]]) -> Table:
    """The categories of `CocoScores`, in percent."""
    names = [name for name in categories[0] if name.endswith(("_AP", "_AP50"))] if categories else []
    table = Table()
    for column in ("id", "name", "objects", *(name.replace("_", " ") for name in names)):
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in categories:
        table.add_row(str(row["id"]), row["name"], f"{row['objects']:,}", *(_percent(row[name]) for name in names))
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def write_results(path: epath.PathLike, results: Sequence[Result]) -> None:
    """Writes a file of results, whole or not at all. Raises ValueError for numbers that are not finite."""
    path = epath.Path(path)
    text = json.dumps(results, allow_nan=False)
    written = path.with_suffix(".tmp")
    written.write_text(text)
    written.replace(path)


def read_results(path: epath.PathLike) -> list[Result]:
    """What is in a file of results. Raises ValueError if it is not a list of objects."""
    try:
        results = json.loads(epath.Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"results must be a JSON file, got {path}: {error}.") from error
    if not (isinstance(results, list) and all(isinstance(result, dict) for result in results)):
        raise ValueError(f"results must be a list of objects in COCO's results format, got another content in {path}.")
    return results


if __name__ == "__main__":
    _ANNOTATIONS = flags.DEFINE_string("annotations", None, "File of COCO instances.", required=True)
    _RESULTS = flags.DEFINE_string("results", None, "File in COCO's results format.", required=True)
    _KIND = flags.DEFINE_list("kind", None, "bbox, segm or both; default: those that the results have fields for.")

    def main(argv: list[str]) -> None:  # noqa: D103
        del argv
        try:
            results = read_results(_RESULTS.value)
            there = [kind for kind, field in FIELDS.items() if results and field in results[0]] or ["bbox"]
            found = evaluate(_ANNOTATIONS.value, results, kinds=_KIND.value or there)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        console = Console()
        console.print(category_table(found.categories))
        console.print(score_table(found.scores))

    app.run(main)
