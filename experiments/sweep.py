r"""Trains all that a sweep lists, with each of its seeds, and tabulates the scores; started again, it goes on.

    python -m experiments.sweep --config=configs/sweeps/zero_shot.py --config.data_dir=FOLDER \
        [--workdir=runs/NAME] [--results=runs/results] [--shard=I/N] [--summarize] [--config.FIELD=VALUE ...]

The config has `seeds` and `tables`. A table has a `title`, a `note` and `rows`, each with a `label` and the config of a
`run`, as experiments.train takes it; a row may start from the weights of another one, `weights_of`, of the same seed.
NAME is that of the config's file, with what comes after a colon.

Every run is one of experiments.train, with a workdir of its own, WORKDIR/TABLE/ROW/seed_SEED. Runs that are finished
are not repeated, one that was interrupted goes on from its last checkpoint, and one that fails leaves its error.txt
there, is tried again by the next start, and does not keep the others from going on. Several processes share the runs
with --shard=1/3, 2/3 and 3/3. The tables are made at the end of each, and by --summarize, of what is there.

The workdir gets sweep.md and sweep.png, and RESULTS gets NAME.json, of which `python -m experiments.tables` makes
tables. A NAME.json with results of other runs is never written over; those in results/ are the project's own.
"""

import dataclasses
import datetime
import json
import math
import re
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from matplotlib.figure import Figure
from ml_collections import config_flags
from rich import box
from rich.table import Table

from experiments import results
from experiments.classification import ClassificationProblem
from experiments.command import config_flag, fail, run_command
from experiments.config import Config, ConfigError, check_workdir, claim_workdir, section, write_file
from experiments.experiment import Experiment, build
from experiments.lock import WorkdirInUseError
from experiments.published import PAPERS
from experiments.report import save_pictures
from experiments.terminal import console
from experiments.train import train, workdir_flag
from ssm_jax import plots
from ssm_jax.training.loop import Stopped
from ssm_jax.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """A row of a table, with one seed."""

    table: str
    row: str
    seed: int
    config: Config
    workdir: epath.Path
    weights: epath.Path | None
    """The workdir of the run that this one starts from."""

    @property
    def name(self) -> str:
        """As people know it, and where its workdir is in that of all runs."""
        return f"{self.table}/{self.row}/seed_{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether it has its results, which are what it writes last."""
        return _finished(self.workdir)

    @property
    def error(self) -> epath.Path:
        """Where it is told why the run failed."""
        return self.workdir / "error.txt"


def sweep(
    config: Config,
    workdir: epath.PathLike,
    *,
    out: epath.PathLike,
    command: str = "",
    shard: tuple[int, int] = (1, 1),
    summarize: bool = False,
) -> dict[str, Any]:
    """Trains what is not finished of a shard's runs, unless it is only to `summarize`.

    Returns what it writes to the file `out`, see `experiments.results`; `command` is what people start it with.
    """
    workdir, out = epath.Path(workdir).resolve(), epath.Path(out)
    runs = plan(config, workdir)
    experiments = _check(runs)

    def summary() -> dict[str, Any]:
        tables = {
            name: {"title": options.title, "note": options.note}
            | _table(options, [run for run in runs if run.table == name], experiments)
            for name, options in config.tables.items()
        }
        return {"paper": config.paper, "sweep": out.stem, "command": command, "tables": tables}

    results.check_replaceable(out, summary())
    if not summarize:
        number, shards = shard
        _train_all(runs, [run for i, run in enumerate(runs) if i % shards == number - 1 and not run.finished])
    found = summary()
    if jax.process_index() == 0:
        _write(found, workdir, out)
    return found


def plan(config: Config, workdir: epath.Path) -> list[Run]:
    """All runs, those of one seed after another. Raises ConfigError for seeds, labels and weights that cannot be."""
    if missing := [name for name in ("paper", "seeds", "tables") if name not in config]:
        raise ConfigError(
            f"config has no {', '.join(missing)}: experiments.sweep takes configs like those in configs/sweeps/."
        )
    if config.paper not in PAPERS:
        raise ConfigError(f"config.paper must be {' or '.join(PAPERS)}, got {config.paper!r}.")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"config.seeds must be different numbers, at least one, got {config.seeds}.")
    if not config.tables:
        raise ConfigError("config.tables must have at least one table, got none.")
    for table, options in config.tables.items():
        labels = [row.label for row in options.rows.values()]
        if not labels or len(set(labels)) < len(labels):
            raise ConfigError(f"config.tables.{table}.rows must have different labels, at least one, got {labels}.")
    runs, before = [], set()
    for seed in config.seeds:
        for table, options in config.tables.items():
            for row, chosen in options.rows.items():
                run = chosen.run.copy_and_resolve_references()
                run.seed = seed
                weights = None
                if chosen.weights_of:
                    if chosen.weights_of not in before:
                        raise ConfigError(
                            f"config.tables.{table}.rows.{row}.weights_of must be TABLE/ROW of a row before it, one of "
                            f"{', '.join(sorted(before)) or 'none'}, got {chosen.weights_of!r}."
                        )
                    weights = workdir / chosen.weights_of / f"seed_{seed}"
                    run.weights = str(weights)
                before.add(f"{table}/{row}")
                runs.append(Run(table, row, seed, run, workdir / table / row / f"seed_{seed}", weights))
    return runs


def _finished(workdir: epath.Path) -> bool:
    return (workdir / "results.json").exists()


def _check(runs: Sequence[Run]) -> dict[tuple[str, str], Experiment]:
    """The experiment of each row. Raises ConfigError for what could not run, or not go on in its workdir."""
    experiments = {}
    for run in runs:
        key = run.table, run.row
        if key not in experiments:
            try:
                experiments[key] = build(run.config)
                problem = experiments[key].problem
                if isinstance(problem, ClassificationProblem):  # images are not refused before
                    with section(run.config, "model"):
                        experiments[key].check_evaluation()
            except ConfigError as error:
                message = str(error).replace("config.", f"config.tables.{run.table}.rows.{run.row}.run.")
                raise ConfigError(message) from error
            if run.weights is not None and isinstance(problem, ClassificationProblem):
                table, row, _ = run.weights.parts[-3:]
                try:
                    problem.check_start(experiments[table, row].abstract_model)
                except ValueError as error:
                    field = f"config.tables.{run.table}.rows.{run.row}.weights_of"
                    raise ConfigError(f"{field}={f'{table}/{row}'!r}: {error}") from error
        if run.workdir.exists():
            try:
                check_workdir(run.workdir, run.config)
            except ConfigError as error:
                raise ConfigError(
                    f"{error} To train only this row anew, remove {run.workdir.parent}, and the sweep's results if "
                    "they have it."
                ) from error
    return experiments


def _train_all(runs: Sequence[Run], unfinished: Sequence[Run]) -> None:
    start, trained = time.monotonic(), 0
    for done, run in enumerate(unfinished):
        if run.finished:  # by another process in the meantime
            continue
        if jax.process_index() == 0:
            left = ""
            if trained:
                seconds = (time.monotonic() - start) / trained * (len(unfinished) - done)
                left = f", {datetime.timedelta(seconds=round(seconds))} left at this pace"
            finished = sum(run.finished for run in runs)
            number = f"run {done + 1} of {len(unfinished)} here, {finished} of all {len(runs)} are finished"
            print(f"{number}: {run.name}{left}", flush=True)
        trained += _train(run)


def _train(run: Run) -> bool:
    """Whether it was this process's to train; a failure is noted beside the run."""
    try:
        claim_workdir(run.workdir, run.config)
        run.error.unlink(missing_ok=True)
        if run.weights is not None and not _finished(run.weights):
            raise RuntimeError(f"it starts from {run.weights}, which is not finished")
        train(run.config, run.workdir)
    except Stopped:
        raise
    except WorkdirInUseError as error:
        print(f"{run.name} is left to another process. {error}", flush=True)
        return False
    except Exception as error:  # whatever it is, the others can go on
        first = traceback.format_exception_only(error)[-1].strip()
        print(f"{run.name} failed: {first}", flush=True)
        if run.workdir.exists() and not run.finished:
            write_file(run.error, first + "\n" + traceback.format_exc())
    jax.clear_caches()  # the next run has other functions
    return True


def _table(options: Config, runs: Sequence[Run], experiments: dict[tuple[str, str], Experiment]) -> dict[str, Any]:
    """What is known of a table, whose `runs` these are."""
    rows = {}
    for name, chosen in options.rows.items():
        of_row = [run for run in runs if run.row == name]
        experiment = experiments[of_row[0].table, name]
        rows[name] = {
            "label": chosen.label,
            "model": experiment.config.model.name,
            "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(experiment.abstract_state.params)),
            "dataset": experiment.dataset.title,
            "images": {split: len(source) for split, source in experiment.dataset.splits.items()},
            "resolution": experiment.resolution,
            "steps": experiment.total_steps,
            "batch_size": experiment.config.batch_size,
            "runs": {str(run.seed): _known(run, experiment) for run in of_row},
        }
    by = "frames" if experiment.config.eval.frames else "resolution"
    return {"metric": experiment.problem.score, "by": by, "rows": rows}


def _known(run: Run, experiment: Experiment) -> dict[str, Any]:
    """Of one run, from the files in its workdir."""
    if not run.finished:
        if run.error.exists():
            return {"id": run.name, "state": "failed", "error": run.error.read_text().splitlines()[0]}
        return {"id": run.name, "state": "missing"}
    found = _read(run.workdir / "results.json")
    last = _read(run.workdir / "run.json")["starts"][-1]
    return {
        "id": run.name,
        "state": "finished",
        "scores": found.get("test_by_frames", found["test"]),
        "seconds": _training_seconds(run, experiment),
        "ended": last.get("end"),
        **{name: last[name] for name in ("device", "devices", "commit", "versions")},
    }


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is no JSON: {error}. Remove {path.parent}, and the sweep's results if they have it, to train this "
            "run anew."
        ) from error


def _training_seconds(run: Run, experiment: Experiment) -> float | None:
    """All steps, at the median speed of each stage: without compilation, evaluation, checkpoints and pauses."""
    rows = [row for row in read_metrics(run.workdir) if row.get("images_per_second", 0) > 0]
    seconds, start = 0.0, 0
    for stage in experiment.stages:
        rates = [row["images_per_second"] for row in rows if start < row["step"] <= stage.end]
        if not rates:
            return None
        seconds += (stage.end - start) * experiment.config.batch_size / float(np.median(rates))
        start = stage.end
    return seconds


def _write(found: dict[str, Any], workdir: epath.Path, out: epath.Path) -> None:
    """Prints the tables, and writes all three files."""
    workdir.mkdir(parents=True, exist_ok=True)
    sections = []
    for of_table in found["tables"].values():
        columns, rows, caption = results.columns(of_table), results.rows(of_table), results.caption(of_table)
        table = Table(title=of_table["title"], caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            first = column == columns[0]
            table.add_column(column, justify="left" if first else "right", no_wrap=first, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console().print(table)
        sections.append(f"## {of_table['title']}\n\n{results.markdown(columns, rows)}\n{caption}\n")
    for name, error in failures(found).items():
        print(f"{name} failed: {error}", flush=True)
    write_file(workdir / "sweep.md", "\n".join(sections))
    save_pictures({"sweep": picture(found)}, workdir)
    results.check_replaceable(out, found)  # again: others may have written in the meantime
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    console().print(f"sweep.md and sweep.png are in {workdir}, the results in {out}", soft_wrap=True)


def picture(found: dict[str, Any]) -> Figure:
    """A panel for each table: scores by resolution of the test images with error bars, or of one a dot for each run."""
    panels = []
    for of_table in found["tables"].values():
        scores = {row["label"]: results.scores(row, of_table["metric"]) for row in of_table["rows"].values()}
        panels.append((of_table["title"], of_table["by"], scores))
    return plots.score_panels(panels)


def failures(found: dict[str, Any]) -> dict[str, str]:
    """The errors of the runs that failed, by the runs' names."""
    return {
        run["id"]: run["error"]
        for of_table in found["tables"].values()
        for row in of_table["rows"].values()
        for run in row["runs"].values()
        if run["state"] == "failed"
    }


def parse_shard(text: str) -> tuple[int, int]:
    """The numbers of I/N. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, shards = (int(part) for part in found.groups()) if found else (0, 0)
    if not 1 <= number <= shards:
        raise ConfigError(f"--shard must be I/N with I from 1 to N, such as 1/3, got {text!r}.")
    return number, shards


def command_of(file: str, arguments: Sequence[str]) -> str:
    """How a sweep is started elsewhere: with the fields that were changed, and folders to be filled in."""
    fields = [argument for argument in arguments if argument.startswith("--config.")]
    fields = [
        re.sub(r"(?<=[._])(\w*dir)=.*", lambda found: f"{found[1]}={found[1].upper()}", field) for field in fields
    ]
    return shlex.join(["python", "-m", "experiments.sweep", f"--config={file}", *fields])


def name_of(file: str) -> str:
    """Of a sweep, by its config's FILE or FILE:WORDS."""
    path, _, words = file.partition(":")
    return "_".join([Path(path).stem, *re.findall(r"\w+", words)])


if __name__ == "__main__":
    _RESULTS = flags.DEFINE_string("results", "runs/results", "Directory that gets NAME.json.")
    _SHARD = flags.DEFINE_string("shard", "1/1", "I/N: every N-th run, from the I-th on, is this process's.")
    _SUMMARIZE = flags.DEFINE_bool("summarize", False, "Train nothing; make the tables of what is there.")

    def main() -> None:
        """Runs the command."""
        file = str(config_flags.get_config_filename(flags.FLAGS["config"]))
        name = name_of(file)
        found = sweep(
            config_flag.value,
            workdir_flag.value or f"runs/{name}",
            out=epath.Path(_RESULTS.value) / f"{name}.json",
            command=command_of(file, sys.argv[1:]),
            shard=parse_shard(_SHARD.value),
            summarize=_SUMMARIZE.value,
        )
        if failed := failures(found):
            fail(f"{len(failed)} runs failed: {', '.join(failed)}. Each has an error.txt.", status=1)

    run_command(main)
