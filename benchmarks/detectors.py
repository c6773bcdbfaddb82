r"""What detectors cost: inference and training steps against torchvision's in PyTorch.

    pip install torch torchvision
    python -m benchmarks.detectors [--detectors=mask_rcnn] [--sides=800,1344] [--batch=1] [--cores=1]

ResNet-50 with FPN, 80 classes, float32, both with the same weights, on images of noise of one size with 10 objects
each: detection, and the gradients of the losses by all parameters but those of the stem and the first stage. They are
called in turns, after a check that both detect the same. PyTorch runs eagerly, its images `channels_last`. Classes are
made unequally likely, so that there is something to suppress: weights at random give all the same score. "positive" are
the proposals for which torchvision computes masks in training, where ours has the most there may be, 128 an image.
Writes detectors.json into `--out`.
"""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import CORES, OUT, ROUNDS, pin, surroundings, times
from ssm_jax.detection import create_detector
from ssm_jax.detection.structures import Objects
from ssm_jax.pretrained import load_torch
from ssm_jax.training.optimizer import freeze, param_groups

NAMES = {
    "retinanet": "RetinaNet",
    "faster_rcnn": "FasterRCNN",
    "mask_rcnn": "MaskRCNN",
}
"""Those of torchvision."""

DETECTORS = flags.DEFINE_list("detectors", list(NAMES), "Which detectors.")
SIDES = flags.DEFINE_list("sides", ["800", "1344"], "Height and width of the images, multiples of 32.")
BATCH = flags.DEFINE_integer("batch", 1, "Images at a time.", lower_bound=1)

CLASSES, OBJECTS, PADDED, GRID = 80, 10, 100, 114
FROZEN = ("backbone.network.conv1", "backbone.network.bn1", "backbone.network.stages.0")
MEAN, STD = (np.array(x, np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Scene(NamedTuple):
    """Images in 0 .. 1, and the boxes, classes and masks in each."""

    images: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    masks: np.ndarray


def scene(rng: np.random.Generator, batch: int, height: int, width: int) -> Scene:
    """Images of noise of all scales, with boxes of all sizes."""
    images = np.zeros((batch, height, width, 3), np.float32)
    for cell in (4, 32, 160):
        coarse = rng.random((batch, -(-height // cell), -(-width // cell), 3), np.float32)
        images += coarse.repeat(cell, 1).repeat(cell, 2)[:, :height, :width] / 3
    sides = np.exp(rng.uniform(np.log(16), np.log(0.7 * height), (batch, OBJECTS, 2)))
    corner = rng.random((batch, OBJECTS, 2)) * (np.array([width, height]) - sides)
    boxes = np.concatenate([corner, corner + sides], -1).astype(np.float32)
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((batch, OBJECTS, height, width), np.uint8)
    for i, of_image in enumerate(boxes):
        for j, (x0, y0, x1, y1) in enumerate(of_image):
            masks[i, j] = (2 * x - x0 - x1) ** 2 / (x1 - x0) ** 2 + (2 * y - y0 - y1) ** 2 / (y1 - y0) ** 2 < 1
    return Scene(images, boxes, rng.integers(0, CLASSES, (batch, OBJECTS)).astype(np.int32), masks)


def torch_detector(name: str, sides: tuple[int, int]) -> Any:
    """torchvision's, with weights at random that tell classes apart."""
    import torch
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    torch.manual_seed(0)
    maps = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if name == "retinanet" else {}
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3, **maps
    )
    number = CLASSES if name == "retinanet" else CLASSES + 1
    model = getattr(detection, NAMES[name])(backbone, number, min_size=min(sides), max_size=max(sides))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "cls_score.weight" in parameter_name:
                parameter.mul_(100.0)
            if "classification_head.cls_logits.weight" in parameter_name:
                parameter.mul_(10.0)
            if "classification_head.conv" in parameter_name and "weight" in parameter_name:
                parameter.mul_(3.0)  # the variance that keeps activations the same size from layer to layer
        for parameter_name, buffer in model.named_buffers():
            if parameter_name.endswith("bn3.weight"):
                buffer.mul_(0.3)  # or activations grow from block to block
    return model.to(memory_format=torch.channels_last)


class Side(NamedTuple):
    """One implementation, ready to be called."""

    detect: Callable[[], Any]
    train: Callable[[], Any]
    compile_seconds: float = 0.0


def torch_side(model: Any, data: Scene, *, masks: bool) -> Side:
    """PyTorch's calls, eager."""
    import torch

    images = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in data.images]

    def objects(i: int, first: int) -> dict[str, Any]:
        labels = torch.from_numpy(data.classes[i] + first).long()
        of_image = {"boxes": torch.from_numpy(data.boxes[i]), "labels": labels}
        return of_image | ({"masks": torch.from_numpy(data.masks[i])} if masks else {})

    first = 0 if type(model).__name__ == NAMES["retinanet"] else 1
    targets = [objects(i, first) for i in range(len(images))]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def detect() -> Any:
        with torch.inference_mode():
            return model.eval()(images)

    def train() -> Any:
        losses = model.train()(images, targets)
        return torch.autograd.grad(sum(losses.values()), trained)

    return Side(detect, train)


def count_positive(model: Any, train: Callable[[], Any]) -> int:
    """The proposals of a step of torchvision's R-CNNs that are to find an object: for so many it computes masks."""
    counts = []
    select = model.roi_heads.select_training_samples

    def counted(*arguments: Any) -> Any:
        samples = select(*arguments)
        counts.append(sum(int((labels > 0).sum()) for labels in samples[2]))
        return samples

    model.roi_heads.select_training_samples = counted
    train()
    del model.roi_heads.select_training_samples
    return counts[0]


def jax_side(name: str, weights: dict[str, np.ndarray], data: Scene) -> Side:
    """Ours, compiled."""
    create = functools.partial(create_detector, name, backbone="resnet50", num_classes=CLASSES)
    model = create(rngs=nnx.Rngs(0))
    load_torch(model, weights)
    images = jnp.asarray((data.images - MEAN) / STD)
    batch, height, width, _ = images.shape
    sizes = jnp.tile(jnp.array([height, width], jnp.int32), (batch, 1))

    def padded(values: np.ndarray) -> jax.Array:
        return jnp.asarray(np.pad(values, [(0, 0), (0, PADDED - OBJECTS), *[(0, 0)] * (values.ndim - 2)]))

    objects = Objects(padded(data.boxes), padded(data.classes), padded(np.ones((batch, OBJECTS), bool)))
    if name == "mask_rcnn":
        whole = np.broadcast_to(np.array([0, 0, width, height], np.float32), (batch, OBJECTS, 4))
        rows, columns = (np.linspace(0, side - 1, GRID).astype(int) for side in (height, width))
        grids = data.masks[:, :, rows[:, None], columns[None]]  # of the size that crops have
        objects = objects._replace(masks=padded(grids), mask_boxes=padded(whole))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    labels = param_groups(nnx.state(model, nnx.Param), frozen=FROZEN)

    def merged(params: Any) -> Any:
        return nnx.merge(graphdef, params, rest, copy=True)

    def detect(params: Any, images: jax.Array) -> Any:
        return nnx.view(merged(params), deterministic=True, raise_if_not_found=False)(images, sizes)

    def loss(params: Any, images: jax.Array, objects: Objects) -> jax.Array:
        losses = merged(freeze(params, labels)).losses(images, sizes, objects, key=jax.random.key(0))
        return sum(losses.values(), start=jnp.zeros(()))

    start = time.perf_counter()
    detecting = jax.jit(detect).lower(params, images).compile()
    training = jax.jit(jax.grad(loss)).lower(params, images, objects).compile()
    seconds = time.perf_counter() - start
    return Side(lambda: detecting(params, images), lambda: training(params, images, objects), seconds)


def check_same(ours: Any, theirs: Any) -> int:
    """The number of detections, of which almost all must be the same: close scores may change places."""
    same = count = 0
    for i, found in enumerate(theirs):
        boxes, scores = (found[name].numpy() for name in ("boxes", "scores"))
        mine = np.asarray(ours.boxes[i])[np.asarray(ours.valid[i])]
        count += len(boxes)
        same += sum(bool(len(mine)) and np.abs(mine - box).max(-1).min() < 0.5 for box in boxes)
        assert np.isfinite(scores).all()
    assert same >= 0.95 * count, f"only {same} of {count} detections are the same"
    return count


def main(_: list[str]) -> None:
    """Measures and writes."""
    pin(CORES.value)
    import torch

    torch.set_num_threads(CORES.value)
    height, width = map(int, SIDES.value)
    console = Console(width=120)
    table = Table(title=f"{BATCH.value} x {height} x {width}, ResNet-50-FPN; seconds of processor time, medians")
    for column in ("detector", "", "ours", "torchvision", "theirs / ours", "detections", "positive", "compiled in, s"):
        table.add_column(column, justify="right")
    results: dict[str, Any] = {}
    for name in DETECTORS.value:
        data = scene(np.random.default_rng(0), BATCH.value, height, width)
        model = torch_detector(name, (height, width))
        theirs = torch_side(model, data, masks=name == "mask_rcnn")
        ours = jax_side(name, {key: value.numpy() for key, value in model.state_dict().items()}, data)
        count = check_same(ours.detect(), theirs.detect())
        positive = 0 if name == "retinanet" else count_positive(model, theirs.train)
        results[name] = {"detections": count, "positive": positive, "compile_seconds": ours.compile_seconds}
        for what in ("detect", "train"):
            functions = {"ours": getattr(ours, what), "theirs": getattr(theirs, what)}
            seconds = times(functions, rounds=ROUNDS.value, longest=120.0)
            middle = {side: float(np.median(taken)) for side, taken in seconds.items()}
            results[name][what] = seconds
            ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=False)]
            table.add_row(
                *(name, what, f"{middle['ours']:.2f}", f"{middle['theirs']:.2f}"),
                f"{middle['theirs'] / middle['ours']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                *(str(count), str(positive), f"{ours.compile_seconds:.0f}"),
            )
            console.print(name, what, middle, soft_wrap=True)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "detectors.json").write_text(
        json.dumps({"where": surroundings("flax"), "torch": torch.__version__, "seconds": results}, indent=1) + "\n"
    )
    console.print(table)


if __name__ == "__main__":
    app.run(main)
