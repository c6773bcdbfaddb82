r"""What a detector's own operations cost: NMS and RoIAlign, against torchvision's compiled ones.

    pip install torch torchvision
    python -m benchmarks.detection_operations [--cases=RoIAlign] [--cores=1] [--rounds=7]

At the sizes of a detector of 800 x 1344 pixels, called in turns, after a check that both keep the same boxes and give
the same features and gradients; on cores of a CPU (`--cores`). Maps have the order of axes that each side works in,
channels last and first. torchvision's NMS finds all boxes that stay, ours the best ones that are asked for. Writes
detection_operations.json into `--out`.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.backbones import ratio
from benchmarks.side_by_side import CORES, ROUNDS, Passes, allocated, jax_passes, pin, save, surroundings, times
from ssm_jax.detection.nms import nms
from ssm_jax.detection.roi_align import pyramid_roi_align

IMAGE_SIZE = (800, 1344)
STRIDES = (4, 8, 16, 32)
CHANNELS = 256

Contestants = dict[str, dict[str, Callable[[], Any]]]
"""Ours first: `forward`, `backward` (that is, both) if there is a gradient, and `peak_bytes`."""

_CASES = flags.DEFINE_string("cases", "", "Part of the names of the cases to measure; by default all.")


def boxes_of_objects(rng: np.random.Generator, n: int, objects: int) -> np.ndarray:
    """Boxes (n, 4) as networks propose them: in clusters, around `objects` of 16 to 300 pixels."""
    of = rng.integers(0, objects, n)
    size = np.exp(rng.uniform(np.log(16), np.log(300), (objects, 2)))[of]
    centre = (rng.uniform(0, 1, (objects, 2)) * IMAGE_SIZE[::-1])[of] + 0.1 * size * rng.normal(size=(n, 2))
    size *= np.exp(0.1 * rng.normal(size=(n, 2)))
    return np.concatenate([centre - size / 2, centre + size / 2], axis=-1).astype(np.float32)


def proposals(rng: np.random.Generator, has_torch: bool, *, levels: int) -> Contestants:
    """The RPN's: 2000 boxes of each level, of which all that stay are wanted."""
    boxes = np.stack([boxes_of_objects(rng, 2000, 300) for _ in range(levels)])
    scores = rng.normal(size=(levels, 2000)).astype(np.float32)
    of_all = jax.vmap(functools.partial(nms, threshold=0.7, max_kept=2000))

    def kept(boxes: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        indices, kept = of_all(boxes, scores)
        return indices + 2000 * jnp.arange(levels)[:, None], kept

    flat = boxes.reshape(-1, 4), scores.ravel(), np.repeat(np.arange(levels), 2000)
    return suppression(kept, (boxes, scores), flat, threshold=0.7, most=None, has_torch=has_torch)


def detections(rng: np.random.Generator, has_torch: bool) -> Contestants:
    """The box head's: a box of each of 80 classes for each of 1000 proposals, of which the best 100 are wanted."""
    boxes = np.repeat(boxes_of_objects(rng, 1000, 60), 80, axis=0)
    boxes += 4 * rng.normal(size=boxes.shape).astype(np.float32)
    arrays = boxes, rng.uniform(size=80_000).astype(np.float32), np.tile(np.arange(80, dtype=np.int32), 1000)

    def kept(boxes: jax.Array, scores: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return nms(boxes, scores, classes=classes, threshold=0.5, max_kept=100)

    return suppression(kept, arrays, arrays, threshold=0.5, most=100, has_torch=has_torch)


def suppression(
    ours: Callable[..., tuple[jax.Array, jax.Array]],
    arguments: tuple[np.ndarray, ...],
    flat: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    threshold: float,
    most: int | None,
    has_torch: bool,
) -> Contestants:
    """Contestants in NMS of `flat` boxes, scores and classes, which `ours` finds in `arguments`.

    Raises ValueError if they keep others.
    """
    compiled = jax.jit(ours).lower(*map(jnp.asarray, arguments)).compile()
    on_device = [*map(jnp.asarray, arguments)]
    peak = compiled.memory_analysis().temp_size_in_bytes
    found: Contestants = {"ssm_jax": {"forward": lambda: compiled(*on_device), "peak_bytes": lambda: peak}}
    if has_torch:
        import torch
        from torchvision.ops import batched_nms
        from torchvision.ops import nms as nms_of_one

        boxes, scores, classes = map(torch.tensor, flat)

        def theirs() -> Any:
            if not classes.any():
                return nms_of_one(boxes, scores, threshold)
            return batched_nms(boxes, scores, classes, threshold)[:most]

        indices, kept = map(np.asarray, compiled(*on_device))
        if set(indices[kept]) != set(theirs().tolist()):
            raise ValueError(f"torchvision keeps others: {len(theirs())}, and ours {kept.sum()}.")
        found["torchvision"] = {"forward": theirs, "peak_bytes": lambda: allocated(theirs, "cpu")}
    return found


def alignment(rng: np.random.Generator, has_torch: bool, *, n: int, size: int) -> Contestants:
    """Contestants in RoIAlign of n boxes on the maps of a pyramid, and its gradient to these.

    Raises ValueError if features or gradients differ.
    """
    maps = [rng.normal(size=(IMAGE_SIZE[0] // k, IMAGE_SIZE[1] // k, CHANNELS)).astype(np.float32) for k in STRIDES]
    side = np.exp(rng.uniform(np.log(16), np.log(600), (n, 2)))
    centre = rng.uniform(0, 1, (n, 2)) * IMAGE_SIZE[::-1]
    boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=-1)
    boxes = np.clip(boxes, 0, [*IMAGE_SIZE[::-1]] * 2).astype(np.float32)
    align = functools.partial(pyramid_roi_align, image_size=IMAGE_SIZE, output_size=size)
    ours = jax_passes(align, [*map(jnp.asarray, maps)], jnp.asarray(boxes))
    found: Contestants = {"ssm_jax": ours._asdict()}
    if has_torch:
        import torch
        from torchvision.ops import MultiScaleRoIAlign

        names = [str(i) for i in range(len(maps))]
        module = MultiScaleRoIAlign(names, size, sampling_ratio=2)
        tensors = [torch.tensor(np.moveaxis(m, -1, 0)[None].copy(), requires_grad=True) for m in maps]
        inputs = dict(zip(names, tensors, strict=True)), [torch.tensor(boxes)], [IMAGE_SIZE]

        def forward() -> Any:
            with torch.no_grad():
                return module(*inputs)

        def backward() -> Any:
            return torch.autograd.grad(module(*inputs).square().sum() / 2, tensors)

        of_maps, _ = ours.backward()
        pairs = [(ours.forward(), forward()), *zip(of_maps, backward(), strict=True)]
        errors = [difference(np.moveaxis(np.asarray(a), -1, -3), b.numpy()) for a, b in pairs]
        if not max(errors) < 1e-3:
            raise ValueError(f"torchvision's is another function: relative to the largest, differences are {errors}.")
        theirs = Passes(forward, backward, lambda: allocated(backward, "cpu"))
        found["torchvision"] = theirs._asdict()
    return found


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest, relative to the largest value."""
    return float(np.abs(a - b).max() / np.abs(b).max())


CASES: Mapping[str, Callable[[np.random.Generator, bool], Contestants]] = {
    "NMS, 2000 boxes": functools.partial(proposals, levels=1),
    "NMS, 5 levels of 2000 boxes": functools.partial(proposals, levels=5),
    "NMS, 80 classes of 1000 boxes to 100": detections,
    "RoIAlign, 512 boxes to 7 x 7": functools.partial(alignment, n=512, size=7),
    "RoIAlign, 128 boxes to 14 x 14": functools.partial(alignment, n=128, size=14),
}


def measure(contestants: Contestants) -> dict[str, Any]:
    """Seconds of each call and bytes, by contestant."""
    parts = [part for part in ("forward", "backward") if part in contestants["ssm_jax"]]
    functions = {part: {name: each[part] for name, each in contestants.items()} for part in parts}
    seconds = {part: times(each, rounds=ROUNDS.value) for part, each in functions.items()}
    return seconds | {"bytes": {name: each["peak_bytes"]() for name, each in contestants.items()}}


def table(results: Mapping[str, Any]) -> Table:
    """A row for each case."""
    view = Table(title="ssm_jax, and its time as a multiple of torchvision's (extremes over the rounds)")
    for column in ["operation", "forward, ms", "ratio", "forward and backward, ms", "ratio", "MB, ours : theirs"]:
        view.add_column(column, justify="left" if column == "operation" else "right")
    for name, result in results.items():
        cells = []
        for part in ("forward", "backward"):
            first, *others = result.get(part, {}).values() or [None]
            cells += [f"{1e3 * np.median(first):.1f}" if first else "-", ratio(first, others[0]) if others else "-"]
        view.add_row(name, *cells, " : ".join(f"{size / 1e6:.1f}" for size in result["bytes"].values()))
    return view


def main(_: list[str]) -> None:
    """Measures, prints and saves."""
    if jax.default_backend() != "cpu":
        raise app.UsageError("torchvision's kernels for CPUs are what is compared with: set JAX_PLATFORMS=cpu.")
    cases = {name: case for name, case in CASES.items() if _CASES.value in name}
    if not cases:
        raise app.UsageError(f"--cases must be in one of {'; '.join(CASES)}; got {_CASES.value}.")
    pin(CORES.value)
    has_torch = all(map(importlib.util.find_spec, ("torch", "torchvision")))
    if has_torch:
        import torch

        torch.set_num_threads(CORES.value)
    console = Console(width=160)
    where = surroundings("jaxlib", *["torch", "torchvision"] * has_torch)
    console.print(where if has_torch else f"{where}; no torchvision: ours only")
    results = {name: measure(case(np.random.default_rng(0), has_torch)) for name, case in cases.items()}
    console.print(table(results))
    save("detection_operations", {"where": where, "cases": results}, console)


if __name__ == "__main__":
    app.run(main)
