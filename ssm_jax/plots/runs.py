"""Pictures of runs: curves, accuracies, images and what was predicted of them."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssm_jax.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, legend_below
from ssm_jax.training.scores import is_detail

Rows = Sequence[Mapping[str, Any]]
"""Those of metrics.jsonl."""

_POINTS = 1000
"""Of a line, at most; where there are more, neighbours are averaged."""

_COURSE = {
    "learning rate": ["train/lr"],
    "images per second": ["images_per_second"],
    "MFU, share of the devices' peak": ["mfu"],
    "share of time spent waiting for input": ["input_wait"],
    "norms": ["train/grad_norm", "train/param_norm"],
    "memory of a device, bytes": ["memory_bytes", "memory_peak_bytes"],
}
"""What else the rows of training tell."""


def score_title(name: str) -> str:
    """What people call a score."""
    titles = {"mean_average_precision": "mAP", "top5_accuracy": "top-5 accuracy"}
    return titles.get(name, name.replace("_", " "))


def training_curves(rows: Rows) -> Figure:
    """Loss, accuracy and whatever else is scored, by step: training as lines, validation as dots.

    Averaged parameters, whose scores begin with `ema_`, have dots of their own.
    """
    names = _scores(rows)
    columns = min(len(names), 4)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, name in itertools.zip_longest(panels, names):
        if name is None:
            axes.remove()
            continue
        _draw_score(axes, rows, name)
        axes.legend(frameon=False)
    return figure


def curves(rows: Rows) -> dict[str, Figure]:
    """A small figure for each thing that the rows of a run tell, by its title: the scores, and how training went."""
    figures = {}

    def panel(title: str) -> Axes:
        figures[title] = Figure(figsize=(4.5, 2.9), layout="constrained")
        return figures[title].subplots()

    for name in _scores(rows):
        _draw_score(panel(score_title(name)), rows, name)
    for title, names in _COURSE.items():
        lines = {name: points for name in names if (points := _points(rows, name))}
        if lines:
            axes = panel(title)
            for (name, points), color in zip(lines.items(), (BLUE, ORANGE), strict=False):
                label = name.removeprefix("train/").replace("_", " ") if len(names) > 1 else None
                axes.plot(*points, color=color, linewidth=1.2, label=label)
            axes.set(xlabel="step", yscale="log" if title == "norms" else "linear")
            if title != "norms":
                axes.set_ylim(bottom=0)
    kinds = dict.fromkeys(key.split("/")[1] for row in rows for key in row if key.startswith("ssm/"))
    for kind, (quantity, title) in itertools.product(kinds, {"dt": "dt", "A": "|A|"}.items()):
        low, mean, high = (_points(rows, f"ssm/{kind}/{quantity}_{which}") for which in ("min", "mean", "max"))
        axes = panel(f"{title} of {kind}")
        axes.fill_between(low[0], low[1], high[1], color=BLUE, alpha=0.18, linewidth=0, label="least to greatest")
        axes.plot(*mean, "o-", color=BLUE, markersize=3.5, linewidth=1.2, label="geometric mean")
        axes.set(xlabel="step", yscale="log")
    for figure in figures.values():
        if figure.axes[0].get_legend_handles_labels()[1]:
            legend_below(figure, figure.axes[0])
    return figures


def _scores(rows: Rows) -> list[str]:
    """Names of what training and validation are scored by, loss and accuracy first, but for details."""
    keys = dict.fromkeys(key for row in rows for key in row)
    known = (name for name in ("loss", "accuracy") if f"train/{name}" in keys)
    found = (key.removeprefix("val/").removeprefix("ema_") for key in keys if key.startswith("val/"))
    return [name for name in dict.fromkeys([*known, *found]) if not is_detail(name)]


def _draw_score(axes: Axes, rows: Rows, name: str) -> None:
    for label, key, style, color in [
        ("train", f"train/{name}", "-", BLUE),
        ("val", f"val/{name}", "o-", ORANGE),
        ("val, averaged", f"val/ema_{name}", "s-", GREEN),
    ]:
        if points := _points(rows, key):
            axes.plot(*points, style, color=color, label=label, markersize=3.5, linewidth=1.2)
    axes.set(xlabel="step", ylabel=score_title(name))
    if name == "loss":
        axes.set_yscale("log")


def _points(rows: Rows, key: str) -> list[np.ndarray]:
    """Steps and values of the rows that have `key`, both (n,), or nothing."""
    points = np.array([(row["step"], row[key]) for row in rows if key in row], float)
    if not len(points):
        return []
    pieces = np.array_split(points, min(len(points), _POINTS))
    return list(np.array([piece.mean(0) for piece in pieces]).T)


def accuracy_by_resolution(accuracies: Mapping[int, float], *, trained_at: int, name: str = "accuracy") -> Figure:
    """Accuracy of one network on images of several resolutions, the one of training marked; or the score `name`."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    resolutions = sorted(accuracies)
    percent = [100 * accuracies[r] for r in resolutions]
    axes.axvline(trained_at, color=GREY, linestyle=":", linewidth=1.2, label="trained at")
    axes.plot(resolutions, percent, "o-", color=BLUE)
    for resolution, value in zip(resolutions, percent, strict=True):
        axes.annotate(f"{value:.1f}", (resolution, value), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(resolutions, [f"{r} x {r}" for r in resolutions])
    axes.set(xlabel="resolution of the test images", ylabel=f"{score_title(name)}, %", ylim=(0, 108))
    axes.legend(frameon=False, loc="lower right")
    return figure


def score_panels(panels: Sequence[tuple[str, str, Mapping[str, Mapping[int, Sequence[float]]]]]) -> Figure:
    """Shares of 1, a panel for each (title, by, scores of runs), these by label and by `resolution` or `frames`.

    Of several resolutions there is a line through the means, with standard deviations as error bars; of one, dots for
    the runs of each label and a mark at their mean.
    """
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    tallest = max(len(labels) for *_, labels in panels)
    figure = Figure(figsize=(5.2 * columns, max(3.6, 1.2 + 0.3 * tallest) * lines), layout="constrained")
    sheet = figure.subplots(lines, columns, squeeze=False)
    for axes in sheet.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, by, labels) in zip(sheet.flat, panels, strict=False):
        tested = sorted({place for runs in labels.values() for place in runs})
        if len(tested) > 1:
            _lines(axes, labels)
            axes.set_xticks(tested, [str(place) if by == "frames" else f"{place} x {place}" for place in tested])
            axes.set_xlabel("frames of the test clips" if by == "frames" else "resolution of the test images")
        else:
            _dots(axes, labels)
        axes.set_title(title, fontsize=9)
    return figure


def _lines(axes: Axes, labels: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
    for i, (label, runs) in enumerate(labels.items()):
        if runs:
            means = [100 * float(np.mean(values)) for values in runs.values()]
            spread = [100 * float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in runs.values()]
            # A little to the side of each other, or error bars hide each other: a twelfth of an octave in all.
            aside = (i - (len(labels) - 1) / 2) / max(len(labels) - 1, 1) / 12
            places = [place * 2**aside for place in runs]
            axes.errorbar(places, means, spread, fmt="o-", color=f"C{i}", capsize=3, markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set(ylabel="test score, %, with standard deviation", ylim=(0, None))
    axes.legend(frameon=False, fontsize=7)


def _dots(axes: Axes, labels: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
    for place, runs in enumerate(labels.values()):
        dots = [100 * value for values in runs.values() for value in values]
        axes.plot(dots, [place] * len(dots), "o", color=BLUE, alpha=0.6, markersize=5)
        if dots:
            axes.plot([float(np.mean(dots))] * 2, [place - 0.3, place + 0.3], color=ORANGE, linewidth=2)
    axes.set_yticks(range(len(labels)), list(labels))
    axes.set(xlabel="test score of each run and their mean, %", ylim=(len(labels) - 0.5, -0.5))


def image_sheet(
    images: np.ndarray, texts: Sequence[str], *, title: str = "", columns: int = 8, inches: float = 1.25
) -> Figure:
    """A sheet of images (n, H, W, 1 or 3) uint8 under their texts."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(inches * columns, (inches + 0.35) * rows + 0.3), layout="constrained")
    sheet = figure.subplots(rows, columns, squeeze=False)
    for axes in sheet.flat:
        axes.set_axis_off()
    for axes, image, text in zip(sheet.flat, images, texts, strict=False):
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(textwrap.fill(text, int(13 * inches), break_long_words=False), fontsize=8, color=BLACK)
    figure.suptitle(title, fontsize=10)
    return figure


def prediction_sheet(
    images: np.ndarray, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], *, title: str = ""
) -> Figure:
    """A sheet of images (n, H, W, 1 or 3) uint8 under their predicted class; wrong ones in orange with the true one."""
    wrong = labels != predictions
    names = [str(class_names[prediction]) for prediction in predictions]
    texts = [
        f"{name} (is {class_names[label]})" if bad else name
        for name, label, bad in zip(names, labels, wrong, strict=True)
    ]
    figure = image_sheet(images, texts, title=title)
    for axes in [axes for axes, bad in zip(figure.axes, wrong, strict=False) if bad]:
        axes.title.set(color=ORANGE, fontweight="bold")
    return figure
