"""Weights of a file as the start of a run."""

from collections.abc import Callable, Mapping
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

_OVER_IMAGES: dict[str, dict[str, Any]] = {
    "convnext_tiny_i3d": {"name": "convnext_tiny"},
    "convnext_tiny_s3d": {"name": "convnext_tiny"},
    "convnext_tiny_3d_s4nd": {"name": "convnext_tiny_s4nd", "stem": "patch"},
}
"""Networks over video, and those over images that they can be inflated from."""


def start_from_file(config: Config, model: nnx.Module, arguments: Mapping[str, Any]) -> None:
    """Gives `model` the weights of `config.weights`, in place; those of a network over images are inflated for video.

    `arguments` are those that `ssm_jax.create_model` made it with, but for `rngs`. A classifier of another number of
    classes stays as it is. Raises ConfigError if the file is not there, or does not fit.
    """
    path = epath.Path(config.weights).expanduser()
    if not path.is_file():
        raise ConfigError(f"config.weights must be a file, got {config.weights}, which is none.")
    try:
        state = read_state(path)
        over_video = any(np.ndim(value) == 5 for value in state.values())  # kernels of convolutions
        if config.model.name in _OVER_IMAGES and not over_video:
            images = _over_images(config, arguments)
            _load(images, state, path)
            inflate(images, model)  # pyright: ignore[reportArgumentType]
        else:
            _load(model, state, path)
    except ValueError as error:
        raise ConfigError(f"config.weights={config.weights}: {error}") from error


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
