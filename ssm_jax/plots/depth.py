"""Pictures of what state space models along the depth of a network remember, see `ssm_jax.analysis`."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ssm_jax.plots.style import BLACK, BLUE, GREY, ORANGE, legend_below


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
            axes.fill_between(ends, *band, color=BLUE, alpha=0.18, linewidth=0, label=f"{label}10 to 90 %")
            axes.plot(x, middle, "o-", color=BLUE, markersize=3.5, linewidth=1.2, label=f"{label}median")
            axes.plot(x, [layer.mean() for layer in layers], "D", color=ORANGE, markersize=4, label=f"{label}mean")
            last = int(x[-1])
            if number < len(stages) - 1:
                axes.axvline(last + 0.5, color=GREY, linestyle=":", linewidth=1.2)
        axes.set(xlabel="layer", ylabel=name, yscale="log", xlim=(0.5, last + 0.5))
        axes.margins(y=0.08)
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, panels[0])
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
                color = "white" if value > 60 else BLACK
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
