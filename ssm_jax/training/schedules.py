"""Learning rates, and weights of averages, as functions of the step."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def learning_rate(
    peak: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_lr: float = 0.0,
    warmup_prefix: bool = True,
    end_lr: float = 0.0,
    milestones: Sequence[int] = (),
    hold_steps: int = 1,
) -> optax.Schedule:
    """A line from `warmup_lr` to `peak`, then half a cosine down to `end_lr`, or a fall at each of the `milestones`.

    The recipes of the papers, with E steps in an epoch:

    * S4ND on CIFAR-10, per step, to 0: `warmup_steps`, `total_steps`.
    * timm's `CosineLRScheduler`, as S4ND on ImageNet, DeiT and PVTv2 use it: `warmup_prefix=False`, `hold_steps=E`.
      Swin's code had the same per step when its paper was written, and has the prefix now.
    * RLA: `milestones=(30 * E, 60 * E, 90 * E)`, `hold_steps=E`; MRLA also warms up, from 1e-4 for 3 epochs.

    Args:
        peak: rate after the warm-up. A group with a peak of 0 is frozen: its rate is 0 throughout.
        total_steps: where the cosine ends. The rate is `end_lr` from there on.
        warmup_steps: length of the line.
        warmup_lr: rate at step 0, whatever the peak is.
        warmup_prefix: begin the cosine where the line ends. If False, the cosine begins at step 0 and the line takes
            the place of its first part: after a warm-up, the rate is already below `peak`.
        end_lr: rate at the end, whatever the peak is.
        milestones: steps, instead of a cosine, of which each leaves a tenth of the rate.
        hold_steps: keep the rate of a multiple of so many steps up to the next one: E for rates per epoch.

    Raises:
        ValueError: for an impossible value.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}.")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must be at least 0 and less than total_steps={total_steps}, got {warmup_steps}."
        )
    if hold_steps < 1:
        raise ValueError(f"hold_steps must be at least 1, got {hold_steps}.")
    for name, rate in [("peak", peak), ("warmup_lr", warmup_lr), ("end_lr", end_lr)]:
        if not rate >= 0:
            raise ValueError(f"{name} must be at least 0, got {rate}.")
    if milestones and end_lr:
        raise ValueError(f"end_lr must be 0 where milestones say how the rate falls, got {end_lr}.")
    if milestones and min(milestones) < warmup_steps:
        raise ValueError(f"milestones must not be before the end of the warm-up, {warmup_steps}, got {milestones}.")
    if not peak:
        return optax.constant_schedule(0.0)
    cosine_steps = total_steps - (warmup_steps if warmup_prefix else 0)

    def schedule(step: ArrayLike) -> ArrayLike:
        step = jnp.asarray(step, jnp.int32) // hold_steps * hold_steps
        if milestones:
            passed = (step >= jnp.asarray(milestones, jnp.int32)).sum()
            rate = peak * 0.1 ** passed.astype(jnp.float32)
        else:
            angle = jnp.pi / 2 * (jnp.maximum(total_steps - step, 0) / cosine_steps)
            # sin(x)^2 is (1 + cos(pi - 2 x)) / 2, without its cancellation near the end.
            rate = peak * jnp.sin(angle) ** 2 + end_lr * jnp.cos(angle) ** 2
        line = warmup_lr + (peak - warmup_lr) * (step / max(warmup_steps, 1))
        return jnp.where(step < warmup_steps, line, rate)

    return schedule


def restarted(stages: Sequence[tuple[int, optax.Schedule]]) -> optax.Schedule:
    """One schedule after another, each from its own step 0, as progressive resizing has it.

    `stages` are the number of steps and the schedule of each; the last one goes on.
    """
    if not stages or min(steps for steps, _ in stages) < 1:
        raise ValueError(f"stages must be one or more of at least 1 step, got {[steps for steps, _ in stages]} steps.")
    steps, schedules = zip(*stages, strict=True)
    return optax.join_schedules(schedules, list(itertools.accumulate(steps))[:-1])


def ema_decay_at(step: ArrayLike, decay: float, *, warmup: bool = False) -> ArrayLike:
    """Weight of the old value in an exponential moving average of parameters, at the update after `step` others.

    With `warmup`, min(`decay`, 1 - (1 + step)^(-2/3)), as in timm's `ModelEmaV3(use_warmup=True)`: the average begins
    with the parameters after the first update, and not with their initial values.
    """
    if not warmup:
        return decay
    return jnp.minimum(decay, 1 - (1 + jnp.asarray(step, jnp.float32)) ** (-2 / 3))
