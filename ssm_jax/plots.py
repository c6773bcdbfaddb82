"""Pictures of runs and of what was learned; each function returns a matplotlib figure."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

_BLUE, _ORANGE, _GREY, _BLACK = "#2f6db5", "#d9722e", "#8a8a8a", "#222222"
_MARKERS = list(zip("os^D", [_ORANGE, "#2a8c62", "#8a55b0", _BLACK], strict=True))
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


def outer_products(rows: ArrayLike, columns: ArrayLike) -> np.ndarray:
    """The 2-D kernels of a layer from those of its two axes, for `kernel_sheet`.

    ```python
    kernels = plots.outer_products(*layer.sample_kernels((64, 64), rate=1 / 8))
    plots.kernel_sheet(kernels[:32], extent=8)
    ```

    Args:
        rows: (directions, trank, channels, d_model, length), the lags of the first axis, see `S4ND.sample_kernels`.
        columns: likewise of the second axis.

    Returns:
        (channels * d_model, 2 length, 2 length), the mean of `trank` outer products, lag 0 at [length, length].
    """
    rows, columns = _two_sided(_checked(rows)), _two_sided(_checked(columns))
    return np.einsum("rki,rkj->kij", rows, columns) / len(rows)


def kernel_lines(kernels: Mapping[float | int, ArrayLike], *, features: Sequence[int] = (0, 1, 2, 3)) -> Figure:
    """1-D kernels over continuous lag, a panel for each feature: at the finest rate a line, at the others dots.

    ```python
    kernels = {rate: layer.sample_kernels((round(16 / rate),), rate=rate)[0] for rate in (1 / 16, 1, 2)}
    plots.kernel_lines(kernels)
    ```

    Sampling at rate r integrates the continuous kernel over steps of r samples of the base grid: lag j, -1 being the
    first of the second direction, over those from j r to (j + 1) r. Each sample is divided by r and drawn in the middle
    of its step. Dots are off the line where the kernel changes too fast for their grid. (So for `zoh`; `bilinear` is
    the same to second order in the step.)

    Args:
        kernels: by rate, the kernels of one axis, (directions, trank, channels, d_model, length), see
            `S4ND.sample_kernels`. The mean over `trank` is shown.
        features: which are shown, `channel * d_model + head`, the order in which the layer has them.

    Raises:
        ValueError: for kernels of another shape, no kernels at all, or a feature that is not there.
    """
    curves = {}
    for rate, kernel in kernels.items():
        sides = _select(kernel, features) / rate
        lags = rate * (np.arange(sides.shape[-1]) + 0.5)
        curves[rate] = [(sign * lags, side) for sign, side in zip((1, -1), sides, strict=False)]
    return _over_lag(curves, features, xlabel="lag, samples of the base grid", ylabel="kernel")


def step_responses(kernels: Mapping[float | int, ArrayLike], *, features: Sequence[int] = (0, 1, 2, 3)) -> Figure:
    """Running sums of the causal kernels, the first direction: what comes out when the input goes from 0 to 1.

    Arguments, errors and panels as for `kernel_lines`. The sum of samples 0 .. l at rate r is drawn at the end of the
    last one's step, (l + 1) r samples of the base grid after the input's. With `zoh` all rates have the same
    response, up to rounding: a constant input is what it takes every input for during a step.
    """
    curves = {}
    for rate, kernel in kernels.items():
        causal = _select(kernel, features)[0]
        curves[rate] = [(rate * (np.arange(causal.shape[-1]) + 1), causal.cumsum(-1))]
    return _over_lag(curves, features, xlabel="time since the step, samples of the base grid", ylabel="step response")


def spectra(
    kernels: Mapping[float | int, ArrayLike],
    unlimited: Mapping[float | int, ArrayLike] | None = None,
    *,
    bandlimit: float | None = None,
    bandlimit_grid: str = "base",
    frequencies: ArrayLike | None = None,
    features: Sequence[int] = (0, 1),
) -> Figure:
    """Magnitude |K(f)| of 1-D kernels, 20 log10 |K| in dB: a row for each feature and a column for each rate.

    ```python
    free = nnx.clone(layer.kernels[0])
    free.bandlimit = None
    A, _, _, dt = free.continuous()
    kernels, unlimited = ({r: axis(round(256 / r), rate=r) for r in (2, 1, 0.5)} for axis in (layer.kernels[0], free))
    plots.spectra(kernels, unlimited, bandlimit=0.2, frequencies=dt * abs(A.imag) / (2 * np.pi))
    ```

    Frequencies are in cycles per sample of the base grid, up to the Nyquist frequency of each grid, 0.5 / rate.
    K(f) = sum_j kernel[j] exp(-2 pi i f rate j) over all lags j, so that K(0) is the kernel's sum.
    Where a kernel is cut off before it has died away, its spectrum ripples. With `zoh` a mode above the Nyquist
    frequency is folded back from it; `bilinear` bends the axis instead, from f to atan(pi f rate) / (pi rate).

    Args:
        kernels: by rate, the kernels of one axis, as for `kernel_lines`.
        unlimited: the same ones without a band limit, shown behind them.
        bandlimit: fraction of a Nyquist frequency, marked by a line.
        bandlimit_grid: whose Nyquist frequency that is, `base` or `current`, as in `S4DKernel`.
        frequencies: of the modes, (d_model, modes), dt |Im A| / 2 pi at rate 1; ticks at the bottom, orange if the
            band limit drops them. Those above the finest grid's Nyquist frequency are out of the picture.
        features: which are shown, `channel * d_model + head`.

    Raises:
        ValueError: as for `kernel_lines`, for another `bandlimit_grid`, or for `unlimited` at other rates.
    """
    if bandlimit_grid not in ("base", "current"):
        raise ValueError(f"bandlimit_grid must be 'base' or 'current', got {bandlimit_grid!r}.")
    if unlimited is not None and unlimited.keys() != kernels.keys():
        raise ValueError(f"unlimited must have the rates of kernels, {[*kernels]}, got {[*unlimited]}.")
    curves = [("all modes", _ORANGE, unlimited)] if unlimited else []
    curves.append(("kernel" if unlimited is None else "within the band limit", _BLUE, kernels))
    rates = _rates(kernels)[::-1]
    levels = [[_spectrum(_select(by_rate[rate], features), rate) for _, _, by_rate in curves] for rate in rates]
    modes = None if frequencies is None else np.asarray(frequencies)
    figure = Figure(figsize=(3.2 * max(len(rates), 2), 2.1 * len(features) + 0.9), layout="constrained")
    panels = figure.subplots(len(features), len(rates), squeeze=False, sharex=True, sharey="row")
    for (row, column), axes in np.ndenumerate(panels):
        rate = rates[column]
        edge = None if bandlimit is None else 0.5 * bandlimit / (rate if bandlimit_grid == "current" else 1)
        for (label, color, _), (f, level) in zip(curves, levels[column], strict=True):
            axes.plot(f, level[row], color=color, linewidth=1.3, label=label)
        axes.margins(y=0.12)  # the ticks' place
        axes.axvline(0.5 / rate, color=_GREY, linestyle=":", label="Nyquist frequency of the grid")
        if edge is not None:
            axes.axvline(edge, color=_BLACK, linestyle="--", linewidth=1, label="band limit")
        if modes is not None:
            _rug(axes, modes[features[row] % len(modes)], np.inf if edge is None else edge)
    for axes in panels[-1]:
        axes.set(xlabel="f, cycles per base sample", xlim=(-0.01 / rates[-1], 0.52 / rates[-1]))
    for rate, axes in zip(rates, panels[0], strict=True):
        axes.set_title(f"rate {rate:g}", fontsize=10)
    for axes, feature in zip(panels[:, 0], features, strict=True):
        axes.set_ylabel(f"feature {feature}, |K(f)|, dB")
    figure.align_ylabels()
    _legend_below(figure, panels[0, 0])
    return figure


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
        axes.set_title(textwrap.fill(text, int(13 * inches), break_long_words=False), fontsize=8, color=_BLACK)
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
        axes.title.set(color=_ORANGE, fontweight="bold")
    return figure


def by_layer(values: Mapping[str, Sequence[ArrayLike]]) -> Figure:
    """A panel for each name with what all elements of a layer have, layer after layer, on a logarithmic scale.

    ```python
    values = {"Delta": analysis.deltas(model, records), "memory, layers": analysis.memories(model, records)}
    plots.by_layer(values)
    ```

    Args:
        values: by name, for each stage (layers, ...), positive.
    """
    figure = Figure(figsize=(4.5 * len(values), 3.2), layout="constrained")
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, (name, stages) in zip(panels, values.items(), strict=True):
        last = 0
        for number, stage in enumerate(stages):
            layers = [np.asarray(layer, float).ravel() for layer in np.asarray(stage)]
            x = last + 1 + np.arange(len(layers))
            # The ends of the band lie half a layer out, so that a stage of one layer is seen.
            ends = np.array([x[0] - 0.4, *x, x[-1] + 0.4])
            low, middle, high = np.quantile(layers, [0.1, 0.5, 0.9], axis=1)
            label = "_" * (number > 0)
            band = [np.pad(edge, 1, mode="edge") for edge in (low, high)]
            axes.fill_between(ends, *band, color=_BLUE, alpha=0.18, linewidth=0, label=f"{label}10 to 90 %")
            axes.plot(x, middle, "o-", color=_BLUE, markersize=3.5, linewidth=1.2, label=f"{label}median")
            axes.plot(x, [layer.mean() for layer in layers], "D", color=_ORANGE, markersize=4, label=f"{label}mean")
            last = int(x[-1])
            if number < len(stages) - 1:
                axes.axvline(last + 0.5, color=_GREY, linestyle=":", linewidth=1.2)
        axes.set(xlabel="layer", ylabel=name, yscale="log", xlim=(0.5, last + 0.5))
        axes.margins(y=0.08)
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend_below(figure, panels[0])
    return figure


def contributions(stages: Sequence[ArrayLike]) -> Figure:
    """Where the state after each layer of a stage comes from, in percent of its row, a panel for each stage.

    Args:
        stages: for each stage (layers, 1 + layers), see `analysis.contributions`.
    """
    counts = [len(np.asarray(stage)) for stage in stages]
    side = 0.5 * max(counts) + 1.2
    figure = Figure(figsize=(side * len(counts) + 0.8, side), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    first, image = 1, None
    for number, (axes, stage, count) in enumerate(zip(panels, stages, counts, strict=True), start=1):
        rows = np.asarray(stage, float)
        totals = rows.sum(1, keepdims=True)
        percent = 100 * rows / np.where(totals > 0, totals, 1)
        later = np.triu(np.ones((count, count + 1), bool), 2)  # than the state
        image = axes.imshow(np.ma.masked_where(later, percent), cmap="Blues", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(percent):
            if not later[row, column] and count <= 12:
                color = "white" if value > 60 else _BLACK
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        layers = range(first, first + count)
        every = 1 if count <= 12 else 5
        axes.set_xticks(range(0, count + 1, every), ["before", *layers][::every], rotation=90)
        axes.set_yticks(range(0, count, every), layers[::every])
        axes.set_title(f"stage {number}", fontsize=10)
        axes.set_xlabel("came in at layer")
        axes.grid(visible=False)
        first += count
    panels[0].set_ylabel("state after layer")
    figure.colorbar(image, ax=panels, label="%", shrink=0.8)  # pyright: ignore[reportArgumentType]
    return figure


def read_maps(images: np.ndarray, stages: Sequence[Sequence[ArrayLike]]) -> Figure:
    """Images (n, H, W, 1 or 3) uint8, a row each, and beside them what each position of each layer reads of the state.

    Args:
        images: as they were before normalisation.
        stages: for each stage and layer (n, h, w), between 0 and 1, see `analysis.Record.reads`.
    """
    layers = [np.asarray(layer, float) for stage in stages for layer in stage]
    columns = 1 + len(layers)
    figure = Figure(figsize=(1.0 * columns + 1.0, 1.05 * len(images) + 0.4), layout="constrained")
    sheet = figure.subplots(len(images), columns, squeeze=False)
    limit = max(layer.max() for layer in layers) or 1.0
    shown = None
    for row, image in zip(sheet, images, strict=True):
        row[0].imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    for number, layer in enumerate(layers, start=1):
        for axes, reads in zip(sheet[:, number], layer, strict=True):
            shown = axes.imshow(reads, cmap="viridis", vmin=0, vmax=limit)
        sheet[0, number].set_title("layer 1" if number == 1 else str(number), fontsize=9)
    sheet[0, 0].set_title("image", fontsize=9)
    for axes in sheet.flat:
        axes.set_axis_off()
    figure.colorbar(shown, ax=sheet, label="read of the state, r / (r + s)", shrink=0.9)  # pyright: ignore[reportArgumentType]
    return figure


def _checked(kernels: ArrayLike) -> np.ndarray:
    """Kernels as an array with one axis for channels and heads: (directions, trank, channels * d_model, length)."""
    array = np.asarray(kernels)
    if array.ndim != 5 or array.shape[0] not in (1, 2):
        raise ValueError(
            f"kernels must be (1 or 2 directions, trank, channels, d_model, length), got shape {array.shape}."
        )
    return array.reshape(*array.shape[:2], -1, array.shape[-1])


def _two_sided(kernels: np.ndarray) -> np.ndarray:
    """Joins (directions, ..., length) to (..., 2 length), from the most negative lag to the most positive."""
    forward, backward = kernels[0], kernels[1] if len(kernels) == 2 else np.zeros_like(kernels[0])
    return np.concatenate([backward[..., ::-1], forward], axis=-1)


def _select(kernels: ArrayLike, features: Sequence[int]) -> np.ndarray:
    """The mean over the tensor rank of the kernels of some features, (directions, features, length)."""
    mean = _checked(kernels).mean(1)
    if not features or not all(0 <= feature < mean.shape[1] for feature in features):
        raise ValueError(f"features must be one or more of 0 .. {mean.shape[1] - 1}, got {features}.")
    return mean[:, list(features)]


def _spectrum(kernels: np.ndarray, rate: float | int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in cycles per sample of the base grid, (points,), and |K(f)| in dB, (features, points)."""
    kernel = _two_sided(kernels)
    points = 8 * kernel.shape[-1]  # smooth to the eye: 8 points for each one that the samples determine
    with np.errstate(divide="ignore"):  # a kernel without modes is not drawn
        return np.fft.rfftfreq(points, rate), 20 * np.log10(np.abs(np.fft.rfft(kernel, points)))


def _rates(by_rate: Mapping[float | int, Any]) -> list[float | int]:
    """The rates, from the finest grid to the coarsest."""
    if not by_rate:
        raise ValueError("kernels must have at least one rate, got none.")
    return sorted(by_rate)


def _over_lag(
    curves: Mapping[float | int, Sequence[tuple[np.ndarray, np.ndarray]]],
    features: Sequence[int],
    *,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """A panel for each feature with each rate's curves of x (points,) and y (features, points)."""
    figure = Figure(figsize=(8, 1.5 * len(features) + 1), layout="constrained")
    panels = figure.subplots(len(features), squeeze=False, sharex=True)[:, 0]
    line = {"linestyle": "-", "color": _BLUE, "linewidth": 1.3}
    dots = [{"linestyle": "", "marker": marker, "color": color, "markersize": 4} for marker, color in _MARKERS]
    for rate, style in zip(_rates(curves), itertools.chain([line], itertools.cycle(dots)), strict=False):
        for number, (x, y) in enumerate(curves[rate]):
            for axes, values in zip(panels, y, strict=True):
                axes.plot(x, values, **style, label="_" * (number > 0) + f"rate {rate:g}")
    for axes, feature in zip(panels, features, strict=True):
        axes.axhline(0, color=_GREY, linewidth=0.8, zorder=1)
        axes.set_title(f"feature {feature}", fontsize=9, loc="left", pad=2)
        axes.set_ylabel(ylabel)
    panels[-1].set_xlabel(xlabel)
    figure.align_ylabels()
    _legend_below(figure, panels[0])
    return figure


def _rug(axes: Axes, frequencies: np.ndarray, edge: float) -> None:
    """Ticks at the bottom, for the modes below the edge and, in another colour, for those that it drops."""
    for label, color, modes in [
        ("modes", _BLUE, frequencies[frequencies < edge]),
        ("modes dropped", _ORANGE, frequencies[frequencies >= edge]),
    ]:
        if modes.size:
            where = axes.get_xaxis_transform()
            axes.plot(
                modes,
                0.03 + 0 * modes,
                "|",
                color=color,
                markersize=9,
                markeredgewidth=1.5,
                label=label,
                transform=where,
            )


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if len(labels) < 5 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
