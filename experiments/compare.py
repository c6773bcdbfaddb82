r"""Trains a network with each of several methods and seeds, and tabulates the accuracies; started again, it goes on.

    python -m experiments.compare --config=configs/aggregation/comparison.py --workdir=runs/comparison \
        [--shard=I/N] [--summarize] [--config.FIELD=VALUE ...]

The config has `seeds` and `comparisons`, each with the config of a `run`, as experiments.train takes it, the `methods`
to compare, and a `note` for its table. The method `plain` is the run's own network, another one the network that
`create_model` knows by the name NETWORK_METHOD.

Every run is one of experiments.train, with a workdir of its own, WORKDIR/COMPARISON/METHOD/seed_SEED. Runs that are
finished are not repeated, one that was interrupted goes on from its last checkpoint, and one that fails leaves its
error.txt there, is tried again by the next start, and does not keep the others from going on. Several processes share
the runs with --shard=1/3, 2/3 and 3/3. The tables are made at the end of each, and by --summarize, of what is there.

The workdir gets comparison.md, comparison.json and comparison.png.
"""

import dataclasses
import json
import math
import re
import statistics
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.command import config_flag, fail, run_command
from experiments.config import Config, ConfigError, claim_workdir, section, write_file
from experiments.experiment import Experiment, build
from experiments.report import save_pictures
from experiments.train import train, workdir_flag
from ssm_jax import list_models
from ssm_jax.training.loop import Stopped
from ssm_jax.training.metrics import read_metrics

_SHARD = flags.DEFINE_string("shard", "1/1", "I/N: every N-th run, from the I-th on, is this process's.")
_SUMMARIZE = flags.DEFINE_bool("summarize", False, "Train nothing; make the tables of what is there.")

PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Run:
    """One network of a comparison, with one seed."""

    comparison: str
    method: str
    seed: int
    config: Config
    workdir: epath.Path

    @property
    def name(self) -> str:
        """As people know it, and where its workdir is in that of all runs."""
        return f"{self.comparison}/{self.method}/seed_{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether it has its results, which are what it writes last."""
        return (self.workdir / "results.json").exists()

    @property
    def error(self) -> epath.Path:
        """Where it is told why the run failed."""
        return self.workdir / "error.txt"


def compare(
    config: Config, workdir: epath.PathLike, *, shard: tuple[int, int] = (1, 1), summarize: bool = False
) -> dict[str, Any]:
    """Trains what is not finished of a shard's runs, unless it is only to `summarize`; returns comparison.json."""
    workdir = epath.Path(workdir).resolve()
    runs = plan(config, workdir)
    experiments = _check(runs)
    if not summarize:
        number, shards = shard
        for i, run in enumerate(runs):
            if i % shards == number - 1 and not run.finished:
                if jax.process_index() == 0:
                    print(f"run {i + 1} of {len(runs)}: {run.name}", flush=True)
                _train(run)
    summary = {
        name: _summary(options, [run for run in runs if run.comparison == name], experiments)
        for name, options in config.comparisons.items()
    }
    if jax.process_index() == 0:
        _write(summary, workdir)
    return summary


def plan(config: Config, workdir: epath.Path) -> list[Run]:
    """All runs, those of one seed after another. Raises ConfigError for methods that there are not."""
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"config.seeds must be different numbers, at least one, got {config.seeds}.")
    runs = []
    for seed in config.seeds:
        for comparison, options in config.comparisons.items():
            network = options.run.model.name
            methods = [PLAIN, *(name.removeprefix(f"{network}_") for name in list_models(f"{network}_*"))]
            chosen = options.methods
            if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(methods):
                raise ConfigError(
                    f"config.comparisons.{comparison}.methods must be among {', '.join(methods)}, each at most once, "
                    f"got {chosen}."
                )
            for method in chosen:
                run = options.run.copy_and_resolve_references()
                run.seed = seed
                run.model.name = network if method == PLAIN else f"{network}_{method}"
                folder = workdir / comparison / method / f"seed_{seed}"
                runs.append(Run(comparison, method, seed, run, folder))
    return runs


def _check(runs: Sequence[Run]) -> dict[tuple[str, str], Experiment]:
    """The experiment of each method. Raises ConfigError for what could not run, or not go on in its workdir."""
    experiments = {}
    for run in runs:
        key = run.comparison, run.method
        if key not in experiments:
            try:
                experiments[key] = build(run.config)
                _apply(experiments[key])
            except ConfigError as error:
                message = str(error).replace("config.", f"config.comparisons.{run.comparison}.run.")
                raise ConfigError(f"{message} (in {run.name})") from error
        if run.workdir.exists():
            claim_workdir(run.workdir, run.config)
    return experiments


def _apply(experiment: Experiment) -> None:
    """Evaluates a batch of which only the shape is known: that is when a network refuses images."""
    image = experiment.problem.eval_transform(experiment.dataset.splits["test"][0])["image"]
    rows = experiment.mesh.size
    batch = {
        "image": jax.ShapeDtypeStruct((rows, *image.shape), image.dtype),
        "label": jax.ShapeDtypeStruct((rows,), np.int32),
        "mask": jax.ShapeDtypeStruct((rows,), np.bool_),
    }
    with section(experiment.config, "model"), jax.set_mesh(experiment.mesh):
        state = experiment.abstract_state
        jax.eval_shape(experiment.eval_step(experiment.resolution), state.params, state.rest, batch)


def _train(run: Run) -> None:
    try:
        claim_workdir(run.workdir, run.config)
        run.error.unlink(missing_ok=True)
        train(run.config, run.workdir)
    except Stopped:
        raise
    except Exception as error:  # whatever it is, the others can go on
        first = traceback.format_exception_only(error)[-1]
        print(f"{run.name} failed: {first}", flush=True)
        if run.workdir.exists():
            write_file(run.error, first + "\n" + traceback.format_exc())
    jax.clear_caches()  # the next run has other functions


def _summary(options: Config, runs: Sequence[Run], experiments: dict[tuple[str, str], Experiment]) -> dict[str, Any]:
    """What is known of a comparison, whose `runs` these are."""
    methods = {}
    for method in options.methods:
        of_method = [run for run in runs if run.method == method]
        experiment = experiments[runs[0].comparison, method]
        params = jax.tree.leaves(experiment.abstract_state.params)
        accuracies = {run.seed: _accuracy(run, experiment.resolution) for run in of_method if run.finished}
        rates = [row["images_per_second"] for run in of_method for row in read_metrics(run.workdir) if _timed(row)]
        methods[method] = {
            "parameters": sum(math.prod(x.shape) for x in params),
            "step_ms": 1000 * experiment.config.batch_size / statistics.median(rates) if rates else None,
            "test_accuracy": accuracies,
            "mean": statistics.fmean(accuracies.values()) if accuracies else None,
            "std": statistics.stdev(accuracies.values()) if len(accuracies) > 1 else None,
            "failed": {run.seed: run.error.read_text().splitlines()[0] for run in of_method if run.error.exists()},
            "unfinished": [run.seed for run in of_method if not run.finished and not run.error.exists()],
        }
    size = f"{experiment.resolution} x {experiment.resolution}"
    return {
        "title": f"{options.run.model.name} on {experiment.dataset.title}, {size}",
        "network": {name: value for name, value in options.run.model.to_dict().items() if name != "name"},
        "budget": f"{experiment.total_steps:,} steps of {experiment.config.batch_size} images",
        "note": options.note,
        "methods": methods,
    }


def _accuracy(run: Run, resolution: int) -> float:
    return json.loads((run.workdir / "results.json").read_text())["test"][str(resolution)]["accuracy"]


def _timed(row: dict[str, Any]) -> bool:
    """Whether a row of metrics tells how fast training is: that of a first step does not."""
    return row.get("images_per_second", 0) > 0


COLUMNS = ["method", "parameters", "step, ms", "runs", "test accuracy, %"]


def _rows(comparison: dict[str, Any]) -> list[list[str]]:
    """Under `COLUMNS`."""
    rows = []
    for method, known in comparison["methods"].items():
        done = len(known["test_accuracy"])
        runs = done + len(known["failed"]) + len(known["unfinished"])
        accuracy = "" if known["mean"] is None else f"{100 * known['mean']:.2f}"
        if known["std"] is not None:
            accuracy += f" ± {100 * known['std']:.2f}"
        if known["failed"]:
            accuracy += f" (failed: seed {', '.join(map(str, known['failed']))})"
        step = "" if known["step_ms"] is None else f"{known['step_ms']:.0f}"
        rows.append([method, f"{known['parameters']:,}", step, f"{done} of {runs}", accuracy.strip()])
    return rows


def _caption(comparison: dict[str, Any]) -> str:
    network = ", ".join(f"{name}={value}" for name, value in comparison["network"].items())
    return (
        f"{network}; {comparison['budget']}; mean and standard deviation over seeds of the accuracy on the test "
        f"images, at the best checkpoint by val/accuracy; median time of a training step. {comparison['note']}"
    )


def _write(summary: dict[str, Any], workdir: epath.Path) -> None:
    """Prints the tables, and writes all three files."""
    workdir.mkdir(parents=True, exist_ok=True)
    sections = []
    for comparison in summary.values():
        rows, caption = _rows(comparison), _caption(comparison)
        table = Table(title=comparison["title"], caption=caption)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        lines = ["| " + " | ".join(row) + " |" for row in [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]]
        sections.append("\n".join([f"## {comparison['title']}", "", *lines, "", caption, ""]))
    for name, error in failures(summary).items():
        print(f"{name} failed: {error}", flush=True)
    write_file(workdir / "comparison.md", "\n".join(sections))
    write_file(workdir / "comparison.json", json.dumps(summary, indent=2) + "\n")
    save_pictures({"comparison": picture(summary)}, workdir)
    Console().print(f"comparison.md, .json and .png are in {workdir}", soft_wrap=True)


def picture(summary: dict[str, Any]) -> Figure:
    """A panel for each comparison: the test accuracy of every run as a dot, the means of the methods as lines."""
    figure = Figure(figsize=(4.4 * min(len(summary), 2), 2.8 * -(-len(summary) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(summary) // 2), min(len(summary), 2), squeeze=False)
    for axes in panels.flat[len(summary) :]:
        axes.set_axis_off()
    for axes, comparison in zip(panels.flat, summary.values(), strict=False):
        methods = comparison["methods"]
        for row, known in enumerate(methods.values()):
            dots = [100 * accuracy for accuracy in known["test_accuracy"].values()]
            axes.plot(dots, [row] * len(dots), "o", color="C0", alpha=0.6, markersize=5)
            if dots:
                axes.plot([100 * known["mean"]] * 2, [row - 0.3, row + 0.3], color="C1", linewidth=2)
        axes.set_yticks(range(len(methods)), list(methods))
        axes.set(xlabel="test accuracy, %", ylim=(len(methods) - 0.5, -0.5))
        axes.set_title(comparison["title"], fontsize=9)
    return figure


def failures(summary: dict[str, Any]) -> dict[str, str]:
    """The errors of the runs that failed, by the runs' names."""
    return {
        f"{name}/{method}/seed_{seed}": error
        for name, comparison in summary.items()
        for method, known in comparison["methods"].items()
        for seed, error in known["failed"].items()
    }


def parse_shard(text: str) -> tuple[int, int]:
    """The numbers of I/N. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, shards = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= number <= shards:
        raise ConfigError(f"--shard must be I/N with I from 1 to N, such as 1/3, got {text!r}.")
    return number, shards


if __name__ == "__main__":

    def main() -> None:
        """Runs the command."""
        summary = compare(
            config_flag.value, workdir_flag.value, shard=parse_shard(_SHARD.value), summarize=_SUMMARIZE.value
        )
        if failed := failures(summary):
            fail(f"{len(failed)} runs failed: {', '.join(failed)}. Each has an error.txt.", status=1)

    run_command(main)
