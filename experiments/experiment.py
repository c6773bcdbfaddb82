"""An experiment: what a config describes, put together."""

import dataclasses
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from experiments import smoke
from experiments.config import Config, ConfigError, check, section
from experiments.problem import Evaluation, Problem, Rows, check_problem, load, problem_of
from experiments.stages import Stage, plan, schedule
from experiments.weights import built
from ssm_jax.chips import chip
from ssm_jax.data.datasets import Dataset, Source
from ssm_jax.data.pipeline import Batches, batches_per_epoch, eval_batches, train_batches
from ssm_jax.training.optimizer import freeze, make_optimizer, param_groups
from ssm_jax.training.schedules import ema_decay_at
from ssm_jax.training.sharding import batch_sharding, gather, make_mesh, put_batch, replicated, state_shardings
from ssm_jax.training.statistics import ssm_statistics
from ssm_jax.training.steps import TrainState, init_state, make_eval_step, make_train_step

_OPTIMIZER = (
    *("name", "lr", "ssm_lr", "ssm_c_lr", "weight_decay"),
    *("clip_norm", "momentum", "b1", "b2", "eps"),
)
"""Fields of config.optimizer that are arguments of `make_optimizer`; the rest is of the schedule."""

_SMALL = 16_384
"""Bytes of an image, encoded or not, up to which one thread reads: more would contend for the interpreter's lock."""


class Interrupted(Exception):  # noqa: N818  (not an error)
    """An evaluation was asked to stop."""


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The parts of a run, made by `build`. Arrays come into being in `init`, and steps compile when first called."""

    config: Config
    dataset: Dataset
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    stages: tuple[Stage, ...]
    """At least one, in order."""

    def with_frames(self, frames: int) -> "Experiment":
        """The same with clips of so many frames in the same time."""
        return dataclasses.replace(self, dataset=dataclasses.replace(self.dataset, frames=frames))

    @functools.cached_property
    def problem(self) -> Problem:
        """What is to be learned."""
        return problem_of(self.config, self.dataset)

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
        """Batches in the training split."""
        return _steps_per_epoch(self.problem, self.dataset, self.config.batch_size)

    @functools.cached_property
    def abstract_model(self) -> nnx.Module:
        """The model, as it is at the end of training, with shapes for arrays."""
        return nnx.eval_shape(self._create_model)

    def _create_model(self) -> nnx.Module:
        return self.problem.create_model(self.stages[-1].bandlimit)

    def _init(self) -> TrainState:
        return self._state(self._create_model())

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
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct((self.config.batch_size, *shape), dtype, sharding=sharding)
            for name, (shape, dtype) in self.problem.example.items()
        }

    @functools.cached_property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def init(self) -> TrainState:
        """The state before the first step, on the mesh. Raises ConfigError for weights that do not fit."""
        if not self.config.weights:
            return jax.jit(self._init, out_shardings=self._shardings)()
        model = built(self._create_model)
        self.problem.start_from_weights(model)
        return jax.device_put(self._state(model), self._shardings)

    @functools.cached_property
    def groups(self) -> dict[str, Any]:
        """Of the parameters, see `ssm_jax.training.optimizer.param_group`."""
        return _groups(self.config, nnx.state(self.abstract_model, nnx.Param))

    def _gather(self, params: Any) -> Any:
        return gather(freeze(params, self.groups), self._shardings.params)

    @property
    def best_by(self) -> str:
        """The score of validation by which a checkpoint is the best."""
        return f"val/{self.problem.score}"

    def ideal_seconds(self, stage: Stage) -> float | None:
        """Seconds of training per image if all devices did its matrix products at their peak; None if that is unknown.

        Products of a forward pass, and twice as many of a backward pass.
        """
        device = chip(self.mesh.devices.flat[0].device_kind)
        if device is None:
            return None
        nowhere = jax.sharding.AbstractMesh((), ())  # or only one device's part of the products would be seen
        with jax.sharding.use_abstract_mesh(nowhere):
            multiply_adds = self.problem.multiply_adds(self.abstract_model, stage)
        return None if multiply_adds is None else 3 * 2 * multiply_adds / (device.flops * self.mesh.size)

    @functools.cached_property
    def _ssm_statistics(self) -> Callable[[Any, Any], dict[str, jax.Array]]:
        graphdef = nnx.graphdef(self.abstract_model)
        return jax.jit(
            lambda params, rest: ssm_statistics(nnx.merge(graphdef, params, rest)), out_shardings=replicated(self.mesh)
        )

    def ssm_statistics(self, state: TrainState) -> dict[str, float]:
        """See `ssm_jax.training.statistics`."""
        return {name: float(x) for name, x in jax.device_get(self._ssm_statistics(state.params, state.rest)).items()}

    @functools.cached_property
    def train_step(self) -> Callable[[Stage], Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]]:
        """The jitted train step by stage. It takes over the memory of the state that it is given."""
        config = self.config
        average = functools.partial(ema_decay_at, decay=config.ema_decay, warmup=config.ema_warmup)

        @functools.cache
        def at(stage: Stage):
            create = functools.partial(self.problem.create_model, stage.bandlimit)
            step = make_train_step(
                nnx.graphdef(nnx.eval_shape(create)),
                self.problem.loss(stage),
                self.optimizer,
                seed=config.seed,
                accumulate=config.accumulate,
                ema_decay=average if config.ema_decay else None,
                gather=self._gather,
            )
            return jax.jit(step, donate_argnums=0, out_shardings=(self._shardings, replicated(self.mesh)))

        return at

    def check_evaluation(self) -> None:
        """Raises ValueError, after tracing alone, if the network cannot be evaluated on what there is."""
        rows = self.mesh.size
        batch = {
            name: jax.ShapeDtypeStruct((rows, *shape), dtype)
            for name, (shape, dtype) in {**self.problem.example, "mask": ((), np.bool_)}.items()
        }
        with jax.set_mesh(self.mesh):
            state = self.abstract_state
            jax.eval_shape(self.eval_step(self.resolution), state.params, state.rest, batch)

    @functools.cached_property
    def eval_step(self) -> Callable[[int], Callable[[Any, Any, Any], dict[str, jax.Array]]]:
        """The jitted evaluation step by the resolution of the images."""
        # A network may have no dropout, or no batch norm.
        modes = {"deterministic": True, "use_running_average": True}
        graphdef = nnx.graphdef(nnx.view(self.abstract_model, **modes, raise_if_not_found=False))

        @functools.cache
        def at(resolution: int):
            step = make_eval_step(graphdef, self.problem.evaluate(resolution), gather=self._gather)
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

    def train_batches(self, start: int = 0) -> Batches:
        """Batches of the training split from the step `start` on, see `ssm_jax.data.pipeline.train_batches`."""
        source = self.dataset.splits["train"]
        return train_batches(
            source,
            batch_size=self.config.batch_size,
            transform=self.problem.train_transform,
            groups=self.problem.groups(source),
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
        """Scores a split, exactly, whatever the number of devices.

        Scores of averaged parameters, if the state has them, begin with `ema_`; the rows are those of the others.
        Raises Interrupted as soon as `stopping`, which is asked after each batch, says so.
        """
        source = self.dataset.splits[split]
        params = {"": state.params} | ({} if state.ema is None else {"ema_": state.ema})
        tallies = {prefix: self.problem.tally(source) for prefix in params}
        for results in self._rows(params, state.rest, source, resolution, stopping):
            for prefix, rows in results.items():
                tallies[prefix].add(rows)
        found = {prefix: tally.evaluation() for prefix, tally in tallies.items()}
        scores = {f"{prefix}{name}": value for prefix, of in found.items() for name, value in of.scores.items()}
        return Evaluation(scores, found[""].rows)

    def _rows(
        self, params: Mapping[str, Any], rest: Any, source: Source, resolution: int, stopping: Callable[[], bool]
    ) -> Iterator[dict[str, Rows]]:
        """For each of several parameters, what the evaluation step returns for each batch."""
        batches = eval_batches(
            source,
            batch_size=-(-self.config.eval.batch_size // self.mesh.size) * self.mesh.size,
            transform=self.problem.eval_transform,
            groups=self.problem.groups(source),
            broken=self._broken[id(source)],
            **self._reading(source),
        )
        step = self.eval_step(resolution)
        running = None
        for batch in map(self.put, batches):
            results = {prefix: step(some, rest, batch) for prefix, some in params.items()}
            if running is not None:  # devices have one batch to do, and not all of them in memory
                yield jax.device_get(running)
            running = results
            if stopping():
                raise Interrupted
        yield jax.device_get(running)


def _groups(config: Config, params: nnx.State) -> dict[str, Any]:
    return param_groups(params, config.optimizer.decay_rule, config.optimizer.frozen)


def _steps_per_epoch(problem: Problem, dataset: Dataset, batch_size: int) -> int:
    return batches_per_epoch(dataset.splits["train"], batch_size, problem.groups(dataset.splits["train"]))


def build(config: Config, *, files: bool = True, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Puts an experiment together. Raises ConfigError, before anything is compiled, for what cannot work.

    Without `files` it has all but data, see `ssm_jax.data.datasets.load_dataset`. Its `devices`, by default all of this
    program, need not exist where it is only compiled, see `ssm_jax.topologies`.
    """
    check(config)
    check_problem(config)
    _check_mixing(config, parts=1)
    if config.smoke:
        config = smoke.cut(config, jax.device_count() if devices is None else len(devices))
        check(config)
    with section(config, "data"):
        dataset = load(config, files=files)
    if config.smoke:
        dataset = smoke.shorten(dataset, config)
    problem = problem_of(config, dataset)
    with section(config, "augment"):
        _ = problem.train_transform
    with section(config, "eval"):
        _ = problem.eval_transform
    with section(config, "mesh"):
        mesh = make_mesh(config.mesh.to_dict(), devices)
    n_train, parts = len(dataset.splits["train"]), mesh.size * config.accumulate
    if config.batch_size % parts or config.batch_size > n_train:
        raise ConfigError(
            f"config.batch_size must be a multiple of {parts} ({mesh.size} devices x accumulate={config.accumulate}) "
            f"and at most {n_train}, the images of {config.data.name}, got {config.batch_size}."
        )
    _check_mixing(config, parts=mesh.size)
    steps_per_epoch = _steps_per_epoch(problem, dataset, config.batch_size)
    stages = plan(config, dataset.resolution, steps_per_epoch)
    with section(config, "model"):
        params = nnx.state(nnx.eval_shape(problem.create_model), nnx.Param)
    with section(config, "sharding_rules"):
        state_shardings(nnx.to_pure_dict(params), mesh, config.sharding_rules)
    if limited := [stage.bandlimit for stage in stages if stage.bandlimit is not None]:
        with section(config, "stages.bandlimits"):  # not every network has a mixer with one
            nnx.eval_shape(functools.partial(problem.create_model, limited[0]))
    rates = functools.partial(schedule, config.optimizer, stages, steps_per_epoch)
    with section(config, "optimizer"):
        options = {name: config.optimizer[name] for name in _OPTIMIZER}
        optimizer = make_optimizer(_groups(config, params), rates, **options)
    experiment = Experiment(config, dataset, mesh, optimizer, rates(config.optimizer.lr), stages)
    if config.eval.frames:
        if dataset.frames is None:
            raise ConfigError(f"config.eval.frames is for videos, got {config.eval.frames} for {config.data.name}.")
        with section(config, "eval.frames"):  # not every network takes every number
            for frames in config.eval.frames:
                experiment.with_frames(frames).check_evaluation()
    return experiment


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
