"""Weights of a file, or of another run, as the start of a run."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
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
        inflating = _inflates(config, state.values())
        network = built(lambda: _over_images(config, arguments)) if inflating else model
        _load(network, _as_in_a_file(network, state) if of_run else state, path)
        if inflating:
            inflate(network, model)  # pyright: ignore[reportArgumentType]


def check_start(config: Config, model: nnx.Module, arguments: Mapping[str, Any], source: nnx.Module) -> None:
    """Raises ValueError unless what `model` starts from has the names of `source`'s weights; both may be abstract."""
    leaves = jax.tree.leaves(nnx.state(source))
    network = nnx.eval_shape(lambda: _over_images(config, arguments)) if _inflates(config, leaves) else model
    _check_names(network, {".".join(map(str, path)) for path, _ in _of_weights(source)})


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
    _check_names(model, state.keys())
    return torch_state(model, {path: state[".".join(map(str, path))] for path, _ in _of_weights(model)})


def _of_weights(model: nnx.Module) -> list[tuple[tuple[Any, ...], nnx.Variable[Any]]]:
    """What a file of its weights has: parameters and statistics, by path."""
    return [*nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))]


def _check_names(model: nnx.Module, given: Set[str]) -> None:
    """Raises ValueError unless these are the names of a model's weights; its other variables may be among them."""
    known = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    needed = {".".join(map(str, path)) for path, _ in _of_weights(model)}
    problems = [f"{name} is missing" for name in needed - given] + [f"{name} is unexpected" for name in given - known]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"weights do not fit {type(model).__name__}: {'; '.join(sorted(problems)[:5])}{more}.")


def _load(model: nnx.Module, state: Mapping[str, Any], path: epath.Path) -> None:
    try:
        load_torch(model, state)
    except ValueError:
        load_torch(model, state, reset_head=True)
        logging.warning("%s has other classes: the classifier starts at random.", path)


def _inflates(config: Config, arrays: Iterable[Any]) -> bool:
    """Whether a network over video is to start from weights of one over images."""
    return config.model.name in _OVER_IMAGES and not any(np.ndim(array) == 5 for array in arrays)  # kernels over video


def _over_images(config: Config, arguments: Mapping[str, Any]) -> nnx.Module:
    """The network that the one over video is inflated from, at random."""
    options: dict[str, Any] = {**arguments, **_OVER_IMAGES[config.model.name]}
    if "img_size" in options:
        options["img_size"] = tuple(options["img_size"])[1:]
    return ssm_jax.create_model(rngs=nnx.Rngs(0), **options)


def built(create: Callable[[], nnx.Module]) -> nnx.Module:
    """A model made by one compiled function, which is much faster than op by op."""
    graphdef = nnx.graphdef(nnx.eval_shape(create))
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(create()))())
