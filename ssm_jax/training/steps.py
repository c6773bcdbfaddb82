"""The train step and the evaluation step, as pure functions of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

Batch = dict[str, Any]
Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, as arrays or, described, as shapes or shardings.

    `step` is also the position in the data, in batches, of which everything that is read follows, and the seed of what
    is random on the device.
    """

    step: Any
    params: Any
    rest: Any
    """Variables that are not parameters, such as batch statistics."""
    opt_state: Any
    ema: Any
    """Exponential moving average of `params`, or None."""


def init_state(model: nnx.Module, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step."""
    _, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        rest=rest,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def make_train_step(
    graphdef: nnx.GraphDef,
    loss: Callable[[nnx.Module, Batch, Array], tuple[Array, Metrics]],
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    accumulate: int = 1,
    ema_decay: Callable[[Array], Any] | None = None,
    gather: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `step(state, batch) -> (state, metrics)`.

    Args:
        graphdef: of the model in training mode.
        loss: of `(model, batch, key)`, and the metrics of a train step.
        optimizer: an optax transformation of all parameters.
        seed: of the key that `loss` gets, folded with the step: the step has no other randomness.
        accumulate: number of equal parts in which the batch goes through the model, one after the other; gradients
            and metrics are averaged, and there is one update.
        ema_decay: weight of the old average in `state.ema`, by the number of updates before.
        gather: makes parameters whole that devices share, see `ssm_jax.training.sharding.gather`.
    """

    def loss_fn(params, rest, batch, key):
        # Copied, because the Variables of `rest` belong to another trace level than this function's.
        model = nnx.merge(graphdef, gather(params), rest, copy=True)
        value, metrics = loss(model, batch, key)
        _, rest = nnx.state(model, nnx.Param, ...)
        return value, (metrics, nnx.to_pure_dict(rest))

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            grads, (metrics, rest) = grad_fn(state.params, state.rest, batch, key)
        else:
            # Rows are dealt out so that every device keeps the rows it has: the sharded axis stays the outer one.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

            def add_part(carry, inputs):
                rest, total = carry
                i, part = inputs
                grads, (metrics, rest) = grad_fn(state.params, rest, part, jax.random.fold_in(key, i))
                return (rest, jax.tree.map(jnp.add, total, (grads, metrics))), None

            first = jax.tree.map(lambda x: x[0], parts)
            grads, (metrics, _) = jax.eval_shape(grad_fn, state.params, state.rest, first, key)
            zeros = jax.tree.map(jnp.zeros_like, (grads, metrics))
            (rest, total), _ = jax.lax.scan(add_part, (state.rest, zeros), (jnp.arange(accumulate), parts))
            grads, metrics = jax.tree.map(lambda x: x / accumulate, total)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay(state.step))
        metrics |= {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        return TrainState(state.step + 1, params, rest, opt_state, ema), metrics

    return step


def make_eval_step(
    graphdef: nnx.GraphDef,
    evaluate: Callable[[nnx.Module, Batch], dict[str, Array]],
    *,
    gather: Callable[[Any], Any] = lambda params: params,
) -> Callable[[Any, Any, Batch], dict[str, Array]]:
    """Builds `step(params, rest, batch) -> rows`, what `evaluate(model, batch)` says of each row.

    `graphdef` is that of the model in evaluation mode, `gather` as in `make_train_step`.
    """

    def step(params, rest, batch: Batch) -> dict[str, Array]:
        return evaluate(nnx.merge(graphdef, gather(params), rest, copy=True), batch)

    return step
