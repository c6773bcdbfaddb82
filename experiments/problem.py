"""What is to be learned: all that a run does in one way for classes of images and in another for objects in them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from etils import epath
from flax import nnx
from matplotlib.figure import Figure
from rich.table import Table

from experiments.config import Config
from experiments.stages import Stage
from ssm_jax.data import recipe
from ssm_jax.data.datasets import Dataset, Source

Rows = dict[str, np.ndarray]
Loss = Callable[[nnx.Module, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, Any]]]
Scores = dict[int, dict[str, float]]
"""Scores of images, by resolution."""
Evaluate = Callable[[nnx.Module, dict[str, jax.Array]], dict[str, jax.Array]]


class Evaluation(NamedTuple):
    """Of a split: mean scores, and what they are of, example by example."""

    scores: dict[str, float]
    rows: Mapping[str, Any]


class Tally(Protocol):
    """What an evaluation adds up."""

    def add(self, rows: Rows) -> None:
        """Takes what the evaluation step says of one batch, of all processes."""
        ...

    def evaluation(self) -> Evaluation:
        """The scores of all batches so far."""
        ...


class Problem(Protocol):
    """Of a config and its dataset. Nothing of it is an array on a device."""

    @property
    def score(self) -> str:
        """Of an evaluation, that checkpoints and networks are compared by."""
        ...

    @property
    def train_transform(self) -> Callable[..., dict[str, Any]]:
        """What is done with an example for training, on the host."""
        ...

    @property
    def eval_transform(self) -> Callable[..., dict[str, Any]]:
        """What is done with an example for evaluation, on the host."""
        ...

    @property
    def example(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of all that an example for training consists of."""
        ...

    def size(self, resolution: int) -> str:
        """Of an image at a resolution, in words."""
        ...

    def groups(self, source: Source) -> np.ndarray | None:
        """A number for each example, where only those of the same number can be in one batch."""
        ...

    def create_model(self, bandlimit: float | None = None) -> nnx.Module:
        """The network, as in a stage with this bandlimit, if there are stages."""
        ...

    def start_from_weights(self, model: nnx.Module) -> None:
        """Gives it the weights of `config.weights`, in place. Raises ConfigError for what does not fit."""
        ...

    def loss(self, stage: Stage) -> Loss:
        """See `ssm_jax.training.steps.make_train_step`."""
        ...

    def evaluate(self, resolution: int) -> Evaluate:
        """See `ssm_jax.training.steps.make_eval_step`."""
        ...

    def tally(self, source: Source) -> Tally:
        """Of an evaluation of these examples."""
        ...

    def table(self, scores: Scores, resolution: int) -> Table:
        """Scores of test images, for people; those at `resolution` are of the size of validation."""
        ...

    def leave(
        self, split: str, evaluations: Mapping[int, Evaluation], resolution: int, workdir: epath.Path
    ) -> dict[str, Figure]:
        """Writes what a run leaves of evaluations by resolution besides scores, and gives pictures by name."""
        ...

    def multiply_adds(self, model: nnx.Module, stage: Stage) -> float | None:
        """Of a forward pass of one image; None where nobody has counted them."""
        ...


def problem_of(config: Config, dataset: Dataset) -> Problem:
    """What there is to learn for the network of a config: detectors find objects, other networks tell classes."""
    from experiments.classification import ClassificationProblem
    from experiments.detection import DetectionProblem

    return (DetectionProblem if is_detector(config) else ClassificationProblem)(config, dataset)


def check_problem(config: Config) -> None:
    """Raises ConfigError for what a config says that its network has no use for."""
    if is_detector(config):
        from experiments import detection

        detection.check(config)


def load(config: Config, *, files: bool = True) -> Dataset:
    """Opens the dataset of a config, or describes it without its files, as its network takes it."""
    dataset = recipe.load(config.data, files=files)
    if not is_detector(config):
        return dataset
    from experiments.detection import dataset_of_objects

    return dataset_of_objects(config, dataset)


def is_detector(config: Config) -> bool:
    """Whether the network of a config finds objects: it has a backbone then."""
    return "backbone" in config.model
