"""Pictures of objects in images: boxes, classes and masks, as they are and as they were found."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath

from ssm_jax.plots.style import BLACK

_WIDTH, _GAP, _TITLE = 12.8, 0.06, 0.24
"""Of a sheet, between images, and of a line of text, in inches."""

_FONT_SIZE, _PAD = 6.5, 1.0
"""Of labels, and around their text, in points."""

_HALO = [withStroke(linewidth=2.4, foreground="black", alpha=0.5)]
"""So that a line is seen on a background of its own color."""

_COLORS = 100
"""After as many classes they begin anew."""


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

    Images of a row have one height and fill its width. A class has the same color everywhere. Larger objects are drawn
    first, so that small ones are seen; of the labels, those of the highest scores come first, and what would hide
    another one is left out.
    """
    rows = [range(len(images))[i : i + images_in_a_row] for i in range(0, len(images), images_in_a_row)]
    aspects = [image.shape[1] / image.shape[0] for image in images]
    widths = [len(columns) * sum(aspects[i] for i in row) for row in rows]  # at height 1
    free = [_WIDTH - _GAP * (len(row) * (len(columns) + 1) - 2) for row in rows]
    heights = [space / width for space, width in zip(free, widths, strict=True)]
    if len(rows) > 1 and len(rows[-1]) < images_in_a_row:  # not larger than the others
        heights[-1] = min(heights[-1], float(np.mean(heights[:-1])))
    names = _TITLE * any(columns)
    total = _TITLE * bool(title) + sum(names + height + _GAP for height in heights)
    figure = Figure(figsize=(_WIDTH, total))
    figure.suptitle(title, fontsize=10, y=1 - 0.5 * _TITLE / total, va="center")
    y = total - _TITLE * bool(title)
    for row, height in zip(rows, heights, strict=True):
        x, y = 0.0, y - names - height
        for i in row:
            for name, drawn in columns.items():
                width = aspects[i] * height
                axes = figure.add_axes((x / _WIDTH, y / total, width / _WIDTH, height / total))
                draw_objects(axes, images[i], drawn[i], class_names)
                axes.set_title(name, fontsize=8, color=BLACK, pad=3)
                x += width + _GAP
            x += _GAP
        y -= _GAP
    return figure


def draw_objects(axes: Axes, image: np.ndarray, drawn: Drawn, class_names: Sequence[str]) -> None:
    """Draws an image (H, W, 3) uint8 over all of `axes`, and its objects: masks translucent, boxes, and labels."""
    height, width = image.shape[:2]
    pixels = image.astype(np.float32) / 255
    areas = (drawn.boxes[:, 2:] - drawn.boxes[:, :2]).prod(-1)
    order = np.argsort(-areas, kind="stable")
    colors = np.array([class_color(int(number)) for number in drawn.classes]).reshape(-1, 3)
    for i in order:
        if drawn.masks is not None and drawn.masks[i].any():
            pixels[drawn.masks[i]] = 0.55 * pixels[drawn.masks[i]] + 0.45 * colors[i]
            edge = np.pad(drawn.masks[i], 1)  # so that the outline closes at the image's border
            x, y = np.arange(-1, width + 1) + 0.5, np.arange(-1, height + 1) + 0.5
            axes.contour(x, y, edge, levels=[0.5], colors=[colors[i]], linewidths=0.8)
    axes.imshow(pixels, aspect="auto", interpolation="antialiased", extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for i in order:
        left, top, right, bottom = drawn.boxes[i]
        box = Rectangle((left, top), right - left, bottom - top, fill=False, linewidth=1.2, path_effects=_HALO)
        box.set_edgecolor((*colors[i],))
        axes.add_patch(box)
    texts = [str(class_names[int(number)]) for number in drawn.classes]
    if drawn.scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, drawn.scores, strict=True)]
        order = np.argsort(-drawn.scores, kind="stable")
    pixel = width / (axes.bbox.width / axes.figure.dpi * 72)  # of the image, in a point of the picture
    taken = np.zeros((0, 4))
    for i in order:
        size = pixel * np.array([_text_width(texts[i]) + 2 * _PAD, 1.2 * _FONT_SIZE + _PAD])
        place = _place(drawn.boxes[i], size, taken, np.array([width, height]))
        if place is not None:
            taken = np.concatenate([taken, place[None]])
            dark = colors[i] @ [0.299, 0.587, 0.114] < 0.6
            axes.text(
                place[0] + _PAD * pixel,
                (place[1] + place[3]) / 2,
                texts[i],
                fontsize=_FONT_SIZE,
                color="white" if dark else BLACK,
                va="center_baseline",
                bbox={"facecolor": colors[i], "edgecolor": "none", "pad": _PAD},
            )


def _place(box: np.ndarray, size: np.ndarray, taken: np.ndarray, image: np.ndarray) -> np.ndarray | None:
    """Where a label of this width and height is in the image: above its box, in it or below it, free of others.

    None if there is no such place. All are (left, top, right, bottom) in pixels.
    """
    (left, top, right, bottom), (width, height) = box, size
    for y in (top - height, top, bottom, bottom - height):
        for x in (left, right - width):
            corner = np.clip((x, y), 0, np.maximum(image - size, 0))
            place = np.concatenate([corner, corner + size])
            common = np.minimum(place[2:], taken[:, 2:]) - np.maximum(place[:2], taken[:, :2])
            if not (common > 0).all(1).any():
                return place
    return None


@functools.cache
def _text_width(text: str) -> float:
    """In points, with what rounding to whole pixels may add to it."""
    return 1.05 * float(TextPath((0, 0), text, size=_FONT_SIZE).get_extents().x1)


def class_color(number: int) -> tuple[float, float, float]:
    """Red, green and blue from 0 to 1."""
    return tuple(_palette()[number % _COLORS])


@functools.cache
def _palette() -> Float[np.ndarray, "colors 3"]:
    """Bright colors, each as far as can be from all before it, as eyes see distances (Oklab)."""
    steps = np.linspace(0, 1, 18)
    colors = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array([[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0515, 0.1074, 0.6300]])
    lab = np.cbrt(cones) @ np.array([[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]])
    bright = (lab[:, 0] > 0.5) & (lab[:, 0] < 0.9) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.11)
    colors, lab = colors[bright], lab[bright]
    chosen = [int(np.linalg.norm(colors - [0.1, 0.5, 1.0], axis=1).argmin())]
    distances = np.full(len(lab), np.inf)
    while len(chosen) < _COLORS:
        distances = np.minimum(distances, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distances.argmax()))
    return colors[chosen]
