"""results/NAME.json: what came out of a sweep, see `experiments.sweep`, which writes it; and its tables.

The file has the sweep's name, its `paper`, the `command` that starts it, and `tables` by name: `title`, `note`, the
`metric` that networks are compared by (a share of 1), what they are tested `by`, `resolution` or `frames` of a clip,
and `rows` by name: `label`, `model`, `parameters`, `dataset`, `images` (how many, by split), `resolution` of training,
`steps`, `batch_size` and `runs` by seed, each with its `id` and `state`: `missing`; `failed`, with the `error`; or
`finished`, with `scores` (by resolution or frames, then by metric), the `seconds` of training, and when, with what and
on which devices it was made.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from experiments.config import ConfigError
from experiments.published import PAPERS
from ssm_jax.plots import score_title

Table = Mapping[str, Any]
Row = Mapping[str, Any]


def load(folder: epath.PathLike) -> dict[str, dict[str, Any]]:
    """All results in a folder, by the names of sweeps. Raises ConfigError for a file that is none."""
    found = map(_read, sorted(epath.Path(folder).glob("*.json")))
    return {of_sweep["sweep"]: of_sweep for of_sweep in found}


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        for table in found["tables"].values():
            _ = table["title"], columns(table), rows(table), caption(table)
        _, _, paper = found["sweep"], found["command"], found["paper"]
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} has not what experiments.sweep writes: {type(error).__name__} {error}. Make it anew with "
            "--summarize, or move it away."
        ) from error
    if paper not in PAPERS:
        raise ConfigError(f"{path}: paper must be {' or '.join(PAPERS)}, got {paper!r}.")
    return found


def check_replaceable(path: epath.Path, found: Mapping[str, Any]) -> None:
    """Raises ConfigError if the file has finished runs that are not in `found`, and would be lost."""
    if not path.exists():
        return
    there = _finished(_read(path))
    if lost := sorted(name for name, run in there.items() if _finished(found).get(name) != run):
        raise ConfigError(
            f"{path} has results that this sweep and its workdir do not have, of {', '.join(lost[:3])}"
            f"{' and others' if len(lost) > 3 else ''}. Move it away, or give another --workdir or --results."
        )


def _finished(found: Mapping[str, Any]) -> dict[str, Any]:
    """Scores and end of each finished run."""
    return {
        run["id"]: (run["scores"], run["ended"])
        for table in found["tables"].values()
        for row in table["rows"].values()
        for run in row["runs"].values()
        if run["state"] == "finished"
    }


def scores(row: Row, metric: str) -> dict[int, list[float]]:
    """Of the finished runs, by resolution of the test images, or by frames of the test clips."""
    found: dict[int, list[float]] = {}
    for run in row["runs"].values():
        for tested, of_run in run.get("scores", {}).items():
            found.setdefault(int(tested), []).append(of_run[metric])
    return dict(sorted(found.items()))


def percent(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def tested_at(table: Table) -> list[int]:
    """Resolutions of the test images, or frames of the test clips, of all rows."""
    return sorted({tested for row in table["rows"].values() for tested in scores(row, table["metric"])})


def size(table: Table, tested: int) -> str:
    """Of these images or clips, in words."""
    return f"{tested} frames" if table["by"] == "frames" else f"{tested} x {tested}"


def minutes(row: Row) -> str:
    """The median time of training, in words."""
    seconds = [run["seconds"] for run in row["runs"].values() if run.get("seconds") is not None]
    if not seconds:
        return ""
    median = statistics.median(seconds)
    return f"{median / 60:.1f} min" if median >= 60 else f"{median:.0f} s"


def columns(table: Table) -> list[str]:
    """Of the table; the cells are those of `rows`."""
    tested = [f"{size(table, tested)}, %" for tested in tested_at(table)]
    return ["network", "parameters", "training", "runs", *tested]


def rows(table: Table) -> list[list[str]]:
    """Under `columns`."""
    cells = []
    for row in table["rows"].values():
        runs = row["runs"].values()
        done = [run for run in runs if run["state"] == "finished"]
        failed = [seed for seed, run in row["runs"].items() if run["state"] == "failed"]
        of_row = scores(row, table["metric"])
        cells.append(
            [
                row["label"],
                f"{row['parameters']:,}",
                minutes(row),
                f"{len(done)} of {len(runs)}" + (f" (failed: seed {', '.join(failed)})" if failed else ""),
                *(percent(of_row[tested]) if tested in of_row else "" for tested in tested_at(table)),
            ]
        )
    return cells


def caption(table: Table) -> str:
    """What the numbers are."""
    of = list(table["rows"].values())
    sizes = dict.fromkeys(f"{row['dataset']} ({row['images']['train']:,} training images)" for row in of)
    budgets = dict.fromkeys(f"{row['steps']:,} steps of {row['batch_size']}" for row in of)
    devices = dict.fromkeys(
        f"{run['devices']} x {run['device']}" for row in of for run in row["runs"].values() if "device" in run
    )
    metric = score_title(table["metric"])
    tested = "clips, by frames" if table["by"] == "frames" else "images, by resolution"
    seeds = "; mean and standard deviation over seeds" if any(len(row["runs"]) > 1 for row in of) else ""
    return (
        f"{'; '.join(sizes)}; {' or '.join(budgets)}. {metric[0].upper()}{metric[1:]} on the test {tested}, at the "
        f"best checkpoint by validation{seeds}. Median time of training on {', '.join(devices) or 'nothing yet'}, "
        f"without compilation, tests and checkpoints, beside whatever else the machine did. "
        f"{table['note']}"
    ).strip()


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for GitHub, with columns of numbers, but for the first, to the right."""
    signs = ["--:" if i > 0 and all(row[i][:1].isdigit() for row in rows) else ":--" for i in range(len(columns))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [columns, signs, *rows])
