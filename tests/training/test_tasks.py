import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.training.tasks import Classification, MultiLabel

LOGITS = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
LABELS = np.array([3, 1, 4, 1, 5, 9], np.int32)
ATTRIBUTES = np.random.default_rng(1).integers(0, 2, (6, 10)).astype(np.float32)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(("smoothing", "twice", "effective"), [(0.0, False, 0.0), (0.1, False, 0.1), (0.1, True, 0.19)])
def test_label_smoothing_spreads_over_all_classes(smoothing, twice, effective):
    targets = Classification(10, smoothing, twice).targets(jnp.asarray(LABELS))
    np.testing.assert_allclose(targets, np.eye(10)[LABELS] * (1 - effective) + effective / 10, atol=1e-6)


def test_the_loss_is_the_mean_cross_entropy_with_the_targets():
    targets = np.random.default_rng(2).dirichlet(np.ones(10), 6).astype(np.float32)
    loss, metrics = Classification(10).loss(jnp.asarray(LOGITS), jnp.asarray(targets))
    assert float(loss) == pytest.approx(-(targets * log_softmax(LOGITS)).sum(-1).mean(), rel=1e-5)
    assert float(metrics["loss"]) == float(loss)
    assert float(metrics["accuracy"]) == np.mean(LOGITS.argmax(-1) == targets.argmax(-1))


def test_evaluation_is_of_labels_without_smoothing():
    scores = Classification(10, 0.1).evaluate(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_allclose(scores["loss"], -log_softmax(LOGITS)[np.arange(6), LABELS], rtol=1e-5)
    np.testing.assert_array_equal(scores["accuracy"], LOGITS.argmax(-1) == LABELS)
    assert scores.keys() == {"loss", "accuracy"}


def test_of_many_classes_the_label_may_be_among_five():
    logits = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    labels = np.argsort(logits, -1)[np.arange(200), -1 - np.arange(200) % 10]  # the likeliest, the next, ...
    scores = Classification(100).evaluate(jnp.asarray(logits), jnp.asarray(labels.astype(np.int32)))
    np.testing.assert_array_equal(scores["accuracy"], np.arange(200) % 10 == 0)
    np.testing.assert_array_equal(scores["top5_accuracy"], np.arange(200) % 10 < 5)


def test_attributes_have_a_binary_cross_entropy_each():
    task = MultiLabel(10)
    targets = task.targets(jnp.asarray(ATTRIBUTES))
    np.testing.assert_array_equal(targets, ATTRIBUTES)
    p = 1 / (1 + np.exp(-LOGITS))
    each = -(ATTRIBUTES * np.log(p) + (1 - ATTRIBUTES) * np.log(1 - p))
    loss, metrics = task.loss(jnp.asarray(LOGITS), targets)
    assert float(loss) == pytest.approx(each.mean(), rel=1e-5)
    right = (LOGITS >= 0) == (ATTRIBUTES == 1)
    assert float(metrics["accuracy"]) == pytest.approx(right.mean(), rel=1e-6)
    scores = task.evaluate(jnp.asarray(LOGITS), jnp.asarray(ATTRIBUTES))
    np.testing.assert_allclose(scores["loss"], each.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(scores["accuracy"], right.mean(-1), rtol=1e-6)


@pytest.mark.parametrize("task", [Classification(10, 0.1), MultiLabel(10)])
def test_losses_of_half_precision_are_in_float32(task):
    labels = jnp.asarray(LABELS if isinstance(task, Classification) else ATTRIBUTES)
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    loss, _ = task.loss(logits, task.targets(labels))
    exact, _ = task.loss(logits.astype(jnp.float32), task.targets(labels))
    assert (loss.dtype, float(loss)) == (jnp.float32, float(exact))
    assert {x.dtype for x in jax.tree.leaves(task.evaluate(logits, labels))} == {jnp.dtype("float32")}
