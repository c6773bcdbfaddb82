"""An experiment: what a config describes, put together."""

import dataclasses
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ssm_jax
from experiments import smoke
from experiments.config import Config, ConfigError, check, section
from experiments.stages import Stage, plan, schedule
from experiments.weights import built, start_from_weights
from ssm_jax.chips import chip
from ssm_jax.data import recipe
from ssm_jax.data.datasets import Dataset, Source
from ssm_jax.data.pipeline import Batches, eval_batches, train_batches
from ssm_jax.data.resolution import normalize, resample
from ssm_jax.summary import summary
from ssm_jax.training.optimizer import make_optimizer, param_groups
from ssm_jax.training.schedules import ema_decay_at
from ssm_jax.training.scores import mean_scores
from ssm_jax.training.sharding import batch_sharding, gather, make_mesh, put_batch, replicated, state_shardings
from ssm_jax.training.statistics import ssm_statistics
from ssm_jax.training.steps import TrainState, init_state, make_eval_step, make_train_step
from ssm_jax.training.tasks import Classification, MultiLabel, Task

_OPTIMIZER = (
    *("name", "lr", "ssm_lr", "ssm_c_lr", "weight_decay"),
    *("clip_norm", "momentum", "b1", "b2", "eps"),
)
"""Fields of config.optimizer that are arguments of `make_optimizer`; the rest is of the schedule."""

_SCORES = {"coco": "mean_average_precision", "hmdb51": "video_accuracy"}
"""What tables compare networks by, where that is not the accuracy."""

_SMALL = 16_384
"""Bytes of an image, encoded or not, up to which one thread reads: more would contend for the interpreter's lock."""


class Interrupted(Exception):  # noqa: N818  (not an error)
    """An evaluation was asked to stop."""


class Evaluation(NamedTuple):
    """Of a split: mean scores, and of each example, in order, logits, label, and whether it could be read."""

    scores: dict[str, float]
    logits: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The parts of a run, made by `build`. Arrays come into being in `init`, and steps compile when first called."""

    config: Config
    dataset: Dataset
    mesh: jax.sharding.Mesh
    create_model: Callable[..., nnx.Module]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    stages: tuple[Stage, ...]
    """At least one, in order."""

    @property
    def resolution(self) -> int:
        """Resolution of the training images, at the end of training, and of validation."""
        return self.stages[-1].resolution

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return self.stages[-1].end

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training split."""
        return len(self.dataset.splits["train"]) // self.config.batch_size

    @functools.cached_property
    def abstract_model(self) -> nnx.Module:
        """The model, as it is at the end of training, with shapes for arrays."""
        return nnx.eval_shape(self.create_model)

    def _init(self) -> TrainState:
        return self._state(self.create_model())

    def _state(self, model: nnx.Module) -> TrainState:
        return init_state(model, self.optimizer, ema=self.config.ema_decay > 0)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of everything in the state."""
        abstract = jax.eval_shape(self._init)
        shardings = state_shardings(abstract, self.mesh, self.config.sharding_rules)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of a batch for training."""
        data, rows = self.dataset, self.config.batch_size
        frames = () if data.frames is None else (data.frames,)
        images = (rows, *frames, data.resolution, data.resolution, data.channels)
        labels = ((rows, data.num_classes), jnp.float32) if data.multi_label else ((rows,), jnp.int32)
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (shape, dtype) in {"image": (images, jnp.uint8), "label": labels}.items()
        }

    @functools.cached_property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def init(self) -> TrainState:
        """The state before the first step, on the mesh. Raises ConfigError for weights that do not fit."""
        if not self.config.weights:
            return jax.jit(self._init, out_shardings=self._shardings)()
        model = built(self.create_model)
        start_from_weights(self.config, model, _arguments(self.config, self.dataset))
        return jax.device_put(self._state(model), self._shardings)

    def _gather(self, params: Any) -> Any:
        return gather(params, self._shardings.params)

    @property
    def best_by(self) -> str:
        """The score of validation by which a checkpoint is the best."""
        return f"val/{_SCORES.get(self.config.data.name, 'accuracy')}"

    def ideal_seconds(self, stage: Stage) -> float | None:
        """Seconds of training per image if all devices did its matrix products at their peak; None if that is unknown.

        Products of a forward pass, and twice as many of a backward pass.
        """
        device = chip(self.mesh.devices.flat[0].device_kind)
        if device is None:
            return None
        frames = () if self.dataset.frames is None else (self.dataset.frames,)
        shape = (1, *frames, stage.resolution, stage.resolution, self.dataset.channels)
        nowhere = jax.sharding.AbstractMesh((), ())  # or only one device's part of the products would be seen
        with jax.sharding.use_abstract_mesh(nowhere):
            cost = summary(self.abstract_model, shape, rate=self.dataset.resolution / stage.resolution).total
        return 3 * 2 * cost.multiply_adds / (device.flops * self.mesh.size)

    @functools.cached_property
    def _ssm_statistics(self) -> Callable[[Any, Any], dict[str, jax.Array]]:
        graphdef = nnx.graphdef(self.abstract_model)
        return jax.jit(
            lambda params, rest: ssm_statistics(nnx.merge(graphdef, params, rest)), out_shardings=replicated(self.mesh)
        )

    def ssm_statistics(self, state: TrainState) -> dict[str, float]:
        """See `ssm_jax.training.statistics`."""
        return {name: float(x) for name, x in jax.device_get(self._ssm_statistics(state.params, state.rest)).items()}

    @property
    def task(self) -> Task:
        """What the dataset asks for."""
        if self.dataset.multi_label:
            return MultiLabel(self.dataset.num_classes)
        config = self.config
        return Classification(self.dataset.num_classes, config.label_smoothing, config.double_label_smoothing)

    def _normalize(self, images: jax.Array) -> jax.Array:
        return normalize(images, self.dataset.mean, self.dataset.std)

    @functools.cached_property
    def train_step(self) -> Callable[[Stage], Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]]:
        """The jitted train step by stage. It takes over the memory of the state that it is given."""
        config = self.config
        average = functools.partial(ema_decay_at, decay=config.ema_decay, warmup=config.ema_warmup)

        @functools.cache
        def at(stage: Stage):
            def prepare(images, targets, key):
                images, targets = recipe.augment_batch(self._normalize(images), targets, key, config.augment)
                return resample(images, stage.resolution), targets

            step = make_train_step(
                nnx.graphdef(nnx.eval_shape(functools.partial(self.create_model, bandlimit=stage.bandlimit))),
                self.task,
                prepare,
                self.optimizer,
                rate=self.dataset.resolution / stage.resolution,
                seed=config.seed,
                accumulate=config.accumulate,
                ema_decay=average if config.ema_decay else None,
                gather=self._gather,
            )
            return jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, replicated(self.mesh)))

        return at

    @functools.cached_property
    def eval_step(self) -> Callable[[int], Callable[[Any, Any, Any], dict[str, jax.Array]]]:
        """The jitted evaluation step by the resolution of the images."""
        # A network may have no dropout, or no batch norm.
        modes = {"deterministic": True, "use_running_average": True}
        graphdef = nnx.graphdef(nnx.view(self.abstract_model, **modes, raise_if_not_found=False))

        @functools.cache
        def at(resolution: int):
            def prepare(images):
                return resample(self._normalize(images), resolution)

            rate = self.dataset.resolution / resolution
            step = make_eval_step(graphdef, self.task, prepare, rate=rate, gather=self._gather)
            return jax.jit(step, out_shardings=replicated(self.mesh))

        return at

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Sends the rows that this process holds of a batch to the mesh."""
        return put_batch(batch, batch_sharding(self.mesh))

    def _reading(self, source: Source) -> dict[str, Any]:
        options = self.config.data
        image = source[0].get("image")  # None for a video
        small = image is not None and memoryview(image).nbytes <= _SMALL
        threads = 1 if small else os.cpu_count() or 1
        return {"threads": threads, "workers": options.workers, "max_broken": options.max_broken}

    @functools.cached_property
    def train_transform(self) -> Callable[..., dict[str, Any]]:
        """What is done with an example for training, on the host."""
        return recipe.train_transform(self.dataset, self.config.data, self.config.augment)

    @functools.cached_property
    def eval_transform(self) -> Callable[..., dict[str, Any]]:
        """What is done with an example for evaluation, on the host."""
        return recipe.eval_transform(self.dataset, self.config.data, self.config.eval)

    def train_batches(self, start: int = 0) -> Batches:
        """Batches of the training split from the step `start` on, see `ssm_jax.data.pipeline.train_batches`."""
        source = self.dataset.splits["train"]
        return train_batches(
            source,
            batch_size=self.config.batch_size,
            transform=self.train_transform,
            seed=self.config.seed,
            start=start,
            repeats=self.config.augment.repeats,
            **self._reading(source),
        )

    @functools.cached_property
    def _broken(self) -> defaultdict[int, set[int]]:
        """Numbers of the examples that could not be read, by source (val may be test): each is reported once."""
        return defaultdict(set)

    def evaluate(
        self, state: TrainState, split: str, resolution: int, *, stopping: Callable[[], bool] = lambda: False
    ) -> Evaluation:
        """Scores a split, exactly, whatever the number of devices, see `ssm_jax.training.scores.mean_scores`.

        Scores of averaged parameters, if the state has them, begin with `ema_`. Raises Interrupted as soon as
        `stopping`, which is asked after each batch, says so.
        """
        source = self.dataset.splits[split]
        params = {"": state.params} | ({} if state.ema is None else {"ema_": state.ema})
        rows = self._rows(params, state.rest, split, resolution, stopping)
        options: dict[str, Any] = {
            "groups": getattr(source, "groups", None),  # the videos of clips
            "multi_label": self.dataset.multi_label,
        }
        scores = {
            f"{prefix}{name}": value
            for prefix, part in rows.items()
            for name, value in mean_scores(part, **options).items()
        }
        return Evaluation(scores, *(rows[""][name] for name in ("logits", "label", "mask")))

    def _rows(
        self, params: Mapping[str, Any], rest: Any, split: str, resolution: int, stopping: Callable[[], bool]
    ) -> dict[str, dict[str, np.ndarray]]:
        """For each of several parameters, what the evaluation step returns for all examples, in order."""
        source = self.dataset.splits[split]
        batches = eval_batches(
            source,
            batch_size=-(-self.config.eval.batch_size // self.mesh.size) * self.mesh.size,
            transform=self.eval_transform,
            broken=self._broken[id(source)],
            **self._reading(source),
        )
        step = self.eval_step(resolution)
        done, running = [], None
        for batch in map(self.put, batches):
            results = {prefix: step(some, rest, batch) for prefix, some in params.items()}
            if running is not None:  # devices have one batch to do, and not all of them in memory
                done.append(jax.device_get(running))
            running = results
            if stopping():
                raise Interrupted
        done.append(jax.device_get(running))
        return {
            prefix: {name: np.concatenate([d[prefix][name] for d in done])[: len(source)] for name in rows}
            for prefix, rows in done[0].items()
        }


def build(config: Config, *, files: bool = True, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Puts an experiment together. Raises ConfigError, before anything is compiled, for what cannot work.

    Without `files` it has all but data, see `ssm_jax.data.datasets.load_dataset`. Its `devices`, by default all of this
    program, need not exist where it is only compiled, see `ssm_jax.topologies`.
    """
    check(config)
    _check_mixing(config, parts=1)
    if config.smoke:
        config = smoke.cut(config, jax.device_count() if devices is None else len(devices))
        check(config)
    with section(config, "data"):
        dataset = recipe.load(config.data, files=files)
    if config.smoke:
        dataset = smoke.shorten(dataset, config)
    with section(config, "augment"):
        recipe.train_transform(dataset, config.data, config.augment)
    with section(config, "eval"):
        recipe.eval_transform(dataset, config.data, config.eval)
    with section(config, "mesh"):
        mesh = make_mesh(config.mesh.to_dict(), devices)
    n_train, parts = len(dataset.splits["train"]), mesh.size * config.accumulate
    if config.batch_size % parts or config.batch_size > n_train:
        raise ConfigError(
            f"config.batch_size must be a multiple of {parts} ({mesh.size} devices x accumulate={config.accumulate}) "
            f"and at most {n_train}, the images of {config.data.name}, got {config.batch_size}."
        )
    _check_mixing(config, parts=mesh.size)
    stages = plan(config, dataset.resolution, n_train // config.batch_size)
    create = functools.partial(_create, config, dataset, bandlimit=stages[-1].bandlimit)
    with section(config, "model"):
        params = nnx.state(nnx.eval_shape(functools.partial(create, bandlimit=None)), nnx.Param)
    with section(config, "sharding_rules"):
        state_shardings(nnx.to_pure_dict(params), mesh, config.sharding_rules)
    if limited := [stage.bandlimit for stage in stages if stage.bandlimit is not None]:
        with section(config, "stages.bandlimits"):  # not every network has a mixer with one
            nnx.eval_shape(functools.partial(create, bandlimit=limited[0]))
    rates = functools.partial(schedule, config.optimizer, stages, n_train // config.batch_size)
    with section(config, "optimizer"):
        options = {name: config.optimizer[name] for name in _OPTIMIZER}
        optimizer = make_optimizer(param_groups(params, config.optimizer.decay_rule), rates, **options)
    return Experiment(config, dataset, mesh, create, optimizer, rates(config.optimizer.lr), stages)


def _check_mixing(config: Config, parts: int) -> None:
    """Refuses groups that do not fit the batch, or `parts` devices that share it: each would compute with all of it."""
    rows, group = config.batch_size // config.accumulate, config.augment.mix_group
    if not (config.augment.mixup or config.augment.cutmix) or group >= rows:
        return
    if rows % group:
        raise ConfigError(
            f"config.augment.mix_group must divide the {rows} rows of batch_size={config.batch_size} / accumulate="
            f"{config.accumulate}, or be larger, got {group}."
        )
    if group % (rows // parts) and (rows // parts) % group:
        raise ConfigError(
            f"config.augment.mix_group must divide the {rows // parts} rows of each of {parts} devices, or be a "
            f"multiple of them, got {group}."
        )


def _create(config: Config, dataset: Dataset, bandlimit: float | None = None) -> nnx.Module:
    """The model as in a stage with this bandlimit, if there are stages."""
    arguments = _arguments(config, dataset)
    if config.stages.epochs:
        arguments.get("mixer", {}).pop("bandlimit", None)
    if bandlimit is not None:
        arguments["mixer"] = {**arguments.get("mixer", {}), "bandlimit": bandlimit}
    return ssm_jax.create_model(rngs=nnx.Rngs(config.seed), **arguments)


def _arguments(config: Config, dataset: Dataset) -> dict[str, Any]:
    """Those of `ssm_jax.create_model` but for `rngs`."""
    given = {"num_classes": dataset.num_classes, "in_channels": dataset.channels, "dtype": jnp.dtype(config.dtype)}
    return {**config.model.to_dict(), **given}
