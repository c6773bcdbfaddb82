"""AdamW with one learning-rate schedule and named parameter groups."""

from collections.abc import Hashable, Mapping
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


def make_optimizer(
    labels: Mapping[str, Any],
    *,
    lr: float,
    ssm_lr: float,
    weight_decay: float,
    warmup_steps: int,
    total_steps: int,
    end_lr: float = 0.0,
    clip_norm: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW for parameters labelled by `param_groups`.

    All groups follow the same schedule: `lr` (`ssm_lr` for the group `ssm`) is its peak and `end_lr` its end.
    `weight_decay` is for the group `decay` alone and is multiplied by the learning rate, as in PyTorch's AdamW.
    `clip_norm` bounds the norm of all gradients together; None leaves them.
    """

    def adamw(peak: float, decay: float) -> optax.GradientTransformation:
        schedule = warmup_cosine(peak, warmup_steps=warmup_steps, total_steps=total_steps, end=end_lr)
        return optax.adamw(schedule, b1, b2, eps, weight_decay=decay)

    groups: dict[Hashable, optax.GradientTransformation] = {
        "decay": adamw(lr, weight_decay),
        "no_decay": adamw(lr, 0.0),
        "ssm": adamw(ssm_lr, 0.0),
    }
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.partition(groups, labels))
