"""What all pictures share."""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VIOLET, GREY, BLACK = "#2f6db5", "#d9722e", "#2a8c62", "#8a55b0", "#8a8a8a", "#222222"

matplotlib.rcParams.update(
    {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
)


def legend_below(figure: Figure, axes: Axes) -> None:
    """The legend of these axes under the whole figure."""
    handles, labels = axes.get_legend_handles_labels()
    columns = len(labels) if len(labels) < 5 else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
