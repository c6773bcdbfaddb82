"""Pictures of objects in images: boxes, classes and masks, as they are and as they were found."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ssm_jax.plots.style import BLACK

_GOLDEN = 0.6180339887498949
"""By which the hue goes on from class to class, so that all are apart and neighbours far apart."""

_INCHES = 3.2
"""Of an image, in width."""


class Drawn(NamedTuple):
    """Objects of one image."""

    boxes: np.ndarray
    """(n, 4): left, top, right, bottom in pixels."""
    classes: np.ndarray
    """(n,): numbers of classes."""
    scores: np.ndarray | None = None
    """(n,): of detections, from 0 to 1."""
    masks: np.ndarray | None = None
    """(n, H, W) bool."""


def detection_sheet(
    images: Sequence[np.ndarray],
    columns: Mapping[str, Sequence[Drawn]],
    class_names: Sequence[str],
    *,
    title: str = "",
    images_in_a_row: int = 2,
) -> Figure:
    """A sheet of images (H, W, 3) uint8 of any sizes, each once for all `columns`, such as the truth and detections.

    A class has the same colour everywhere. Larger objects are drawn first, so that small ones are seen.
    """
    across = min(images_in_a_row, len(images))
    rows = -(-len(images) // across)
    heights = [
        max(image.shape[0] / image.shape[1] for image in images[row * across : (row + 1) * across])
        for row in range(rows)
    ]
    figure = Figure(
        figsize=(_INCHES * across * len(columns), sum(_INCHES * height + 0.25 for height in heights) + 0.35),
        layout="constrained",
    )
    sheet = figure.subplots(rows, across * len(columns), squeeze=False, height_ratios=heights)
    for axes in sheet.flat:
        axes.set_axis_off()
    for i, image in enumerate(images):
        for j, (name, drawn) in enumerate(columns.items()):
            axes = sheet[i // across, i % across * len(columns) + j]
            draw_objects(axes, image, drawn[i], class_names)
            axes.set_title(name, fontsize=8, color=BLACK)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_objects(axes: Axes, image: np.ndarray, drawn: Drawn, class_names: Sequence[str]) -> None:
    """Draws an image (H, W, 3) uint8 and its objects: masks translucent, boxes, and labels at their upper left."""
    pixels = image.astype(np.float32) / 255
    sides = drawn.boxes[:, 2:] - drawn.boxes[:, :2]
    order = np.argsort(-sides.prod(-1), kind="stable")
    colors = {i: np.array(class_color(int(drawn.classes[i]))) for i in order}
    if drawn.masks is not None:
        for i in order:
            inside = drawn.masks[i]
            pixels[inside] = 0.5 * pixels[inside] + 0.5 * colors[i]
    axes.imshow(pixels, aspect="equal", interpolation="antialiased")
    height, width = image.shape[:2]
    for i in order:
        left, top, right, bottom = drawn.boxes[i]
        color = tuple(colors[i])
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.2))
        text = str(class_names[int(drawn.classes[i])])
        if drawn.scores is not None:
            text += f" {drawn.scores[i]:.2f}"
        axes.text(
            np.clip(left, 0, 0.97 * width),
            np.clip(top, 0.04 * height, height),
            text,
            fontsize=5.5,
            color="white",
            ha="left" if left < 0.75 * width else "right",
            va="bottom",
            clip_on=True,
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def class_color(number: int) -> tuple[float, float, float]:
    """Red, green and blue from 0 to 1; dark enough for white text."""
    return colorsys.hsv_to_rgb((number * _GOLDEN) % 1.0, 0.85, (0.85, 0.65)[number % 2])
