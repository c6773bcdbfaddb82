"""The train step and the evaluation step, as pure functions of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

Batch = dict[str, Any]
Metrics = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, as arrays or, described, as shapes or shardings.

    `step` is also the position in the data, in batches, and the seed of dropout.
    """

    step: Any
    params: Any
    rest: Any
    """Variables that are not parameters, such as batch statistics."""
    opt_state: Any
    ema: Any
    """Exponential moving average of `params`, or None."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """The task of naming the class of an image, one of `num_classes`.

    `prepare` turns a batch of raw images into the model's input, on the device.
    """

    num_classes: int
    prepare: Callable[[Array], Float[Array, "b h w c"]]
    label_smoothing: float = 0.0

    def loss(self, logits: Float[Array, "b classes"], batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        """Mean cross-entropy, and the metrics of a train step."""
        logits = logits.astype(jnp.float32)
        targets = jax.nn.one_hot(batch["label"], self.num_classes)
        targets = optax.smooth_labels(targets, self.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == batch["label"])}

    def evaluate(self, logits: Float[Array, "b classes"], batch: Batch) -> Metrics:
        """Sums over the real rows of a batch (`mask`): to be added up and divided by `count`."""
        logits, mask = logits.astype(jnp.float32), batch["mask"].astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        return {"loss": (losses * mask).sum(), "accuracy": (correct * mask).sum(), "count": mask.sum()}


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
    task: Classification,
    optimizer: optax.GradientTransformation,
    *,
    rate: float = 1.0,
    seed: int = 0,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `step(state, batch) -> (state, metrics)`.

    Args:
        graphdef: of the model in training mode; `model(images, rate=..., rngs=...)` gives logits.
        task: gives the loss.
        optimizer: an optax transformation of all parameters.
        rate: base resolution / resolution of the training images.
        seed: of dropout, folded with the step: the step has no other randomness.
        accumulate: number of equal parts in which the batch goes through the model, one after the other; gradients
            and metrics are averaged, and there is one update.
        ema_decay: weight of the old average in `state.ema`.
    """

    def loss_fn(params, rest, batch, key):
        # Copied, because the Variables of `rest` belong to another trace level than this function's.
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits = model(task.prepare(batch["image"]), rate=rate, rngs=nnx.Rngs(dropout=key))
        loss, metrics = task.loss(logits, batch)
        _, rest = nnx.state(model, nnx.Param, ...)
        return loss, (metrics, nnx.to_pure_dict(rest))

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
        ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - ema_decay)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, rest, opt_state, ema), metrics

    return step


def make_eval_step(
    graphdef: nnx.GraphDef, task: Classification, *, rate: float = 1.0
) -> Callable[[TrainState, Batch], tuple[Metrics, Float[Array, "b classes"]]]:
    """Builds `step(state, batch) -> (sums, logits)` with the averaged parameters if the state has them.

    `graphdef` is that of the model in evaluation mode, and `rate` that of the images that `task.prepare` gives.
    """

    def step(state: TrainState, batch: Batch):
        params = state.params if state.ema is None else state.ema
        model = nnx.merge(graphdef, params, state.rest, copy=True)
        logits = model(task.prepare(batch["image"]), rate=rate)
        return task.evaluate(logits, batch), logits

    return step
