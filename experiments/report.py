r"""What a run leaves for people: the table of test scores, results.json and pictures.

    python -m experiments.report --workdir=runs/digits

writes report.html, the page of a run, anew: training does so when it ends, and this does it at any time. It needs no
config, data or device.
"""

import json
import sys
from collections.abc import Mapping

import jax
import numpy as np
from absl import app, flags
from etils import epath
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments import page
from experiments.config import write_file
from experiments.experiment import Evaluation, Experiment
from ssm_jax import plots
from ssm_jax.layers import S4ND
from ssm_jax.training.metrics import read_metrics
from ssm_jax.training.steps import TrainState

Scores = dict[int, dict[str, float]]
"""Scores on the test images, by resolution."""


def print_table(experiment: Experiment, scores: Scores, *, checkpoint: str) -> None:
    """Prints the scores of a checkpoint, described in words."""
    config = experiment.config
    table = Table(title=f"{config.model.name} on the {config.data.name} test images, {checkpoint}")
    names = [name for name in next(iter(scores.values())) if not name.startswith("ema_")]
    names.sort(key=lambda name: not name.endswith("loss"))
    for column in ["resolution", "rate", "images", *map(plots.score_title, names)]:
        table.add_column(column, justify="right")
    for resolution, score in scores.items():
        for prefix, of in {"": "", "ema_": ", averaged"}.items():
            if f"{prefix}loss" in score:
                values = ((name, score[prefix + name]) for name in names)
                table.add_row(
                    f"{resolution} x {resolution}"
                    + (" (training)" if resolution == experiment.resolution else "")
                    + of,
                    f"{experiment.dataset.resolution / resolution:g}",
                    f"{len(experiment.dataset.splits['test']):,}",
                    *(f"{value:.4f}" if name.endswith("loss") else f"{value:.2%}" for name, value in values),
                )
    Console().print(table)


def write(experiment: Experiment, state: TrainState, workdir: epath.Path) -> Scores:
    """Scores a network at the config's resolutions; prints the table, writes results.json and pictures/."""
    resolutions = sorted({experiment.resolution, *experiment.config.eval.resolutions})
    evaluations = {resolution: experiment.evaluate(state, "test", resolution) for resolution in resolutions}
    scores = {resolution: evaluation.scores for resolution, evaluation in evaluations.items()}
    if jax.process_index() == 0:
        step = int(state.step)
        print_table(experiment, scores, checkpoint=f"best checkpoint by {experiment.best_by}, step {step}")
        score = experiment.best_by.removeprefix("val/")
        pictures = {
            "training_curves": plots.training_curves(read_metrics(workdir)),
            "accuracy_by_resolution": plots.accuracy_by_resolution(
                {resolution: of[score] for resolution, of in scores.items()},
                trained_at=experiment.resolution,
                name=score,
            ),
            **_predictions(experiment, evaluations[experiment.resolution]),
            **_kernels(experiment, state),
        }
        save_pictures(pictures, workdir / "pictures")
        results = {"step": step, "test": scores, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        write_file(workdir / "results.json", json.dumps(results, indent=2) + "\n")  # last: the run is finished
        Console().print(f"checkpoints, metrics, pictures and report.html are in {workdir}", soft_wrap=True)
    return scores


def save_pictures(pictures: Mapping[str, Figure], folder: epath.Path) -> None:
    """Writes figures as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        with (folder / f"{name}.png").open("wb") as file:
            figure.savefig(file, dpi=150)


def _predictions(experiment: Experiment, evaluation: Evaluation, *, count: int = 32) -> dict[str, Figure]:
    """Drawn from all over the test set: wrong predictions first, as far as they fill half of the sheet, then others."""
    if experiment.dataset.multi_label:
        return {}
    test, labels, read = experiment.dataset.splits["test"], evaluation.labels, evaluation.mask
    predictions = evaluation.logits.argmax(-1)
    order = np.random.default_rng(0).permutation(len(test))  # a folder has one class after another
    order = order[read[order]]
    wrong = order[predictions[order] != labels[order]][: count // 2]
    shown = [*wrong, *order[~np.isin(order, wrong)][: count - len(wrong)]]
    images = np.stack([experiment.eval_transform(test[int(i)])["image"] for i in shown])
    if experiment.dataset.frames is not None:
        images = images[:, images.shape[1] // 2]
    title = f"{np.sum((predictions != labels)[read])} of {np.sum(read)} test images are misclassified, shown first"
    sheet = plots.prediction_sheet(
        images, labels[shown], predictions[shown], experiment.dataset.class_names, title=title
    )
    return {"predictions": sheet}


def _kernels(experiment: Experiment, state: TrainState, *, count: int = 32) -> dict[str, Figure]:
    """Kernels of the first S4ND layer over images, or else over sequences, drawn as the functions they are."""
    model = nnx.merge(nnx.graphdef(experiment.abstract_model), state.params, state.rest)
    layers = {
        len(module.kernels): module for _, module in reversed([*nnx.iter_modules(model)]) if isinstance(module, S4ND)
    }
    if 2 in layers:  # on a grid 8 times as fine as the images'
        extent = min(experiment.dataset.resolution, 16) / 2
        axes = layers[2].sample_kernels([int(8 * extent)] * 2, rate=1 / 8)
        kernels = plots.outer_products(*(axis[:, :, :1, :count] for axis in axes))
        title = f"2-D kernels of the first S4ND layer, lags -{extent:g} to {extent:g} pixels, each on its own scale"
        return {"kernels": plots.kernel_sheet(kernels, extent=extent, title=title)}
    if 1 in layers:
        (length,) = layers[1].l_max
        by_rate = {rate: layers[1].sample_kernels([round((length or 64) / rate)], rate=rate)[0] for rate in (1, 1 / 8)}
        return {"kernels": plots.kernel_lines(by_rate)}
    return {}


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run.", required=True)

    def main(argv: list[str]) -> None:
        """Runs the command."""
        del argv
        workdir = epath.Path(_WORKDIR.value)
        if not (workdir / "run.json").exists():
            sys.exit(f"error: --workdir={workdir} is not a run: it has no run.json, with which every run begins.")
        print(f"wrote {page.write(workdir)}")

    app.run(main)
