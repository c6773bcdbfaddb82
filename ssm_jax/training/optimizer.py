"""AdamW, LAMB and SGD with named parameter groups, each with a learning rate and a weight decay of its own."""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

from ssm_jax.layers.ssm_kernel import SSMParam

GROUPS = ("decay", "no_decay", "ssm", "ssm_c", "frozen")
"""The groups of parameters."""

_DECAYED: dict[str, Callable[[str, int], bool]] = {
    "all": lambda name, ndim: True,
    "weights": lambda name, ndim: name not in ("bias", "scale"),
    "matrices": lambda name, ndim: (
        ndim > 1
        and name not in ("bias", "scale", "cls_token", "dist_token", "pos_embed", "relative_position_bias_table")
    ),
}
"""Whether a parameter decays, by its name in its module and its number of axes."""


def param_group(path: tuple, variable: nnx.Variable, decay_rule: str = "weights", frozen: Collection[str] = ()) -> str:
    """Names the group of a parameter.

    * `ssm`: dt, A, B, P of a state space (the type `SSMParam`): a learning rate of its own, no weight decay.
    * `ssm_c`: C of an S4ND layer. It decays, and may have a learning rate of its own.
    * `decay`: what `decay_rule` names of all others.
    * `no_decay`: the rest.
    * `frozen`: what `frozen` names, of whatever kind: it stays as it is, and the optimizer keeps nothing for it.

    Args:
        path: of the parameter in the model.
        variable: the parameter.
        decay_rule: which parameters decay.

            * `weights`: all but biases and the scales of norms: S4ND's networks.
            * `matrices`: also no vectors, such as the factors of layer scale, and no class tokens, position embeddings
              and tables of position biases: timm, and with it DeiT, Swin and PVTv2.
            * `all`: ResNets, RLA and MRLA with SGD, and S4ND on CIFAR-10 when its paper was written.
        frozen: names of parameters, or of modules with all of theirs: `("backbone.network.stages.0",)`.

    Raises:
        ValueError: for another `decay_rule`.
    """
    if decay_rule not in _DECAYED:
        raise ValueError(f"decay_rule must be one of {', '.join(_DECAYED)}, got {decay_rule!r}.")
    if any(_is_within(path, name) for name in frozen):
        return "frozen"
    if isinstance(variable, SSMParam):
        return "ssm"
    if path[-1] == "C":
        return "ssm_c"
    return "decay" if _DECAYED[decay_rule](path[-1], len(variable.shape)) else "no_decay"


def _is_within(path: tuple, name: str) -> bool:
    whole = ".".join(map(str, path))
    return whole == name or whole.startswith(f"{name}.")


def param_groups(params: nnx.State, decay_rule: str = "weights", frozen: Collection[str] = ()) -> dict[str, Any]:
    """Labels every parameter of `nnx.state(model, nnx.Param)`, as a tree of the same shape with names for leaves.

    See `param_group`. How a model is run, `scan=True` too, makes no difference: each block has its own parameters.
    Raises ValueError for a name in `frozen` that no parameter has.
    """
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params, is_variable)}
    if unknown := [name for name in frozen if not any(_is_within(path, name) for path in paths)]:
        tops = sorted({str(path[0]) for path in paths})
        raise ValueError(f"frozen must name parameters or modules, within {', '.join(tops)}; got {', '.join(unknown)}.")
    labels = jax.tree_util.tree_map_with_path(
        lambda path, variable: param_group(tuple(key.key for key in path), variable, decay_rule, frozen),
        params,
        is_leaf=is_variable,
    )
    return nnx.to_pure_dict(labels)


def freeze(params: Any, labels: Mapping[str, Any]) -> Any:
    """Parameters of which the frozen ones have no gradient, so that none is computed."""
    return jax.tree.map(lambda x, label: jax.lax.stop_gradient(x) if label == "frozen" else x, params, labels)


def group_sizes(labels: Mapping[str, Any], params: nnx.State) -> dict[str, int]:
    """Numbers of parameters in each of the groups that there are, for the `labels` of `param_groups(params)`."""
    sizes = Counter()
    for label, leaf in zip(jax.tree.leaves(labels), jax.tree.leaves(nnx.to_pure_dict(params)), strict=True):
        sizes[label] += leaf.size
    return {group: sizes[group] for group in GROUPS if group in sizes}


def make_optimizer(
    labels: Mapping[str, Any],
    schedule: Callable[[float], optax.Schedule],
    *,
    name: str = "adamw",
    lr: float,
    ssm_lr: float,
    ssm_c_lr: float | None = None,
    weight_decay: float,
    clip_norm: float | None = None,
    momentum: float = 0.9,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """An optimizer for parameters labelled by `param_groups`.

    Args:
        labels: the group of each parameter.
        schedule: the learning rate by step, of a group with the peak that it is called with, such as
            `functools.partial(learning_rate, warmup_steps=100, total_steps=1000)`.
        name: `adamw`, `lamb`, or `sgd` with momentum.
        lr: peak of the learning rate.
        ssm_lr: that of the group `ssm`.
        ssm_c_lr: that of the group `ssm_c`; None: `lr`. It is `ssm_lr` in S4ND's networks for ImageNet, HMDB-51 and
            CelebA as S4's release has them now (version 4).
        weight_decay: of the groups `decay` and `ssm_c` alone. It is what PyTorch's optimizers do: in `adamw` it is
            multiplied by the learning rate, in `sgd` it belongs to the gradient that the momentum takes in.
        clip_norm: bound of the norm of all gradients together; None leaves them.
        momentum: of `sgd`.
        b1: of `adamw` and `lamb`.
        b2: of `adamw` and `lamb`.
        eps: of `adamw` and `lamb`.

    Raises:
        ValueError: for another `name`.
    """
    rules = {
        "adamw": lambda rate, decay: optax.adamw(rate, b1, b2, eps, weight_decay=decay),
        "lamb": lambda rate, decay: optax.lamb(rate, b1, b2, eps, weight_decay=decay),
        "sgd": lambda rate, decay: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum)),
    }
    if name not in rules:
        raise ValueError(f"name must be one of {', '.join(rules)}, got {name!r}.")
    rates = {"decay": lr, "no_decay": lr, "ssm": ssm_lr, "ssm_c": lr if ssm_c_lr is None else ssm_c_lr}
    groups: dict[Hashable, optax.GradientTransformation] = {
        group: rules[name](schedule(rates[group]), weight_decay if group in ("decay", "ssm_c") else 0.0)
        for group in rates
    }
    groups["frozen"] = optax.set_to_zero()
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return optax.chain(clip, optax.partition(groups, labels))
