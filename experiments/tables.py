r"""Prints the tables of both papers: what others report, what came out here, and what it would take to run the rest.

    python -m experiments.tables [s4nd|s6la] [--results=results] [--markdown=FILE] [--html=FILE] [--readme=README.md]
    python -m experiments.tables --count

Results are of the runs themselves, RESULTS/*.json, see `experiments.results`; nothing is written by hand. A row that
was not run at the paper's size has the command that runs it, and estimated TPU-hours: of the recipe's compile report in
RESULTS/compile/, or else counted. `--markdown` and `--html` write files instead; `--readme` renews the results in a
page, between its markers; `--count` renews RESULTS/counted/recipes.json, parameters and multiply-adds of all recipes,
which takes minutes.
"""

import fnmatch
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any, NamedTuple

from absl import app, flags
from etils import epath
from flax import nnx
from rich import box
from rich.table import Table

from experiments import results
from experiments.command import fail
from experiments.config import Config, ConfigError, write_file
from experiments.configs import Recipe, count_parameters, recipes
from experiments.page import STYLE
from experiments.problem import load, problem_of
from experiments.published import CLAIMS, COSTS, GROUPS, PAPERS, STATUS, Group
from experiments.stages import Stage, plan
from experiments.terminal import console
from ssm_jax.chips import TPUS
from ssm_jax.data.pipeline import batches_per_epoch
from ssm_jax.ops.backend import traced_for

START, END = "<!-- results -->", "<!-- /results -->"
"""Around what `--readme` renews."""

_INTRODUCTION = """\
What others report, with how sure it is, and what came out here. Results here are of reduced size, each table says
which, and are no reproduction of a number that has another size: compare rows of one table with each other.
**Multiply-adds** are of a forward pass of one image or clip, at the resolution of the last stage of training, and of
what is computed on a TPU, where S4ND's convolutions are matrix products and take more of them than FFTs do.
**TPU-hours** are chips (TPU v5e, if not said) times hours: **by XLA**'s estimate of a step, without input, evaluation
and waiting for others, of what was compiled by `python -m benchmarks.compile_matrix --topologies=v5e:8x8
--recipes=RECIPE`, whose files go into results/compile/; and **counted**, three forward passes of each image at 40 % of
a TPU v5e's peak, which is much too few. Compare within a column. Multiply-adds of detectors are not counted.
"""

_CHIP, _SHARE = TPUS["v5e"], 0.4
"""What counted hours are of, and how much of its peak they suppose."""

_HOURS = "TPU-hours by XLA", "TPU-hours counted"

_METHODS = "Multiply-adds counted here are those on a TPU, where S4ND's convolutions are matrix products, not FFTs."


class Sheet(NamedTuple):
    """A table, in words."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    caption: str
    wide: tuple[str, ...] = ()
    """Columns that terminals have no room for."""


class Hours(NamedTuple):
    """Chips times hours."""

    hours: float
    device: str

    def __str__(self) -> str:
        hours = f"{self.hours:,.0f}" if self.hours >= 10 else f"{self.hours:.2g}"
        return hours if self.device == _CHIP.name else f"{hours} ({self.device})"


class Known(NamedTuple):
    """All that tables are made of, see `load_known`."""

    found: Mapping[str, Any]
    """Results by sweep, see `experiments.results`."""
    compiled: Mapping[str, Hours]
    """By recipe, of its compile report."""
    counted: Mapping[str, Any]
    """By recipe, see `count`."""

    def count(self, recipe: str, what: str) -> str:
        """Parameters or multiply-adds, in words."""
        counted = self.counted.get(recipe, {})
        if what == "parameters":
            return f"{counted['parameters'] / 1e6:.2f} M" if counted else "not counted"
        of_stages = counted.get("multiply_adds")
        return f"{of_stages[-1] / 1e9:.2f} G" if of_stages else "not counted"

    def hours(self, recipe: Recipe) -> Hours | None:
        """Counted, of training; None where multiply-adds are not counted."""
        if not (multiply_adds := self.counted.get(recipe.name, {}).get("multiply_adds")):
            return None
        images = [(end - start) * recipe.config.batch_size for start, end in _steps(recipe.config)]
        products = sum(n * each for n, each in zip(images, multiply_adds, strict=True))
        return Hours(3 * 2 * products / (_SHARE * _CHIP.flops) / 3600, _CHIP.name)

    def caution(self) -> str:
        """What is to be said of counted hours, where some are known better."""
        counted = {recipe.name: self.hours(recipe) for recipe in recipes() if recipe.name in self.compiled}
        times = [
            self.compiled[name].hours / hours.hours
            for name, hours in counted.items()
            if hours is not None and hours.device == self.compiled[name].device
        ]
        known = (
            f": where XLA's estimate is known, it is {min(times):.0f} to {max(times):.0f} times that" if times else ""
        )
        return f"`~`: counted, at {100 * _SHARE:.0f} % of a {_CHIP.name}'s peak{known}."


def load_known(folder: epath.PathLike) -> Known:
    """From a directory of results. Raises ConfigError for files that are none."""
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"--results={folder} is no directory.")
    return Known(results.load(folder), tpu_hours(folder / "compile"), _counted(folder / "counted/recipes.json"))


def _counted(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        stages = {recipe.name: len(_steps(recipe.config)) for recipe in recipes()}
        for name, of_recipe in found.items():
            parameters, multiply_adds = of_recipe["parameters"], of_recipe["multiply_adds"]
            if not isinstance(parameters, int) or (multiply_adds and len(multiply_adds) != stages.get(name)):
                raise ValueError(f"not of {name} as it is")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not what experiments.tables --count writes: {type(error).__name__} {error}."
        ) from error
    return found


def count(config: Config) -> dict[str, Any]:
    """`parameters`, and `multiply_adds` of a forward pass in each stage of training, None for detectors."""
    dataset = load(config, files=False)
    problem = problem_of(config, dataset)
    with traced_for("tpu"):
        of_stages = []
        for stage in _stages(config):
            model = nnx.eval_shape(lambda stage=stage: problem.create_model(stage.bandlimit))
            of_stages.append(problem.multiply_adds(model, stage))
    known = None if None in of_stages else of_stages
    return {"parameters": count_parameters(config), "multiply_adds": known}


def sheets(paper: str, known: Known) -> Iterator[Sheet]:
    """Of a paper: the tables of its sweeps, its own tables, and numbers without one."""
    for sweep, of_sweep in known.found.items():
        if of_sweep["paper"] == paper:
            for name, table in of_sweep["tables"].items():
                caption = f"{results.caption(table)} Runs are in {sweep}/{name}/; `{of_sweep['command']}`."
                title = f"{table['title']} (here, at a reduced size)"
                ids = [_ids(row, of_row) for row, of_row in table["rows"].items()]
                rows = [[*cells, of_row] for cells, of_row in zip(results.rows(table), ids, strict=True)]
                yield Sheet(title, (*results.columns(table), "runs/"), rows, caption, ("parameters", "runs/"))
    caution = known.caution()
    for group in GROUPS:
        if group.paper == paper:
            yield _group(group, known, caution)
    costs = [
        [cost.recipe, cost.what, cost.value, known.count(cost.recipe, cost.what), f"{cost.source} ({cost.status})"]
        for cost in COSTS
        if cost.recipe.startswith(f"{paper}/")
    ]
    if costs:
        columns = ("recipe", "cost", "published", "counted here", "source")
        yield Sheet("Parameters and multiply-adds", columns, costs, _METHODS)
    claims = [list(claim[1:]) for claim in CLAIMS if claim.paper == paper]
    yield Sheet("Further numbers", ("what", "value", "source", "status"), claims, "")


def _ids(name: str, row: results.Row) -> str:
    """Of a row's finished runs, as shells take them."""
    seeds = [seed for seed, run in row["runs"].items() if run["state"] == "finished"]
    if not seeds:
        return "not run"
    return f"`{name}/seed_{seeds[0] if len(seeds) == 1 else '{' + ','.join(seeds) + '}'}`"


def _group(group: Group, known: Known, caution: str) -> Sheet:
    rows = []
    for recipe in recipes():
        if any(fnmatch.fnmatch(recipe.name, pattern) for pattern in group.recipes):
            name = recipe.name.replace(".py", "").replace("/", "_").replace(":", "_")
            command = f"python -m experiments.train --config=configs/{recipe.name} --workdir=runs/{name}"
            counts = (known.count(recipe.name, what) for what in ("parameters", "multiply-adds"))
            compiled, counted = known.compiled.get(recipe.name), known.hours(recipe)
            hours = [str(compiled) if compiled else "not compiled", f"~{counted}" if counted else "not counted"]
            rows.append([recipe.name, *counts, *_published(recipe.config), "not run", f"`{command}`", *hours])
    there = [name for name in group.reduced if name in known.found]
    caption = "None of these was run" + (f"; at a reduced size: {', '.join(there)}, above. " if there else ". ")
    if any(row[-1].startswith("~") for row in rows):
        caption += caution
    columns = ("recipe", "parameters", "multiply-adds", "published", "source", "here", "to run it", *_HOURS)
    return Sheet(group.title, columns, rows, caption.strip(), ("parameters", "multiply-adds", "here", "to run it"))


def _published(config: Config) -> tuple[str, str]:
    """The number with its metric, and its source with how sure it is."""
    value, metric, source = config.published.value, config.published.metric, config.published.source
    if value is None:
        return "", source
    status = next(status for start, status in STATUS.items() if source.startswith(start))
    return f"{value} {metric}", f"{source.removesuffix(f'; {status}')} ({status})"


def tpu_hours(folder: epath.Path) -> dict[str, Hours]:
    """By recipe, of the compile reports in a folder. Raises ConfigError for files that are none."""
    known = {recipe.name: recipe.config for recipe in recipes()}
    names = {name.replace(".py", "").replace("/", "-").replace(":", "-"): name for name in known}
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text())
            stem = path.stem.removesuffix("-" + report["topology"].replace(":", "-"))
            if stem not in names:
                raise ConfigError(f"{path} is of no recipe: it must be called RECIPE-TOPOLOGY.json.")
            name, seconds = names[stem], 0.0
            for stage, (start, end) in zip(report["stages"], _steps(known[name]), strict=True):
                seconds += stage["seconds"] * (end - start) * math.prod(stage["mesh"].values())
            found[name] = Hours(seconds / 3600, report["stages"][0]["device"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is no report of experiments.compile: {type(error).__name__} {error}.") from error
    return found


def _steps(config: Config) -> list[tuple[int, int]]:
    """From which to which, of each stage of training."""
    ends = [stage.end for stage in _stages(config)]
    return [*zip([0, *ends], ends, strict=False)]


def _stages(config: Config) -> Sequence[Stage]:
    dataset = load(config, files=False)
    train = dataset.splits["train"]
    steps_per_epoch = batches_per_epoch(train, config.batch_size, problem_of(config, dataset).groups(train))
    return plan(config, dataset.resolution, steps_per_epoch)


def markdown(paper_sheets: Mapping[str, Sequence[Sheet]]) -> str:
    """A page."""
    parts = ["# The papers' tables\n", _INTRODUCTION]
    for paper, of_paper in paper_sheets.items():
        parts.append(f"## {PAPERS[paper]}\n")
        for sheet in of_paper:
            parts.append(f"### {sheet.title}\n\n{results.markdown(sheet.columns, sheet.rows)}")
            parts += [f"{sheet.caption}\n"] if sheet.caption else []
    parts.append("This page is what `python -m experiments.tables --markdown=docs/tables.md` writes.\n")
    return "\n".join(parts)


def html(paper_sheets: Mapping[str, Sequence[Sheet]]) -> str:
    """A page that needs nothing else."""
    parts = ["<h1>The papers' tables</h1>", f"<p>{_code(_INTRODUCTION.replace('**', ''))}</p>"]
    for paper, of_paper in paper_sheets.items():
        parts.append(f"<h2>{escape(PAPERS[paper])}</h2>")
        for sheet in of_paper:
            head = "".join(f"<th>{_code(column)}</th>" for column in sheet.columns)
            lines = ("".join(f"<td>{_code(cell)}</td>" for cell in row) for row in sheet.rows)
            rows = "".join(f"<tr>{line}</tr>\n" for line in lines)
            parts.append(f"<h3>{_code(sheet.title)}</h3>\n<div class=wide><table><tr>{head}</tr>\n{rows}</table></div>")
            parts.append(f"<p class=quiet>{_code(sheet.caption)}</p>")
    body = "\n".join(parts)
    return f"<!doctype html>\n<meta charset=utf-8>\n<title>The papers' tables</title>\n<style>{STYLE}</style>\n{body}\n"


def _code(text: str) -> str:
    """Escaped, with what is between backticks as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def print_sheets(paper_sheets: Mapping[str, Sequence[Sheet]]) -> None:
    """For a terminal: what repeats in all rows goes below."""
    out = console()
    for paper, of_paper in paper_sheets.items():
        out.print(f"\n[bold]{PAPERS[paper]}[/bold]\n")
        for sheet in of_paper:
            shown = [i for i, column in enumerate(sheet.columns) if column not in sheet.wide]
            caption = sheet.caption.replace("`", "")
            if "to run it" in sheet.columns:
                train = "python -m experiments.train --config=configs/RECIPE --workdir=runs/NAME"
                caption += f" To run one: {train}"
            table = Table(box=box.SIMPLE_HEAD, title=sheet.title, caption=caption, padding=(0, 1, 0, 0))
            for i in shown:
                whole = sheet.columns[i] in ("recipe", "cost", "network", *_HOURS)
                table.add_column(sheet.columns[i], no_wrap=whole, overflow="fold")
            for row in sheet.rows:
                table.add_row(*("" if row[i].startswith("not stated") else row[i] for i in shown))
            out.print(table)


def of_readme(found: Mapping[str, Any]) -> str:
    """What `--readme` puts between the markers: of each table the first row, and the best of the others."""
    tables = [table for of_sweep in found.values() for table in of_sweep["tables"].values()]
    lines = [line for table in tables if (line := _first_and_best(table))]
    columns = ("experiment", "tested at", "baseline", "%", "training", "best of the others", "%", "training")
    return results.markdown(columns, lines)


def _first_and_best(table: results.Table) -> list[str]:
    """At the highest resolution, or most frames, that all rows are tested at; nothing if some were not run."""
    scores = {name: results.scores(row, table["metric"]) for name, row in table["rows"].items()}
    shared = set.intersection(*(set(of_row) for of_row in scores.values()))
    first, *others = scores
    if not shared or not others:
        return []
    tested = max(shared)
    best = max(others, key=lambda name: fmean(scores[name][tested]))
    cells = [
        [row["label"], results.percent(scores[name][tested]), results.minutes(row)]
        for name, row in table["rows"].items()
        if name in (first, best)
    ]
    return [table["title"], results.size(table, tested), *itertools.chain(*cells)]


def renewed(page: str, text: str) -> str:
    """A page with other text between the markers. Raises ConfigError where they are not."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ConfigError(f"--readme must be a page with {START} and then {END}.")
    return f"{before}{START}\n{text}{END}{after}"


def main() -> None:
    """The command."""
    folder = flags.DEFINE_string("results", "results", "Directory of results.")
    pages = {
        name: flags.DEFINE_string(name, None, help)
        for name, help in {
            "markdown": "File for a page in Markdown, instead of printing.",
            "html": "File for a page in HTML, instead of printing.",
            "readme": "Page whose results are to be renewed, instead of printing.",
        }.items()
    }

    recount = flags.DEFINE_bool("count", False, "Renew RESULTS/counted/recipes.json, instead of printing.")

    def command(argv: list[str]) -> None:
        papers = argv[1:] or [*PAPERS]
        if unknown := set(papers) - PAPERS.keys():
            fail(f"there are tables of {' and '.join(PAPERS)}, got {', '.join(sorted(unknown))}.", status=2)
        try:
            if recount.value:
                path = epath.Path(folder.value) / "counted/recipes.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                counted = {recipe.name: count(recipe.config) for recipe in recipes()}
                write_file(path, json.dumps(counted, indent=1) + "\n")
                return
            known = load_known(folder.value)
            readme = pages["readme"].value
            if readme is not None and not known.found:
                raise ConfigError(f"--results={folder.value} has no results to put into --readme={readme}.")
            paper_sheets = {paper: [*sheets(paper, known)] for paper in PAPERS if paper in papers}
            if readme is not None:
                write_file(epath.Path(readme), renewed(epath.Path(readme).read_text(), of_readme(known.found)))
            for name, make in {"markdown": markdown, "html": html}.items():
                if path := pages[name].value:
                    write_file(epath.Path(path), make(paper_sheets))
        except (ConfigError, OSError) as error:
            fail(str(error), status=2)
        if not any(flag.value for flag in pages.values()):
            print_sheets(paper_sheets)

    app.run(command)


if __name__ == "__main__":
    main()
