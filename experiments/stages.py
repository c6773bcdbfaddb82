"""The stages of a run, which progressive resizing has several of, and the learning rate over them."""

import itertools
from typing import NamedTuple

import optax

from experiments.config import Config, ConfigError
from ssm_jax.training.schedules import learning_rate, restarted


class Stage(NamedTuple):
    """A part of training at one resolution, up to the step `end`."""

    resolution: int
    bandlimit: float | None
    end: int


def plan(config: Config, base: int, steps_per_epoch: int) -> tuple[Stage, ...]:
    """The stages of progressive resizing, or one."""
    options = config.stages
    if not options.epochs:
        resolution = config.data.resolution or base
        return (Stage(resolution, None, max(1, round(config.epochs * steps_per_epoch))),)
    ends = [round(epochs * steps_per_epoch) for epochs in itertools.accumulate(options.epochs)]
    if len({0, *ends}) <= len(ends):
        raise ConfigError(
            f"config.stages.epochs must be of at least one step each, of {steps_per_epoch} per epoch, "
            f"got {options.epochs}."
        )
    bandlimits = [bandlimit or None for bandlimit in options.bandlimits]
    return tuple(map(Stage, options.resolutions, bandlimits, ends))


def schedule(options: Config, stages: tuple[Stage, ...], steps_per_epoch: int, peak: float) -> optax.Schedule:
    """The learning rate of a group of parameters with this peak: each stage warms up and falls for itself."""

    def steps(epochs: float) -> int:
        return round(epochs * steps_per_epoch)

    parts, start = [], 0
    for stage in stages:
        length = stage.end - start
        total = length if options.cosine_epochs is None else steps(options.cosine_epochs)
        rate = learning_rate(
            peak,
            total_steps=total,
            warmup_steps=min(steps(options.warmup_epochs), total - 1),
            warmup_lr=options.warmup_lr,
            warmup_prefix=options.warmup_prefix,
            end_lr=options.end_lr,
            milestones=[steps(epochs) for epochs in options.decay_epochs],
            hold_steps=steps_per_epoch if options.per_epoch else 1,
        )
        parts.append((length, rate))
        start = stage.end
    return restarted(parts)
