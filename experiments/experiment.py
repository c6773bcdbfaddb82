"""An experiment: what a config describes, put together."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ssm_jax
from experiments.config import Config, ConfigError, check, section
from ssm_jax.data.augment import Augment
from ssm_jax.data.datasets import Dataset, load_dataset
from ssm_jax.data.pipeline import eval_batches, train_batches
from ssm_jax.data.resolution import normalize, resample
from ssm_jax.training.optimizer import learning_rate, make_optimizer, param_groups
from ssm_jax.training.sharding import batch_sharding, make_mesh, put_batch, replicated, state_shardings
from ssm_jax.training.steps import Classification, TrainState, init_state, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The parts of a run, made by `build`. Arrays come into being in `init`, and steps compile when first called."""

    config: Config
    dataset: Dataset
    mesh: jax.sharding.Mesh
    create_model: Callable[[], nnx.Module]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    total_steps: int

    @property
    def resolution(self) -> int:
        """Resolution of the training images."""
        return self.config.data.resolution or self.dataset.resolution

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training split."""
        return len(self.dataset.splits["train"]) // self.config.batch_size

    @functools.cached_property
    def abstract_model(self) -> nnx.Module:
        """The model with shapes for arrays."""
        return nnx.eval_shape(self.create_model)

    def _init(self) -> TrainState:
        return init_state(self.create_model(), self.optimizer, ema=self.config.ema_decay > 0)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of everything in the state."""
        abstract = jax.eval_shape(self._init)
        shardings = state_shardings(abstract, self.mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)

    @functools.cached_property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def init(self) -> TrainState:
        """The state before the first step, on the mesh."""
        return jax.jit(self._init, out_shardings=self._shardings)()

    def _task(self, resolution: int) -> Classification:
        mean, std = self.dataset.mean, self.dataset.std
        return Classification(
            num_classes=self.dataset.num_classes,
            prepare=lambda images: resample(normalize(images, mean, std), resolution),
            label_smoothing=self.config.label_smoothing,
        )

    @functools.cached_property
    def train_step(self) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
        """The jitted train step. It takes over the memory of the state that it is given."""
        step = make_train_step(
            nnx.graphdef(self.abstract_model),
            self._task(self.resolution),
            self.optimizer,
            rate=self.dataset.resolution / self.resolution,
            seed=self.config.seed,
            accumulate=self.config.accumulate,
            ema_decay=self.config.ema_decay,
        )
        return jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, replicated(self.mesh)))

    @functools.cached_property
    def eval_step(self) -> Callable[[int], Callable[[TrainState, Any], tuple[dict[str, jax.Array], jax.Array]]]:
        """The jitted evaluation step by the resolution of the images."""
        # A network may have no dropout, or no batch norm.
        modes = {"deterministic": True, "use_running_average": True}
        graphdef = nnx.graphdef(nnx.view(self.abstract_model, **modes, raise_if_not_found=False))

        @functools.cache
        def at(resolution: int):
            step = make_eval_step(graphdef, self._task(resolution), rate=self.dataset.resolution / resolution)
            return jax.jit(step, out_shardings=replicated(self.mesh))

        return at

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Sends the rows that this process holds of a batch to the mesh."""
        return put_batch(batch, batch_sharding(self.mesh))

    def train_batches(self):
        """An iterator over batches of the training split, see `ssm_jax.data.pipeline.train_batches`."""
        return train_batches(
            self.dataset.splits["train"],
            batch_size=self.config.batch_size,
            augment=_augment(self.config),
            seed=self.config.seed,
        )

    def evaluate(self, state: TrainState, split: str, resolution: int) -> tuple[dict[str, float], np.ndarray]:
        """Mean loss and accuracy over a split, exact for any number of devices, and all logits, in order."""
        source = self.dataset.splits[split]
        batch_size = -(-self.config.eval.batch_size // self.mesh.size) * self.mesh.size
        step = self.eval_step(resolution)
        outputs = [step(state, self.put(batch)) for batch in eval_batches(source, batch_size=batch_size)]
        sums, logits = zip(*jax.device_get(outputs), strict=True)
        total = {name: sum(part[name] for part in sums) for name in sums[0]}
        count = total.pop("count")
        return {name: float(value / count) for name, value in total.items()}, np.concatenate(logits)[: len(source)]


def build(config: Config) -> Experiment:
    """Puts an experiment together. Raises ConfigError, before anything is compiled, for what cannot work."""
    check(config)
    with section(config, "data"):
        dataset = load_dataset(config.data.name, config.data.dir or None, image_size=config.data.image_size)
        _augment(config)
    with section(config, "mesh"):
        mesh = make_mesh(config.mesh.to_dict())
    n_train, parts = len(dataset.splits["train"]), mesh.size * config.accumulate
    if config.batch_size % parts or config.batch_size > n_train:
        raise ConfigError(
            f"config.batch_size must be a multiple of {parts} ({mesh.size} devices x accumulate={config.accumulate}) "
            f"and at most {n_train}, the images of {config.data.name}, got {config.batch_size}."
        )
    with section(config, "model"):
        create = _model_constructor(config, dataset)
        params = nnx.state(nnx.eval_shape(create), nnx.Param)
    steps_per_epoch = n_train // config.batch_size
    total_steps = max(1, round(config.epochs * steps_per_epoch))
    options = config.optimizer.to_dict()
    rate = {
        "warmup_steps": min(round(options.pop("warmup_epochs") * steps_per_epoch), total_steps - 1),
        "total_steps": total_steps,
        "milestones": [round(epoch * steps_per_epoch) for epoch in options.pop("decay_epochs")],
    }
    with section(config, "optimizer"):
        optimizer = make_optimizer(param_groups(params), **rate, **options)
        schedule = learning_rate(options["lr"], end=options["end_lr"], **rate)
    return Experiment(config, dataset, mesh, create, optimizer, schedule, total_steps)


def _augment(config: Config) -> Augment:
    return Augment(crop_padding=config.data.crop_padding, flip=config.data.flip)


def _model_constructor(config: Config, dataset: Dataset) -> Callable[[], nnx.Module]:
    arguments = config.model.to_dict()
    arguments |= {"num_classes": dataset.num_classes, "in_channels": dataset.channels, "dtype": jnp.dtype(config.dtype)}
    return lambda: ssm_jax.create_model(rngs=nnx.Rngs(config.seed), **arguments)
