"""report.html: a run on one page that needs nothing else, made of what is in its directory; no device is touched."""

import base64
import datetime
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
from etils import epath
from matplotlib.figure import Figure

from configs.common import classification
from experiments.config import flatten, write_file
from ssm_jax import plots
from ssm_jax.training.metrics import read_metrics

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; --accent: #2f6db5; }
@media (prefers-color-scheme: dark) { :root { --quiet: #999; --accent: #79aee8; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1rem 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
.outcome { font-size: 1.1rem; color: var(--accent); margin: 0; }
.quiet, caption { color: var(--quiet); }
caption { text-align: left; caption-side: bottom; font-size: .9rem; padding-top: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; white-space: nowrap; }
th, td { padding: .15rem 1.2rem .15rem 0; border-bottom: 1px solid var(--line); }
th.number, td.number { text-align: right; }
td + td:not(.number) { white-space: normal; min-width: 6rem; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: 4px; }
@media (prefers-color-scheme: dark) { .curve { filter: invert(.9) hue-rotate(180deg); } }
figcaption { font-size: .9rem; color: var(--quiet); margin: .8rem 0 .2rem; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.3; }
summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
"""


def write(workdir: epath.PathLike) -> epath.Path:
    """Writes the page of a run, whether finished, stopped or still going; returns its path."""
    path = epath.Path(workdir) / "report.html"
    write_file(path, page(workdir))
    return path


def page(workdir: epath.PathLike) -> str:
    """The page, from config.json, run.json and, as far as they are there, metrics, results and pictures."""
    workdir = epath.Path(workdir)
    config, run = _read(workdir / "config.json"), _read(workdir / "run.json")
    results = _read(workdir / "results.json") if (workdir / "results.json").exists() else {}
    rows = read_metrics(workdir)
    title = f"{config['model']['name']} on {run['dataset']['title']}, {run['size']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="outcome">{escape(_outcome(run, rows, results))}</p>',
        f'<p class="quiet">{escape(_numbers(config, run))}</p>',
        _section("Scores", _scores(config, run, rows, results)),
        _section("Curves", _curves(rows)),
        _section("Pictures", _pictures(workdir / "pictures")),
        _section("Config", _config(config)),
        _section("Parameters", _parameters(run)),
        _section("Starts", _starts(run["starts"])),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _read(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _outcome(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> str:
    """One line: the score of a finished run, or how far another one is."""
    name = run["best_by"].removeprefix("val/")
    start = run["starts"][-1]
    if results:
        score = results["test"][str(run["resolution"])][name]
        return (
            f"Finished: {score:.2%} {plots.score_title(name)} on {run['dataset']['test']:,} test images, at the best "
            f"checkpoint by {run['best_by']}, step {results['step']:,}."
        )
    step, total = max((row["step"] for row in rows), default=0), run["total_steps"]
    so_far = f"Step {step:,} of {total:,} ({step / total:.0%})"
    scored = [row[run["best_by"]] for row in rows if run["best_by"] in row]
    best = f", best {run['best_by']} so far {max(scored):.2%}" if scored else ""
    return f"{so_far}{best}; {start.get('outcome', 'it is running, or was killed').removesuffix('.')}."


def _numbers(config: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    data = run["dataset"]
    images = ", ".join(f"{data[split]:,} for {split}" for split in ("train", "val", "test"))
    return (
        f"{run['parameters']:,} parameters; {run['total_steps']:,} steps of {config['batch_size']:,} images in "
        f"{config['epochs']:g} epochs; images: {images}, of {data['classes']:,} classes."
    )


def _scores(
    config: Mapping[str, Any], run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any]
) -> str:
    """The table of test scores, or of the last validation where there are none."""
    if results:
        sizes = {str(run["resolution"]): run["size"]}
        tables = {sizes.get(key, f"{key} x {key}"): score for key, score in results["test"].items()}
        caption = "On the test images, by their resolution; averaged: with averaged parameters."
    else:
        scored = [row for row in rows if run["best_by"] in row]
        if not scored:
            return ""
        last = {name.removeprefix("val/"): value for name, value in scored[-1].items() if name.startswith("val/")}
        tables = {f"step {scored[-1]['step']:,}": last}
        caption = "On the validation images."
    names = [name for name in next(iter(tables.values())) if not name.startswith("ema_")]
    names.sort(key=lambda name: not name.endswith("loss"))
    lines = []
    for label, score in tables.items():
        for prefix, of in {"": "", "ema_": ", averaged"}.items():
            if f"{prefix}loss" in score:
                lines.append([label + of, *(_score(name, score[prefix + name]) for name in names)])
    table = _table(["", *map(plots.score_title, names)], lines, numbers=range(1, len(names) + 1), caption=caption)
    published = config["published"]
    if published["value"] is not None:
        table += (
            f"<p>Published by others for this recipe, no result of this run: {published['value']} % "
            f"{escape(published['metric'])} ({escape(published['source'])}).</p>"
        )
    return table


def _score(name: str, value: float) -> str:
    return f"{value:.4f}" if name.endswith("loss") else f"{value:.2%}"


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    figures = [
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<img class="curve" src="{_svg(figure)}" alt="{escape(title)}"></figure>'
        for title, figure in plots.curves(rows).items()
    ]
    return '<div class="grid">\n' + "\n".join(figures) + "\n</div>" if figures else ""


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ssm_jax"}):  # the same names within, and so the same page, each time
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _pictures(folder: epath.Path) -> str:
    """All but the training curves, which are there already."""
    figures = []
    for path in sorted(folder.glob("*.png")) if folder.exists() else []:
        if path.stem != "training_curves":
            png, title = path.read_bytes(), escape(path.stem.replace("_", " "))
            width = int.from_bytes(png[16:20]) * 2 // 3  # pixels of a picture at 150 dpi, and of a page at 100
            source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
            image = f'<img src="{source}" width="{width}" alt="{title}">'
            figures.append(f"<figure><figcaption>{title}</figcaption>{image}</figure>")
    return "\n".join(figures)


def _config(config: Mapping[str, Any]) -> str:
    fields = flatten(config)
    defaults = flatten(json.loads(json.dumps(classification.get_config().to_dict())))
    values = [[f"config.{name}", json.dumps(value), json.dumps(defaults.get(name))] for name, value in fields.items()]
    changed = [
        [*row[:2], row[2] if name in defaults else ""]
        for (name, value), row in zip(fields.items(), values, strict=True)
        if name not in defaults or defaults[name] != value
    ]
    return _table(["field", "value", "default"], changed) + _folded(
        f"all {len(fields)} fields", _table(["field", "value"], [row[:2] for row in values])
    )


def _parameters(run: Mapping[str, Any]) -> str:
    groups = [[group, f"{size:,}"] for group, size in run["groups"].items()]
    caption = "Groups of the optimizer, each with a learning rate and a weight decay of its own."
    table = _table(["group", "parameters"], groups, numbers=[1], caption=caption)
    return table + _folded("where the state lies", f"<pre>{escape(run['sharding'])}</pre>")


def _starts(starts: Sequence[Mapping[str, Any]]) -> str:
    """The last one, and the others folded."""
    tables = [_start(start) for start in starts]
    earlier = _folded(f"{len(tables) - 1} earlier", "<hr>".join(tables[:-1])) if len(tables) > 1 else ""
    return tables[-1] + earlier


def _start(start: Mapping[str, Any]) -> str:
    lines = [["started", start["start"]], ["command", start["command"]]]
    if "end" in start:
        begin, end = (datetime.datetime.fromisoformat(start[name]) for name in ("start", "end"))
        lines.insert(1, ["ended", f"{start['end']}, after {end - begin}: {start['outcome']}"])
    lines += [
        ["commit", start["commit"] or "not in a git checkout"],
        ["devices", f"{start['devices']} x {start['device']}"],
        ["processes", str(start["processes"])],
        ["platform", start["platform"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in start["versions"].items())],
    ]
    return _table([], lines)


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = (), caption: str = ""
) -> str:
    right = set(numbers)

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if i in right else "" for i in range(len(cells)))
        inner = (f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    lines = [line(columns, "th")] if columns else []
    lines += [line(row, "td") for row in rows]
    under = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{under}\n' + "\n".join(lines) + "\n</table></div>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{content}\n</details>"
