r"""Draws a training batch of a config as the network gets it: read, augmented, mixed, and at its resolution.

    python -m ssm_jax.data.preview --config=configs/s4nd/digits.py [--out=preview.png] [--rows=32] [--config.FIELD=...]

Of a video, eight frames in a row. Under each are the classes that it is to be, with their weights where there are two.
For a detector, images without their padding, with boxes and masks of the objects.
"""

import sys

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure
from ml_collections import config_flags

from ssm_jax.data import recipe
from ssm_jax.data.coco import Images
from ssm_jax.data.datasets import Dataset
from ssm_jax.data.detection import DetectionAugment, bucket_of
from ssm_jax.data.pipeline import train_batches
from ssm_jax.data.resolution import normalize, resample
from ssm_jax.plots import Drawn, detection_sheet, image_sheet

_FRAMES = 8
_NAMED = 3


def preview(config: recipe.Options, rows: int) -> Figure:
    """The first rows of the first training batch; `config` has the fields of configs/common/classification.py."""
    dataset = recipe.load(config.data)
    return (_objects if "backbone" in config.model else _classes)(config, dataset, rows)


def _classes(config: recipe.Options, dataset: Dataset, rows: int) -> Figure:
    batch = next(
        train_batches(
            dataset.splits["train"],
            batch_size=rows,
            transform=recipe.train_transform(dataset, config.data, config.augment),
            seed=config.seed,
            repeats=config.augment.repeats,
            max_broken=config.data.max_broken,
        )
    )
    resolution = (*config.stages.resolutions, config.data.resolution or dataset.resolution)[0]

    @jax.jit
    def augmented(images, labels):
        images = normalize(images, dataset.mean, dataset.std)
        targets = labels if dataset.multi_label else jax.nn.one_hot(labels, dataset.num_classes)
        images, targets = recipe.augment_batch(images, targets, jax.random.key(config.seed), config.augment)
        return resample(images, resolution), targets

    images, targets = jax.device_get(augmented(batch["image"], batch["label"]))
    images = images * np.asarray(dataset.std, np.float32) + np.asarray(dataset.mean, np.float32)
    images = np.clip(np.round(255 * images), 0, 255).astype(np.uint8)
    texts = [_text(row, dataset) for row in targets]
    title = f"{dataset.title}, {rows} rows of the first training batch at {resolution} x {resolution}"
    if dataset.frames is None:
        return image_sheet(images, texts, title=title)
    shown = np.linspace(0, dataset.frames - 1, _FRAMES).round().astype(int)
    texts = [text if i == 0 else "" for text in texts for i in range(_FRAMES)]
    return image_sheet(images[:, shown].reshape(-1, *images.shape[2:]), texts, title=title, columns=_FRAMES)


def _objects(config: recipe.Options, dataset: Dataset, rows: int) -> Figure:
    source, sides = dataset.splits["train"], tuple(config.data.sides)
    if not isinstance(source, Images):
        raise ValueError(f"name must be coco for a detector, got {config.data.name!r}.")
    source = source.with_objects()
    augment = DetectionAugment(sides=sides, flip=config.augment.flip, max_objects=config.data.max_objects, masks=True)
    batch = next(
        train_batches(
            source,
            batch_size=rows,
            transform=augment,
            seed=config.seed,
            groups=bucket_of(source.sizes, sides),
            max_broken=config.data.max_broken,
        )
    )
    images, drawn = [], []
    for i, (height, width) in enumerate(batch["size"].tolist()):
        valid = batch["valid"][i]
        boxes, classes, masks, mask_boxes = (
            batch[name][i][valid] for name in ("boxes", "classes", "masks", "mask_boxes")
        )
        pixels = [_over_image(mask, box, (height, width)) for mask, box in zip(masks, mask_boxes, strict=True)]
        images.append(batch["image"][i, :height, :width])
        drawn.append(Drawn(boxes, classes, masks=np.stack(pixels)))
    height, width = batch["image"].shape[1:3]
    title = f"{dataset.title}, {rows} rows of the first training batch, padded to {width} x {height}"
    return detection_sheet(images, {"": drawn}, dataset.class_names, title=title, images_in_a_row=4)


def _over_image(
    mask: UInt8[np.ndarray, "g g"], box: Float[np.ndarray, "4"], size: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """The cell of a mask over a box in which each pixel of the image lies; all around the box, as its empty border."""
    (left, top, right, bottom), cells = box, len(mask)
    rows, columns = (
        np.clip((np.arange(length) + 0.5 - low) * cells / (high - low), 0, cells - 1).astype(int)
        for length, low, high in zip(size, (top, left), (bottom, right), strict=True)
    )
    return mask[np.ix_(rows, columns)] > 0


def _text(targets: Float[np.ndarray, "classes"], dataset: Dataset) -> str:
    """The largest targets."""
    names = [(float(targets[i]), dataset.class_names[i]) for i in np.argsort(-targets) if targets[i] > 0.01]
    named = [name if weight > 0.99 else f"{name} {weight:.2f}" for weight, name in names[:_NAMED]]
    return ", ".join(named) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
    _OUT = flags.DEFINE_string("out", "preview.png", "File of the picture.")
    _ROWS = flags.DEFINE_integer("rows", 32, "Rows of the batch that are drawn.", lower_bound=1)
    flags.mark_flag_as_required("config")

    def main(argv: list[str]) -> None:  # noqa: D103
        del argv
        logging.set_verbosity(logging.WARNING)
        try:
            figure = preview(_CONFIG.value, _ROWS.value)
        except ValueError as error:
            sys.exit(f"error: {error}")
        epath.Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
        with epath.Path(_OUT.value).open("wb") as file:
            figure.savefig(file, dpi=100)
        print(_OUT.value)

    app.run(main)
