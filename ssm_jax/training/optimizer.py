"""AdamW and SGD with one learning-rate schedule and named parameter groups."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx

from ssm_jax.layers.ssm_kernel import SSMParam


def param_group(path: tuple, variable: nnx.Variable) -> str:
    """Names the group of a parameter.

    * `ssm`: dt, A, B, P of a state space (the type `SSMParam`): own learning rate, no weight decay.
    * `no_decay`: biases and the scales of norms.
    * `decay`: everything else, C and D of a state space too (S4ND's recipe for CIFAR-10).
    """
    if isinstance(variable, SSMParam):
        return "ssm"
    return "no_decay" if path[-1] in ("bias", "scale") else "decay"


def param_groups(params: nnx.State) -> dict[str, Any]:
    """Labels every parameter of `nnx.state(model, nnx.Param)`, as a tree of the same shape with names for leaves."""
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    labels = jax.tree_util.tree_map_with_path(
        lambda path, variable: param_group(tuple(key.key for key in path), variable), params, is_leaf=is_variable
    )
    return nnx.to_pure_dict(labels)


def warmup_cosine(peak: float, *, warmup_steps: int, total_steps: int, end: float = 0.0) -> optax.Schedule:
    """Linear from 0 over `warmup_steps`, then half a cosine down to `end` at `total_steps`."""
    if total_steps < 1 or not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warm-up must be shorter than training: got warmup_steps={warmup_steps}, total_steps={total_steps}."
        )
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps, end)


def learning_rate(
    peak: float, *, warmup_steps: int, total_steps: int, end: float = 0.0, milestones: Sequence[int] = ()
) -> optax.Schedule:
    """`warmup_cosine` or, with `milestones`, a warm-up and then `peak`, of which each of these steps leaves a tenth."""
    cosine = warmup_cosine(peak, warmup_steps=warmup_steps, total_steps=total_steps, end=end)
    if not milestones:
        return cosine
    if end:
        raise ValueError(f"end_lr must be 0 where milestones say how the rate falls, got {end}.")
    if min(milestones) < warmup_steps:
        raise ValueError(f"milestones must not be before the end of the warm-up, {warmup_steps}, got {milestones}.")
    falls = optax.piecewise_constant_schedule(peak, {step - warmup_steps: 0.1 for step in milestones})
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), falls], [warmup_steps])


def make_optimizer(
    labels: Mapping[str, Any],
    *,
    name: str = "adamw",
    lr: float,
    ssm_lr: float,
    weight_decay: float,
    warmup_steps: int,
    total_steps: int,
    end_lr: float = 0.0,
    milestones: Sequence[int] = (),
    clip_norm: float | None = None,
    momentum: float = 0.9,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW or SGD with momentum for parameters labelled by `param_groups`.

    All groups follow the same schedule, see `learning_rate`: `lr` (`ssm_lr` for the group `ssm`) is its peak and
    `end_lr` its end. `weight_decay` is for the group `decay` alone, and is what PyTorch's optimizers do: in `adamw` it
    is multiplied by the learning rate, in `sgd` it belongs to the gradient that the momentum takes in. `clip_norm`
    bounds the norm of all gradients together; None leaves them. `momentum` is for `sgd`; `b1`, `b2`, `eps` for `adamw`.
    """
    rules = {
        "adamw": lambda rate, decay: optax.adamw(rate, b1, b2, eps, weight_decay=decay),
        "sgd": lambda rate, decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum)),
    }
    if name not in rules:
        raise ValueError(f"name must be one of {', '.join(rules)}, got {name!r}.")

    def group(peak: float, decay: float) -> optax.GradientTransformation:
        rate = learning_rate(
            peak, warmup_steps=warmup_steps, total_steps=total_steps, end=end_lr, milestones=milestones
        )
        return rules[name](rate, decay)

    groups: dict[Hashable, optax.GradientTransformation] = {
        "decay": group(lr, weight_decay),
        "no_decay": group(lr, 0.0),
        "ssm": group(ssm_lr, 0.0),
    }
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.partition(groups, labels))
