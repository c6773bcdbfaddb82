"""What a network is trained for: targets from labels, the loss, and the scores of an evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from ssm_jax.layers.stems import Rate

Metrics = dict[str, Any]
Batch = dict[str, Any]

_TOP5_FROM = 100
"""Classes from which on it is also told whether the label is among the five likeliest."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """Naming the one class of an image or a video, by cross-entropy.

    `label_smoothing` takes this share of a target away and deals it out to all classes. With `double_label_smoothing`
    that is done twice, as S4ND's released ImageNet configs do, in the mixing of images and again in the loss: 0.1 is
    then 0.19.
    """

    num_classes: int
    label_smoothing: float = 0.0
    double_label_smoothing: bool = False

    def targets(self, labels: Int[Array, "b"]) -> Float[Array, "b classes"]:
        """What the network should say, as probabilities."""
        targets = jax.nn.one_hot(labels, self.num_classes)
        for _ in range(2 if self.double_label_smoothing else 1):
            targets = optax.smooth_labels(targets, self.label_smoothing)
        return targets

    def loss(
        self, logits: Float[Array, "b classes"], targets: Float[Array, "b classes"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean cross-entropy, and the metrics of a train step; right is the class with the largest target."""
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == targets.argmax(-1))}

    def evaluate(self, logits: Float[Array, "b classes"], labels: Int[Array, "b"]) -> dict[str, Float[Array, "b"]]:
        """Scores of each row: cross-entropy, and whether the likeliest class (and, of many, one of five) is right."""
        logits = logits.astype(jnp.float32)
        scores = {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            "accuracy": (logits.argmax(-1) == labels).astype(jnp.float32),
        }
        if self.num_classes >= _TOP5_FROM:
            _, likeliest = jax.lax.top_k(logits, 5)
            scores["top5_accuracy"] = (likeliest == labels[:, None]).any(-1).astype(jnp.float32)
        return scores


@dataclasses.dataclass(frozen=True)
class MultiLabel:
    """Saying of each of `num_classes` attributes whether an image has it, by binary cross-entropy of their logits."""

    num_classes: int

    def targets(self, labels: Float[Array, "b classes"]) -> Float[Array, "b classes"]:
        """The labels, 0 or 1."""
        return labels.astype(jnp.float32)

    def loss(
        self, logits: Float[Array, "b classes"], targets: Float[Array, "b classes"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Mean over rows and attributes, and the metrics of a train step."""
        logits = logits.astype(jnp.float32)
        loss = optax.sigmoid_binary_cross_entropy(logits, targets).mean()
        return loss, {"loss": loss, "accuracy": jnp.mean((logits >= 0) == (targets >= 0.5))}

    def evaluate(
        self, logits: Float[Array, "b classes"], labels: Float[Array, "b classes"]
    ) -> dict[str, Float[Array, "b"]]:
        """Scores of each row: mean binary cross-entropy, and the share of right attributes (logit >= 0: it has it)."""
        logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
        return {
            "loss": optax.sigmoid_binary_cross_entropy(logits, labels).mean(-1),
            "accuracy": ((logits >= 0) == (labels >= 0.5)).astype(jnp.float32).mean(-1),
        }


Task = Classification | MultiLabel


def loss_of_logits(
    task: Task, prepare: Callable[[Array, Array, Array], tuple[Array, Array]], *, rate: Rate = 1.0
) -> Callable[[Any, Batch, Array], tuple[Array, Metrics]]:
    """What `make_train_step` takes as `loss`.

    `prepare` turns raw images, targets and a key into the model's input and the targets that go with it; `rate` is
    base resolution / resolution of that input, or one for each axis. The model is called as
    `model(images, rate=..., rngs=...)`.
    """

    def loss(model: Any, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        prepare_key, dropout_key = jax.random.split(key)
        images, targets = prepare(batch["image"], task.targets(batch["label"]), prepare_key)
        return task.loss(model(images, rate=rate, rngs=nnx.Rngs(dropout=dropout_key)), targets)

    return loss


def rows_of_logits(
    task: Task, prepare: Callable[[Array], Array], *, rate: Rate = 1.0
) -> Callable[[Any, Batch], dict[str, Array]]:
    """What `make_eval_step` takes as `evaluate`: the task's scores of each row, `logits`, `label` and `mask`."""

    def evaluate(model: Any, batch: Batch) -> dict[str, Array]:
        logits = model(prepare(batch["image"]), rate=rate).astype(jnp.float32)
        kept = {"label": batch["label"], "mask": batch["mask"]}
        return {**task.evaluate(logits, batch["label"]), "logits": logits, **kept}

    return evaluate
