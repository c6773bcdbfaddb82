"""Finding objects in images: boxes with classes, and masks where the network has a head for them."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from matplotlib.figure import Figure
from rich.table import Table

from configs.common import classification
from experiments.config import Config, ConfigError, flatten, write_file
from experiments.problem import Evaluate, Evaluation, Loss, Rows, Scores
from experiments.stages import Stage
from experiments.terminal import console
from experiments.weights import start_detector_from_weights
from ssm_jax import detection, plots
from ssm_jax.data.coco import Images
from ssm_jax.data.datasets import Dataset
from ssm_jax.data.decode import decode_image
from ssm_jax.data.detection import GRID, DetectionAugment, DetectionInput, bucket_of, buckets
from ssm_jax.data.resolution import normalize
from ssm_jax.detection import evaluation as coco
from ssm_jax.detection.structures import Detections, Objects

_USED = ("model.", "data.", "optimizer.", "mesh.", "published.")
_ALSO_USED = (
    *("seed", "dtype", "weights", "augment.flip", "batch_size", "accumulate", "epochs", "ema_decay", "ema_warmup"),
    *("sharding_rules", "eval.every_epochs", "eval.batch_size", "checkpoint_every_epochs", "log_every_steps", "smoke"),
)
_UNUSED = ("data.image_size", "data.resolution")
"""What fields, or their names' beginnings, mean something to a detector, and of these not."""

_SHOWN = 8
"""Images in a picture."""

_SURE = 0.5
"""Score of a detection that is drawn."""


def dataset_of_objects(config: Config, dataset: Dataset) -> Dataset:
    """A dataset as detectors take it: trained on the images that have objects, at the shorter side of their input."""
    splits = dict(dataset.splits)
    if isinstance(train := splits["train"], Images):
        splits["train"] = train = train.with_objects()
        if train.most_objects > config.data.max_objects:
            raise ValueError(
                f"max_objects must be at least {train.most_objects}, the objects of one of the training "
                f"images, got {config.data.max_objects}."
            )
        for images in splits.values():
            if isinstance(images, Images):
                images.with_objects()  # raises ValueError where nothing could be scored
    return dataclasses.replace(dataset, splits=splits, resolution=config.data.sides[0])


def check(config: Config) -> None:
    """Raises ConfigError for what a detector cannot be asked for."""
    if config.data.name != "coco":
        raise ConfigError(f"config.data.name must be coco for a detector, got {config.data.name!r}.")
    sides = config.data.sides
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides) or not 32 <= sides[0] <= sides[1]:
        raise ConfigError(
            f"config.data.sides must be the shorter side of an image and the most that the longer one may be, whole "
            f"numbers from 32 on, such as (800, 1333), got {sides}."
        )
    defaults, given = flatten(classification.get_config()), flatten(config)
    for field, default in defaults.items():
        used = (field.startswith(_USED) or field in _ALSO_USED) and field not in _UNUSED
        if not used and given[field] != default:
            raise ConfigError(
                f"config.{field} is of no use to a detector: leave it at {default!r}, got {given[field]!r}."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class DetectionProblem:
    """See `experiments.problem.Problem`."""

    config: Config
    dataset: Dataset

    @property
    def _masks(self) -> bool:
        return self.config.model.name.startswith("mask")

    @property
    def score(self) -> str:  # noqa: D102
        return "bbox_AP"

    @property
    def train_transform(self) -> Callable[..., dict[str, Any]]:  # noqa: D102
        data = self.config.data
        return DetectionAugment(
            sides=tuple(data.sides), flip=self.config.augment.flip, max_objects=data.max_objects, masks=self._masks
        )

    @property
    def eval_transform(self) -> Callable[..., dict[str, Any]]:  # noqa: D102
        return DetectionInput(sides=tuple(self.config.data.sides))

    @property
    def example(self) -> dict[str, tuple[tuple[int, ...], Any]]:  # noqa: D102
        height, width = buckets(tuple(self.config.data.sides))[0]
        count = self.config.data.max_objects
        arrays: dict[str, tuple[tuple[int, ...], Any]] = {
            "image": ((height, width, self.dataset.channels), jnp.uint8),
            "size": ((2,), jnp.int32),
            "boxes": ((count, 4), jnp.float32),
            "classes": ((count,), jnp.int32),
            "valid": ((count,), jnp.bool_),
        }
        if self._masks:
            arrays |= {"masks": ((count, GRID, GRID), jnp.uint8), "mask_boxes": ((count, 4), jnp.float32)}
        return arrays

    def size(self, resolution: int) -> str:  # noqa: D102
        return f"{resolution} x {self.config.data.sides[1]}"

    def groups(self, source: Any) -> np.ndarray | None:  # noqa: D102
        sizes = getattr(source, "sizes", None)  # a dataset that was described has none
        return None if sizes is None else bucket_of(sizes, tuple(self.config.data.sides))

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `ssm_jax.detection.create_detector` but for `rngs`."""
        given = {"num_classes": self.dataset.num_classes, "dtype": jnp.dtype(self.config.dtype)}
        return {**self.config.model.to_dict(), **given}

    def create_model(self, bandlimit: float | None = None) -> nnx.Module:  # noqa: D102
        del bandlimit
        return detection.create_detector(rngs=nnx.Rngs(self.config.seed), **self.arguments)

    def start_from_weights(self, model: nnx.Module) -> None:  # noqa: D102
        start_detector_from_weights(self.config, model)

    def _prepare(self, images: UInt8[Array, "b h w c"], sizes: Int[Array, "b 2"]) -> Float[Array, "b h w c"]:
        """Normalised, and 0 where there is no image."""
        images = normalize(images, self.dataset.mean, self.dataset.std)
        rows, columns = (jnp.arange(n)[None] < sizes[:, i, None] for i, n in enumerate(images.shape[1:3]))
        return jnp.where((rows[:, :, None] & columns[:, None])[..., None], images, 0.0)

    def loss(self, stage: Stage) -> Loss:  # noqa: D102
        del stage

        def loss(model: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Any]]:
            objects = Objects(**{name: batch[name] for name in Objects._fields if name in batch})
            losses = model.losses(self._prepare(batch["image"], batch["size"]), batch["size"], objects, key=key)
            total = sum(losses.values(), start=jnp.zeros(()))
            return total, {"loss": total, **losses}

        return loss

    def evaluate(self, resolution: int) -> Evaluate:  # noqa: D102
        if resolution != self.dataset.resolution:
            raise ConfigError(f"a detector is evaluated at the size of config.data.sides, got {resolution}.")

        def evaluate(model: Any, batch: dict[str, Array]) -> dict[str, Array]:
            found = model(self._prepare(batch["image"], batch["size"]), batch["size"])
            arrays = {name: array for name, array in found._asdict().items() if array is not None}
            kept = ("size", "original_size", "image_id", "index", "mask")
            return arrays | {name: batch[name] for name in kept}

        return evaluate

    def tally(self, source: Any) -> "_Tally":  # noqa: D102
        return _Tally(source, self._masks)

    def table(self, scores: Scores, resolution: int) -> Table:  # noqa: D102
        table = coco.score_table(scores[resolution])
        table.min_width = 60  # of the title, which would be broken into many lines
        return table

    def leave(
        self, split: str, evaluations: Mapping[int, Evaluation], resolution: int, workdir: epath.Path
    ) -> dict[str, Figure]:
        """Detections as a file of COCO results, the table of categories, and pictures of some images."""
        evaluation = evaluations[resolution]
        results, categories, scored = (evaluation.rows[name] for name in ("results", "categories", "image_ids"))
        coco.write_results(workdir / f"detections_{split}.json", results)
        write_file(workdir / f"categories_{split}.json", json.dumps(categories, indent=2) + "\n")
        console().print(coco.category_table([row for row in categories if row["objects"]]))
        return {"detections": self._picture(split, results, scored)}

    def _picture(self, split: str, results: Sequence[coco.Result], scored: Collection[int]) -> Figure:
        """Images from all over those that could be read, with their objects and what was found with a high score."""
        source: Any = self.dataset.splits[split]
        shown = (source[int(i)] for i in np.random.default_rng(0).permutation(len(source)))
        images, truth, found = [], [], []
        for example in itertools.islice((one for one in shown if one["image_id"] in scored), _SHOWN):
            images.append(np.asarray(decode_image(example["image"])))
            size = images[-1].shape[:2]
            here = [one for one in results if one["image_id"] == example["image_id"] and one["score"] >= _SURE]
            truth.append(_drawn(size, example["boxes"], example["classes"], None, example["segmentation"]))
            corners = np.array([one["bbox"] for one in here]).reshape(-1, 4)
            classes = np.searchsorted(source.category_ids, [one["category_id"] for one in here])
            scores = np.array([one["score"] for one in here])
            boxes = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1)
            found.append(_drawn(size, boxes, classes, scores, [one.get("segmentation") for one in here]))
        columns = {"objects": truth, f"found, with a score of {_SURE} or more": found}
        return plots.detection_sheet(images, columns, self.dataset.class_names, title=f"{len(images)} {split} images")

    def multiply_adds(self, model: nnx.Module, stage: Stage) -> float | None:  # noqa: D102
        del model, stage
        return None


def _drawn(
    size: tuple[int, int],
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None,
    segmentations: Sequence[Any],
) -> plots.Drawn:
    masks = [coco.decode_mask(of_one, size) for of_one in segmentations if of_one is not None]
    return plots.Drawn(boxes, classes, scores, np.stack(masks) if masks else None)


class _Tally:
    """Detections as COCO results, image by image, scored by pycocotools."""

    def __init__(self, source: Any, masks: bool):
        self._source, self._kinds = source, ("bbox", "segm") if masks else ("bbox",)
        self._results: dict[int, list[dict[str, Any]]] = {}

    def add(self, rows: Rows) -> None:
        for i in np.flatnonzero(rows["mask"]):
            row: dict[str, Any] = {name: values[i : i + 1] for name, values in rows.items()}
            found = Detections(**{name: row[name] for name in Detections._fields if name in row})
            self._results[int(rows["image_id"][i])] = coco.coco_results(
                found, row["image_id"], row["size"], row["original_size"], self._source.category_ids
            )

    def evaluation(self) -> Evaluation:
        results = [result for image_id in sorted(self._results) for result in self._results[image_id]]
        found = coco.evaluate(self._source.annotations, results, kinds=self._kinds, image_ids=self._results)
        defined = {name: score for name, score in found.scores.items() if score >= 0}  # there may be no small objects
        rows = {"results": results, "categories": found.categories, "image_ids": self._results.keys()}
        return Evaluation(defined, rows)
