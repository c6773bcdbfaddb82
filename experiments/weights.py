"""Weights of a file, or of another run, as the start of a run."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

import ssm_jax
from experiments.config import Config, ConfigError
from ssm_jax.pretrained import inflate, load_torch
from ssm_jax.pretrained.files import read_state
from ssm_jax.pretrained.save import torch_state
from ssm_jax.training.checkpoints import Checkpoints, find_checkpoint

_OVER_IMAGES: dict[str, dict[str, Any]] = {
    "convnext_tiny_i3d": {"name": "convnext_tiny"},
    "convnext_tiny_s3d": {"name": "convnext_tiny"},
    "convnext_tiny_3d_s4nd": {"name": "convnext_tiny_s4nd", "stem": "patch"},
}
"""Networks over video, and those over images that they can be inflated from."""


def start_from_weights(config: Config, model: nnx.Module, arguments: Mapping[str, Any]) -> None:
    """Gives `model` the weights of `config.weights`, in place; those of a network over images are inflated for video.

    They are a file's, or a run's: those of its best checkpoint, or of the one that is named, without averaging.
    `arguments` are those that `ssm_jax.create_model` made the model with, but for `rngs`. A classifier of another
    number of classes stays as it is. Raises ConfigError if there are no such weights, or they do not fit.
    """
    with _weights(config) as (path, state, of_run):
        over_video = any(np.ndim(value) == 5 for value in state.values())  # kernels of convolutions
        inflating = config.model.name in _OVER_IMAGES and not over_video
        network = _over_images(config, arguments) if inflating else model
        _load(network, _as_in_a_file(network, state) if of_run else state, path)
        if inflating:
            inflate(network, model)  # pyright: ignore[reportArgumentType]


def start_detector_from_weights(config: Config, detector: Any) -> None:
    """Gives a detector the weights of `config.weights`, in place: all of a detector's, or its backbone a classifier's.

    They are a file's or a run's, as in `start_from_weights`. Raises ConfigError if there are none, or they do not fit.
    """
    with _weights(config) as (_, state, of_run):
        if any(name.startswith("backbone.") for name in state):
            load_torch(detector, _as_in_a_file(detector, state) if of_run else state)
        elif of_run:
            backbone = detector.backbone
            of_classifier = {".".join(map(str, path)) for path in backbone.removed}
            kept = {name: value for name, value in state.items() if name not in of_classifier}
            load_torch(backbone.network, _as_in_a_file(backbone.network, kept))
        else:
            load_torch(detector.backbone, state)


@contextlib.contextmanager
def _weights(config: Config) -> Iterator[tuple[epath.Path, Mapping[str, Any], bool]]:
    """Where `config.weights` are, the arrays by name, and whether a run's; ValueErrors become ConfigErrors about it."""
    path = epath.Path(config.weights).expanduser()
    found = find_checkpoint(path)
    if found is None and not path.is_file():
        raise ConfigError(
            "config.weights must be a file, a run's workdir, or one of its checkpoints, WORKDIR/checkpoints/STEP, got "
            f"{config.weights}, which is none."
        )
    try:
        yield path, read_state(path) if found is None else _of_run(*found), found is not None
    except ValueError as error:
        raise ConfigError(f"config.weights={config.weights}: {error}") from error


def _of_run(folder: epath.Path, step: int | None) -> dict[str, np.ndarray]:
    """Parameters and statistics of a checkpoint, the best one by default, by their names in it."""
    with Checkpoints(folder) as checkpoints:
        network = checkpoints.read_network(step)
    leaves = [leaf for part in network.values() for leaf in jax.tree_util.tree_leaves_with_path(part)]
    return {jax.tree_util.keystr(path, simple=True, separator="."): array for path, array in leaves}


def _as_in_a_file(model: nnx.Module, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values of a network like `model` by its own names, as `save_safetensors` would write them."""
    flat = nnx.to_flat_state(nnx.state(model))
    names = {path: ".".join(map(str, path)) for path, _ in flat}
    kinds = {path for path, variable in flat if isinstance(variable, (nnx.Param, nnx.BatchStat))}
    problems = [f"{name} is missing" for path, name in names.items() if path in kinds and name not in state]
    problems += [f"{name} is unexpected" for name in state.keys() - names.values()]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"weights do not fit {type(model).__name__}: {'; '.join(sorted(problems)[:5])}{more}.")
    return torch_state(model, {path: state[names[path]] for path in kinds})


def _load(model: nnx.Module, state: Mapping[str, Any], path: epath.Path) -> None:
    try:
        load_torch(model, state)
    except ValueError:
        load_torch(model, state, reset_head=True)
        logging.warning("%s has other classes: the classifier starts at random.", path)


def _over_images(config: Config, arguments: Mapping[str, Any]) -> nnx.Module:
    """The network that the one over video is inflated from, at random."""
    options: dict[str, Any] = {**arguments, **_OVER_IMAGES[config.model.name]}
    if "img_size" in options:
        options["img_size"] = tuple(options["img_size"])[1:]
    return built(lambda: ssm_jax.create_model(rngs=nnx.Rngs(0), **options))


def built(create: Callable[[], nnx.Module]) -> nnx.Module:
    """A model made by one compiled function, which is much faster than op by op."""
    graphdef = nnx.graphdef(nnx.eval_shape(create))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(create()))())
