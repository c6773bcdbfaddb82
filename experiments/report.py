r"""What a run leaves for people: the table of test scores, results.json and pictures.

    python -m experiments.report --workdir=runs/digits

writes report.html, the page of a run, anew: training does so when it ends, and this does it at any time. It needs no
config, data or device.
"""

import json
import sys
from collections.abc import Mapping

import jax
from absl import app, flags
from etils import epath
from flax import nnx
from matplotlib.figure import Figure

from experiments import page
from experiments.config import write_file
from experiments.experiment import Experiment
from experiments.problem import Scores
from experiments.terminal import console
from ssm_jax import plots
from ssm_jax.layers import S4ND
from ssm_jax.training.metrics import read_metrics
from ssm_jax.training.steps import TrainState


def print_table(experiment: Experiment, scores: Scores, *, checkpoint: str) -> None:
    """Prints the scores of a checkpoint, described in words."""
    config, frames = experiment.config, experiment.dataset.frames
    table = experiment.problem.table(scores, experiment.resolution)
    what = "images" if frames is None else f"clips of {frames} frames"
    table.title = f"{config.model.name} on the {config.data.name} test {what}, {checkpoint}"
    console().print(table)


def scores_by_frames(
    experiment: Experiment, state: TrainState, known: Scores, *, checkpoint: str
) -> dict[int, dict[str, float]]:
    """Scores of the test clips at each of `config.eval.frames`; prints a table of each but the `known` ones'."""
    found = {}
    for frames in experiment.config.eval.frames:
        if frames == experiment.dataset.frames and experiment.resolution in known:
            found[frames] = known[experiment.resolution]
            continue
        other = experiment.with_frames(frames)
        found[frames] = other.evaluate(state, "test", experiment.resolution).scores
        if jax.process_index() == 0:
            print_table(other, {experiment.resolution: found[frames]}, checkpoint=checkpoint)
    return found


def write(experiment: Experiment, state: TrainState, workdir: epath.Path) -> Scores:
    """Scores a network at the config's resolutions; prints the table, writes results.json and pictures/."""
    resolutions = sorted({experiment.resolution, *experiment.config.eval.resolutions})
    evaluations = {resolution: experiment.evaluate(state, "test", resolution) for resolution in resolutions}
    scores = {resolution: evaluation.scores for resolution, evaluation in evaluations.items()}
    step = int(state.step)
    checkpoint = f"best checkpoint by {experiment.best_by}, step {step}"
    if jax.process_index() == 0:
        print_table(experiment, scores, checkpoint=checkpoint)
    by_frames = scores_by_frames(experiment, state, scores, checkpoint=checkpoint)
    if jax.process_index() == 0:
        pictures = {
            "training_curves": plots.training_curves(read_metrics(workdir)),
            **experiment.problem.leave("test", evaluations, experiment.resolution, workdir),
            **_kernels(experiment, state),
        }
        save_pictures(pictures, workdir / "pictures")
        results = {"step": step, "test": scores, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        if by_frames:
            results["test_by_frames"] = by_frames
        write_file(workdir / "results.json", json.dumps(results, indent=2) + "\n")  # last: the run is finished
        console().print(f"checkpoints, metrics, pictures and report.html are in {workdir}", soft_wrap=True)
    return scores


def save_pictures(pictures: Mapping[str, Figure], folder: epath.Path) -> None:
    """Writes figures as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        with (folder / f"{name}.png").open("wb") as file:
            figure.savefig(file, dpi=150)


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
