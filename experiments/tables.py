r"""Prints the tables of both papers: what others report, what came out here, and what it would take to run the rest.

    python -m experiments.tables [s4nd|s6la] [--results=results] [--markdown=FILE] [--html=FILE] [--readme=README.md]

Results are of the runs themselves, RESULTS/*.json, see `experiments.results`; nothing is written by hand. A row that
was not run at the paper's size has the command that runs it, and estimated TPU-hours where RESULTS/compile/ has the
recipe's compile report. `--markdown` and `--html` write files instead; `--readme` renews the results in a page, between
its markers.
"""

import fnmatch
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from absl import app, flags
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from experiments import results
from experiments.command import fail
from experiments.config import Config, ConfigError, write_file
from experiments.configs import recipes
from experiments.page import STYLE
from experiments.problem import load, problem_of
from experiments.published import CLAIMS, GROUPS, Group
from experiments.stages import plan
from ssm_jax.data.pipeline import batches_per_epoch

PAPERS = {
    "s4nd": "S4ND: Modeling Images and Videos as Multidimensional Signals Using State Spaces (NeurIPS 2022)",
    "s6la": "From Layers to States: A State Space Model Perspective to Deep Neural Network Layer Dynamics (ICLR 2025)",
}

START, END = "<!-- results -->", "<!-- /results -->"
"""Around what `--readme` renews."""

_INTRODUCTION = """\
What others report, with how sure it is, and what came out here. Results here are of reduced size, each table says
which, and are no reproduction of a number that has another size: compare rows of one table with each other.
**TPU-hours** are chips times hours, by XLA's estimate of a step, without input, evaluation and waiting for others; a
recipe that was not compiled is by `python -m benchmarks.compile_matrix --topologies=v5e:8x8 --recipes=RECIPE`, whose
files go into results/compile/.
"""


class Sheet(NamedTuple):
    """A table, in words."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]
    caption: str


def sheets(paper: str, found: Mapping[str, Any], hours: Mapping[str, str]) -> Iterator[Sheet]:
    """Of a paper: its tables, numbers without one, and the tables of the sweeps in `found`."""
    for group in GROUPS:
        if group.paper == paper:
            yield _group(group, found, hours)
    claims = [list(claim[1:]) for claim in CLAIMS if claim.paper == paper]
    yield Sheet("Further numbers", ("what", "value", "source", "status"), claims, "")
    for of_sweep in found.values():
        if of_sweep["paper"] == paper:
            for name, table in of_sweep["tables"].items():
                caption = f"{results.caption(table)} Runs {of_sweep['sweep']}/{name}/*; `{of_sweep['command']}`."
                title = f"{table['title']} (here, at a reduced size)"
                yield Sheet(title, tuple(results.columns(table)), results.rows(table), caption)


def _group(group: Group, found: Mapping[str, Any], hours: Mapping[str, str]) -> Sheet:
    rows = []
    for recipe in recipes():
        if any(fnmatch.fnmatch(recipe.name, pattern) for pattern in group.recipes):
            published = recipe.config.published
            value = "" if published.value is None else f"{published.value} {published.metric}"
            name = recipe.name.replace(".py", "").replace("/", "_").replace(":", "_")
            command = f"python -m experiments.train --config=configs/{recipe.name} --workdir=runs/{name}"
            estimate = hours.get(recipe.name, "not compiled")
            rows.append([recipe.name, value, published.source, "not run", f"`{command}`", estimate])
    there = [name for name in group.reduced if name in found]
    caption = f"At a reduced size: {', '.join(there)}, below." if there else "Nothing of it was run here."
    columns = ("recipe", "published", "source", "here", "to run it", "TPU-hours")
    return Sheet(group.title, columns, rows, caption)


def tpu_hours(folder: epath.Path) -> dict[str, str]:
    """By recipe, chips times hours and which chips, of the compile reports in a folder.

    Raises ConfigError for files that are none.
    """
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
            for stage, steps in zip(report["stages"], _steps(known[name]), strict=True):
                seconds += stage["seconds"] * steps * math.prod(stage["mesh"].values())
            found[name] = f"{seconds / 3600:,.0f} {report['stages'][0]['device']}"
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is no report of experiments.compile: {type(error).__name__} {error}.") from error
    return found


def _steps(config: Config) -> list[int]:
    """Of each stage of training."""
    dataset = load(config, files=False)
    train = dataset.splits["train"]
    steps_per_epoch = batches_per_epoch(train, config.batch_size, problem_of(config, dataset).groups(train))
    ends = [stage.end for stage in plan(config, dataset.resolution, steps_per_epoch)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


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
    console = Console()
    for paper, of_paper in paper_sheets.items():
        console.rule(PAPERS[paper])
        for sheet in of_paper:
            shown = [i for i, column in enumerate(sheet.columns) if column != "to run it"]
            caption = sheet.caption.replace("`", "")
            if len(shown) < len(sheet.columns):
                train = "python -m experiments.train --config=configs/RECIPE --workdir=runs/NAME"
                caption += f" To run one: {train}"
            table = Table(box=box.SIMPLE_HEAD, title=sheet.title, caption=caption, padding=(0, 1, 0, 0))
            for i in shown:
                table.add_column(sheet.columns[i], no_wrap=i == 0, justify="left")
            for row in sheet.rows:
                table.add_row(*(row[i] for i in shown))
            console.print(table)


def of_readme(found: Mapping[str, Any]) -> str:
    """What `--readme` puts between the markers: a line for each row of each sweep."""
    tables = [table for of_sweep in found.values() for table in of_sweep["tables"].values()]
    if not tables:
        return "No sweep has been run yet.\n"
    parts = []
    for table in tables:
        columns, rows = results.columns(table), results.rows(table)
        dataset = next(iter(table["rows"].values()))["dataset"]
        parts.append(f"**{table['title']}** ({dataset})\n\n{results.markdown(columns, rows)}")
    return "\n".join(parts)


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

    def command(argv: list[str]) -> None:
        papers = argv[1:] or [*PAPERS]
        if unknown := set(papers) - PAPERS.keys():
            fail(f"there are tables of {' and '.join(PAPERS)}, got {', '.join(sorted(unknown))}.", status=2)
        try:
            found = results.load(folder.value)
            hours = tpu_hours(epath.Path(folder.value) / "compile")
            paper_sheets = {paper: [*sheets(paper, found, hours)] for paper in PAPERS if paper in papers}
            if (readme := pages["readme"].value) is not None:
                write_file(epath.Path(readme), renewed(epath.Path(readme).read_text(), of_readme(found)))
        except (ConfigError, OSError) as error:
            fail(str(error), status=2)
        for name, make in {"markdown": markdown, "html": html}.items():
            if path := pages[name].value:
                write_file(epath.Path(path), make(paper_sheets))
        if not any(flag.value for flag in pages.values()):
            print_sheets(paper_sheets)

    app.run(command)


if __name__ == "__main__":
    main()
