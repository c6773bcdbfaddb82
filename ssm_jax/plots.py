"""Pictures of runs and of what was learned; each function returns a matplotlib figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#2f6db5", "#d9722e", "#8a8a8a"
matplotlib.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
)


def training_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy by step, from the rows of metrics.jsonl: training as lines, validation as dots."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ["loss", "accuracy"], strict=True):
        for split, style, color in [("train", "-", _BLUE), ("val", "o-", _ORANGE)]:
            points = [(row["step"], row[f"{split}/{name}"]) for row in rows if f"{split}/{name}" in row]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=split, markersize=3.5, linewidth=1.2)
        axes.set(xlabel="step", ylabel=name)
        if name == "loss":
            axes.set_yscale("log")
        axes.legend(frameon=False)
    return figure


def accuracy_by_resolution(accuracies: Mapping[int, float], *, trained_at: int) -> Figure:
    """Accuracy of one network on images of several resolutions, the one of training marked."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    resolutions = sorted(accuracies)
    percent = [100 * accuracies[r] for r in resolutions]
    axes.axvline(trained_at, color=_GREY, linestyle=":", linewidth=1.2, label="trained at")
    axes.plot(resolutions, percent, "o-", color=_BLUE)
    for resolution, value in zip(resolutions, percent, strict=True):
        axes.annotate(f"{value:.1f}", (resolution, value), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(resolutions, [f"{r} x {r}" for r in resolutions])
    axes.set(xlabel="resolution of the test images", ylabel="accuracy, %", ylim=(0, 108))
    axes.legend(frameon=False, loc="lower right")
    return figure


def kernel_sheet(kernels: np.ndarray, *, extent: float, title: str = "") -> Figure:
    """A sheet of 2-D kernels (n, size, size), lag 0 in the middle, each on its own scale (blue negative, red positive).

    `extent` is the largest lag, in samples of the base grid.
    """
    columns = min(8, len(kernels))
    rows = -(-len(kernels) // columns)
    figure = Figure(figsize=(1.15 * columns, 1.15 * rows + 0.8), layout="constrained")
    sheet = figure.subplots(rows, columns, squeeze=False)
    for axes in sheet.flat:
        axes.set_axis_off()
    for axes, kernel in zip(sheet.flat, kernels, strict=False):
        limit = np.abs(kernel).max() or 1.0
        axes.imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(-extent, extent, extent, -extent))
    figure.suptitle(title or f"kernels, lags -{extent:g} to {extent:g} samples", fontsize=10)
    return figure


def prediction_sheet(
    images: np.ndarray, labels: np.ndarray, predictions: np.ndarray, class_names: Sequence[str], *, title: str = ""
) -> Figure:
    """A sheet of images (n, H, W, 1 or 3) uint8 under their predicted class; wrong ones in orange with the true one."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.45 * rows + 0.3), layout="constrained")
    sheet = figure.subplots(rows, columns, squeeze=False)
    for axes in sheet.flat:
        axes.set_axis_off()
    for axes, image, label, prediction in zip(sheet.flat, images, labels, predictions, strict=False):
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        right = label == prediction
        text = class_names[prediction] if right else f"{class_names[prediction]} (is {class_names[label]})"
        axes.set_title(text, fontsize=8, color="black" if right else _ORANGE, fontweight="normal" if right else "bold")
    figure.suptitle(title, fontsize=10)
    return figure
