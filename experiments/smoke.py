"""The smallest run of a recipe's kind: its network, but narrow and shallow, for two steps of each stage of training.

Images keep their sizes and datasets their classes; all else of the recipe that costs time is cut.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.config import Config
from ssm_jax import models
from ssm_jax.data.datasets import Dataset, Source

_STEPS = 2
"""In each stage of training."""

_SIZES: dict[str, dict[str, Any]] = {
    "convnext*": {"depths": (1, 1, 1, 1), "dims": (2, 4, 8, 8)},
    "convnext*s4nd*": {"stem_channels": 4},
    "deit*": {"d_model": 32, "depth": 2, "num_heads": 2},
    "isotropic*": {"d_model": 8, "n_layers": 1},
    "pvt_v2*": {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "resnet[0-9]*": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "stem_width": 8},
    "resnet_cifar*": {"depth": 11, "dims": (8, 8, 8), "stem_width": 8},
    "swin*": {"d_model": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},  # two: windows also shift
    "vit*": {"d_model": 32, "depth": 2},
    "vit*[!d]": {"num_heads": 2},  # not of those that end with s4nd
}
"""Arguments of the networks whose names match a pattern."""

_DETECTORS: dict[str, dict[str, Any]] = {
    "*": {"fpn": {"out_channels": 32}},
    "mask_rcnn*": {"mask": {"widths": (8, 8), "width": 8}},
    "retinanet*": {"candidates": 50, "score_threshold": 0.0, "detections": 20},
    "*_rcnn*": {
        "rpn": {"candidates": 50, "proposals": 50, "train_candidates": 50, "train_proposals": 50, "samples": 32},
        "box": {"samples": 32, "score_threshold": 0.0, "detections": 20},
    },
}
"""Arguments of detectors whose names match a pattern. So early, nothing would be above a threshold."""

_SIDES = (96, 128)
"""Of a detector's images, which are large otherwise."""


def cut(config: Config, devices: int) -> Config:
    """The config of a run on `devices` with the same constructors and options, of which little else is left.

    Steps are two per stage for a dataset that `shorten` has cut, and what is given in epochs keeps its share of them.
    """
    cut = config.copy_and_resolve_references()
    cut.unlock()
    accumulate = min(config.accumulate, 2)
    rows = max(devices, 2)  # which batch statistics need
    stages = len(config.stages.epochs)
    cut.update(
        model=_cut_model(config.model.to_dict()),
        weights="",  # of the whole network
        batch_size=rows * accumulate,
        accumulate=accumulate,
        epochs=float(max(stages, 1)),
        checkpoint_every_epochs=float(max(stages, 1)),
        log_every_steps=1,
    )
    cut.stages.epochs = (1.0,) * stages
    cut.data.sides = _SIDES
    cut.augment.mix_group = rows
    cut.eval.update(batch_size=rows, every_epochs=cut.epochs)
    share = cut.epochs / config.epochs
    options = config.optimizer
    cut.optimizer.update(
        warmup_epochs=share * options.warmup_epochs,
        decay_epochs=tuple(share * epoch for epoch in options.decay_epochs),
    )
    if options.cosine_epochs is not None:
        cut.optimizer.cosine_epochs = share * options.cosine_epochs
    cut.lock()
    return cut


def kinds(recipes: Mapping[str, Config]) -> dict[str, list[str]]:
    """Names of recipes by the first of those that are the same run when they are cut, as ResNet-50, 101 and 152 are."""
    found: dict[str, list[str]] = {}
    for name, config in recipes.items():
        values = cut(config, 1).to_dict()
        found.setdefault(repr((_constructed(values.pop("model")), _essence(values))), []).append(name)
    return {names[0]: names for names in found.values()}


def _constructed(model: dict[str, Any]) -> Any:
    """What makes a network, and with what, but for real numbers."""
    if "backbone" in model:
        return {**_essence(model), "backbone": _constructed(model["backbone"])}
    make, defaults = models._MODELS[model["name"]]
    return make, _essence({**defaults, **{name: value for name, value in model.items() if name != "name"}})


def _essence(value: Any) -> Any:
    """What a config compiles to: of real numbers only whether they are 0, of resolutions whether they are given."""
    if isinstance(value, dict):
        names = sorted(value.keys() - {"published", "seed", "init"})  # which init there is changes initial values
        return {name: bool(value[name]) if "resolution" in name else _essence(value[name]) for name in names}
    if isinstance(value, tuple):
        return tuple(map(_essence, value))
    return bool(value) if isinstance(value, float) else value


def shorten(dataset: Dataset, config: Config) -> Dataset:
    """The first examples of each split: as many as a cut config needs for its steps, and for one evaluation."""
    counts = {"train": _STEPS * config.batch_size}
    splits = {name: _First(source, counts.get(name, config.eval.batch_size)) for name, source in dataset.splits.items()}
    return dataclasses.replace(dataset, splits=splits)


def _cut_model(model: dict[str, Any]) -> dict[str, Any]:
    """A network's arguments with other sizes."""
    if "backbone" in model:
        sizes = _arguments(_DETECTORS, model["name"])
        return {**model, **sizes, "backbone": _cut_model(model["backbone"])}
    sizes = _arguments(_SIZES, model["name"])
    if "s4nd" in model["name"]:
        sizes["mixer"] = {**model.get("mixer", {}), "d_state": 8}
    return model | sizes


def _arguments(of: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Those of all patterns that a name matches."""
    matching = (arguments for pattern, arguments in of.items() if fnmatch.fnmatch(name, pattern))
    return {argument: value for arguments in matching for argument, value in arguments.items()}


@dataclasses.dataclass(frozen=True)
class _First:
    """The first examples of a source, again and again if there are fewer."""

    source: Source
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if index >= self.count:
            raise IndexError(index)  # with which iteration ends
        return self.source[index % len(self.source)]

    def name(self, index: int) -> str:
        return self.source.name(index % len(self.source))

    @property
    def groups(self) -> np.ndarray | None:
        groups = getattr(self.source, "groups", None)
        return None if groups is None else np.resize(groups, self.count)

    # Of objects, see `ssm_jax.data.coco.Images`.

    @property
    def sizes(self) -> np.ndarray:
        return np.resize(self.source.sizes, (self.count, 2))  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def category_ids(self) -> tuple[int, ...]:
        return self.source.category_ids  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def annotations(self) -> dict[str, Any]:
        return self.source.annotations  # pyright: ignore[reportAttributeAccessIssue]
