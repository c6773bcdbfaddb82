"""Telling classes, one or several, of images or videos."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from matplotlib.figure import Figure
from rich.table import Table

import ssm_jax
from experiments.config import Config
from experiments.problem import Evaluate, Evaluation, Loss, Rows, Scores
from experiments.stages import Stage
from experiments.weights import check_start, start_from_weights
from ssm_jax import plots
from ssm_jax.data import recipe
from ssm_jax.data.datasets import Dataset, Source
from ssm_jax.data.resolution import normalize, resample
from ssm_jax.layers.stems import Rate
from ssm_jax.summary import summary
from ssm_jax.training.scores import mean_scores
from ssm_jax.training.tasks import Classification, MultiLabel, Task, loss_of_logits, rows_of_logits

_SCORES = {"coco": "mean_average_precision", "hmdb51": "video_accuracy"}
"""What tables compare networks by, where that is not the accuracy."""

_SHOWN = 32
"""Images in a picture."""


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationProblem:
    """See `experiments.problem.Problem`."""

    config: Config
    dataset: Dataset

    @property
    def score(self) -> str:  # noqa: D102
        return _SCORES.get(self.config.data.name, "accuracy")

    @property
    def train_transform(self) -> Callable[..., dict[str, Any]]:  # noqa: D102
        return recipe.train_transform(self.dataset, self.config.data, self.config.augment)

    @property
    def eval_transform(self) -> Callable[..., dict[str, Any]]:  # noqa: D102
        return recipe.eval_transform(self.dataset, self.config.data, self.config.eval)

    @property
    def example(self) -> dict[str, tuple[tuple[int, ...], Any]]:  # noqa: D102
        label = ((self.dataset.num_classes,), jnp.float32) if self.dataset.multi_label else ((), jnp.int32)
        return {"image": (self._shape(self.dataset.resolution), jnp.uint8), "label": label}

    def _shape(self, resolution: int) -> tuple[int, ...]:
        frames = () if self.dataset.frames is None else (self.dataset.frames,)
        return (*frames, resolution, resolution, self.dataset.channels)

    def _rate(self, resolution: int) -> Rate:
        """Base resolution / resolution; of videos for each axis, and over time frames in training / frames."""
        rate = self.dataset.resolution / resolution
        frames = self.dataset.frames
        return rate if frames is None else (self.config.data.frames / frames, rate, rate)

    def size(self, resolution: int) -> str:  # noqa: D102
        return f"{resolution} x {resolution}"

    def groups(self, source: Source) -> np.ndarray | None:  # noqa: D102
        del source
        return None

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `ssm_jax.create_model` but for `rngs`."""
        dataset = self.dataset
        given = {"num_classes": dataset.num_classes, "in_channels": dataset.channels}
        return {**self.config.model.to_dict(), **given, "dtype": jnp.dtype(self.config.dtype)}

    def create_model(self, bandlimit: float | None = None) -> nnx.Module:  # noqa: D102
        arguments = self.arguments
        if self.config.stages.epochs:
            arguments.get("mixer", {}).pop("bandlimit", None)
        if bandlimit is not None:
            arguments["mixer"] = {**arguments.get("mixer", {}), "bandlimit": bandlimit}
        return ssm_jax.create_model(rngs=nnx.Rngs(self.config.seed), **arguments)

    def start_from_weights(self, model: nnx.Module) -> None:  # noqa: D102
        start_from_weights(self.config, model, self.arguments)

    def check_start(self, source: nnx.Module) -> None:
        """Raises ValueError unless its network's weights have the names of those of `source`, which may be abstract."""
        check_start(self.config, nnx.eval_shape(self.create_model), self.arguments, source)

    @property
    def task(self) -> Task:
        """What the dataset asks for."""
        if self.dataset.multi_label:
            return MultiLabel(self.dataset.num_classes)
        config = self.config
        return Classification(self.dataset.num_classes, config.label_smoothing, config.double_label_smoothing)

    def loss(self, stage: Stage) -> Loss:  # noqa: D102
        def prepare(images, targets, key):
            images = normalize(images, self.dataset.mean, self.dataset.std)
            images, targets = recipe.augment_batch(images, targets, key, self.config.augment)
            return resample(images, stage.resolution), targets

        return loss_of_logits(self.task, prepare, rate=self._rate(stage.resolution))

    def evaluate(self, resolution: int) -> Evaluate:  # noqa: D102
        def prepare(images):
            return resample(normalize(images, self.dataset.mean, self.dataset.std), resolution)

        return rows_of_logits(self.task, prepare, rate=self._rate(resolution))

    def tally(self, source: Source) -> "_Tally":  # noqa: D102
        return _Tally(source, self.dataset.multi_label)

    def table(self, scores: Scores, resolution: int) -> Table:  # noqa: D102
        table = Table()
        names = [name for name in next(iter(scores.values())) if not name.startswith("ema_")]
        names.sort(key=lambda name: not name.endswith("loss"))
        for column in ["resolution", "rate", "images", *map(plots.score_title, names)]:
            table.add_column(column, justify="right")
        for size, score in scores.items():
            for prefix, of in {"": "", "ema_": ", averaged"}.items():
                if f"{prefix}loss" in score:
                    values = ((name, score[prefix + name]) for name in names)
                    table.add_row(
                        self.size(size) + (" (training)" if size == resolution else "") + of,
                        f"{self.dataset.resolution / size:g}",
                        f"{len(self.dataset.splits['test']):,}",
                        *(f"{value:.4f}" if name.endswith("loss") else f"{value:.2%}" for name, value in values),
                    )
        return table

    def leave(
        self, split: str, evaluations: Mapping[int, Evaluation], resolution: int, workdir: epath.Path
    ) -> dict[str, Figure]:
        """Pictures of scores by resolution, and of images with what was predicted."""
        del workdir
        scores = {size: evaluation.scores[self.score] for size, evaluation in evaluations.items()}
        by_resolution = plots.accuracy_by_resolution(scores, trained_at=resolution, name=self.score)
        return {"accuracy_by_resolution": by_resolution, **self._predictions(split, evaluations[resolution])}

    def _predictions(self, split: str, evaluation: Evaluation) -> dict[str, Figure]:
        """Images from all over a split: wrong predictions first, as far as they fill half of the sheet, then others."""
        if self.dataset.multi_label:
            return {}
        source, labels, read = self.dataset.splits[split], evaluation.rows["label"], evaluation.rows["mask"]
        predictions = evaluation.rows["logits"].argmax(-1)
        order = np.random.default_rng(0).permutation(len(source))  # a folder has one class after another
        order = order[read[order]]
        wrong = order[predictions[order] != labels[order]][: _SHOWN // 2]
        shown = [*wrong, *order[~np.isin(order, wrong)][: _SHOWN - len(wrong)]]
        images = np.stack([self.eval_transform(source[int(i)])["image"] for i in shown])
        if self.dataset.frames is not None:
            images = images[:, images.shape[1] // 2]
        title = (
            f"{np.sum((predictions != labels)[read])} of {np.sum(read)} {split} images are misclassified, shown first"
        )
        names = self.dataset.class_names
        return {"predictions": plots.prediction_sheet(images, labels[shown], predictions[shown], names, title=title)}

    def multiply_adds(self, model: nnx.Module, stage: Stage) -> float | None:  # noqa: D102
        rate = self._rate(stage.resolution)
        return summary(model, (1, *self._shape(stage.resolution)), rate=rate).total.multiply_adds


class _Tally:
    """All rows, in the order of the examples; see `ssm_jax.training.scores.mean_scores`."""

    def __init__(self, source: Source, multi_label: bool):
        self._source, self._multi_label = source, multi_label
        self._done: list[Rows] = []

    def add(self, rows: Rows) -> None:
        self._done.append(rows)

    def evaluation(self) -> Evaluation:
        count = len(self._source)
        rows = {name: np.concatenate([done[name] for done in self._done])[:count] for name in self._done[0]}
        groups = getattr(self._source, "groups", None)  # the videos of clips
        return Evaluation(mean_scores(rows, groups=groups, multi_label=self._multi_label), rows)
