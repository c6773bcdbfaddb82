"""Pictures of kernels: over images and sequences, over frequencies, and what they make of a step."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ssm_jax.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, VIOLET, legend_below

_MARKERS = list(zip("os^D", [ORANGE, GREEN, VIOLET, BLACK], strict=True))


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
    curves = [("all modes", ORANGE, unlimited)] if unlimited else []
    curves.append(("kernel" if unlimited is None else "within the band limit", BLUE, kernels))
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
        axes.axvline(0.5 / rate, color=GREY, linestyle=":", label="Nyquist frequency of the grid")
        if edge is not None:
            axes.axvline(edge, color=BLACK, linestyle="--", linewidth=1, label="band limit")
        if modes is not None:
            _rug(axes, modes[features[row] % len(modes)], np.inf if edge is None else edge)
    for axes in panels[-1]:
        axes.set(xlabel="f, cycles per base sample", xlim=(-0.01 / rates[-1], 0.52 / rates[-1]))
    for rate, axes in zip(rates, panels[0], strict=True):
        axes.set_title(f"rate {rate:g}", fontsize=10)
    for axes, feature in zip(panels[:, 0], features, strict=True):
        axes.set_ylabel(f"feature {feature}, |K(f)|, dB")
    figure.align_ylabels()
    legend_below(figure, panels[0, 0])
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
    line = {"linestyle": "-", "color": BLUE, "linewidth": 1.3}
    dots = [{"linestyle": "", "marker": marker, "color": color, "markersize": 4} for marker, color in _MARKERS]
    for rate, style in zip(_rates(curves), itertools.chain([line], itertools.cycle(dots)), strict=False):
        for number, (x, y) in enumerate(curves[rate]):
            for axes, values in zip(panels, y, strict=True):
                axes.plot(x, values, **style, label="_" * (number > 0) + f"rate {rate:g}")
    for axes, feature in zip(panels, features, strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        axes.set_title(f"feature {feature}", fontsize=9, loc="left", pad=2)
        axes.set_ylabel(ylabel)
    panels[-1].set_xlabel(xlabel)
    figure.align_ylabels()
    legend_below(figure, panels[0])
    return figure


def _rug(axes: Axes, frequencies: np.ndarray, edge: float) -> None:
    """Ticks at the bottom, for the modes below the edge and, in another colour, for those that it drops."""
    for label, color, modes in [
        ("modes", BLUE, frequencies[frequencies < edge]),
        ("modes dropped", ORANGE, frequencies[frequencies >= edge]),
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
