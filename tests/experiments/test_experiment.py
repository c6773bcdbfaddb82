import dataclasses
import itertools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.config import ConfigError
from experiments.experiment import build
from ssm_jax.training.tasks import Classification, MultiLabel

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = [path.relative_to(ROOT) for path in sorted((ROOT / "configs").glob("*/*.py"))]
CONFIGS = [path for path in CONFIGS if path.name != "__init__.py" and path.parent.name != "common"]


@pytest.fixture(scope="module")
def experiment(tiny_config):
    return build(tiny_config())


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_config_tells_how_it_is_run(path):
    source = (ROOT / path).read_text()
    command = r"sweep --config=FILE" if path.parent.name == "sweeps" else r"\w+ --config=FILE(:\w+)? --workdir=runs/"
    assert re.search(r"python -m experiments\." + command.replace("FILE", re.escape(str(path))), source)


def test_lengths_are_given_in_epochs(tiny_config):
    built = build(tiny_config(batch_size=64, epochs=2.5))
    assert built.steps_per_epoch == 1257 // 64
    assert built.total_steps == round(2.5 * (1257 // 64))
    warm = 1257 // 64
    assert float(built.schedule(warm)) == pytest.approx(0.01)
    assert float(built.schedule(warm - 1)) < 0.01
    assert float(built.schedule(built.total_steps)) == pytest.approx(0.0, abs=1e-9)


def test_the_rate_falls_at_the_epochs_that_are_given(tiny_config):
    fields = {
        "batch_size": 64,
        "optimizer.name": "sgd",
        "optimizer.warmup_epochs": 0.0,
        "optimizer.decay_epochs": (1, 2),
    }
    built = build(tiny_config(**fields))
    rates = [float(built.schedule(step)) for step in (0, 18, 19, 37, 38)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])


def test_a_run_has_one_step_at_least(tiny_config):
    assert build(tiny_config(**{"epochs": 0.01, "optimizer.warmup_epochs": 0.0})).total_steps == 1


def test_steps_take_over_the_memory_of_their_state(experiment):
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        step = experiment.train_step(experiment.stages[0])
        after, _ = step(state, experiment.put(next(experiment.train_batches())))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_states_are_what_they_are_announced_to_be(experiment):
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
    announced = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), experiment.abstract_state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == announced


@pytest.mark.parametrize("batch_size", [360, 256, 7])
def test_evaluation_is_exact_for_any_batch_size(experiment, tiny_config, batch_size):
    other = build(tiny_config(**{"eval.batch_size": batch_size}))
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        scores, rows = other.evaluate(state, "test", 8)
    logits = rows["logits"]
    test = experiment.dataset.splits["test"]
    labels = np.array([example["label"] for example in test])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert logits.shape == (360, 10)
    assert scores["accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == labels), abs=1e-6)
    assert scores["loss"] == pytest.approx(-log_p[np.arange(360), labels].mean(), rel=1e-5)


def test_the_model_is_told_the_resolution_of_its_images(tiny_config, monkeypatch):
    seen = []
    experiment = build(tiny_config(**{"data.resolution": 4}))
    model = type(experiment.abstract_model)
    original = model.__call__

    def spy(self, images, *, rate=1.0, rngs=None):
        seen.append((images.shape[1:], rate))
        return original(self, images, rate=rate, rngs=rngs)

    monkeypatch.setattr(model, "__call__", spy)
    batch = jax.eval_shape(experiment.put, next(experiment.train_batches()))
    with jax.set_mesh(experiment.mesh):
        jax.eval_shape(experiment.train_step(experiment.stages[0]), experiment.abstract_state, batch)
    assert seen == [((4, 4, 1), 2.0)]


def test_the_rate_may_be_timms(tiny_config):
    """No prefix, held for an epoch, its end before the training's: S4ND's schedule for ImageNet."""
    fields = {
        "optimizer.warmup_epochs": 2.0,
        "optimizer.warmup_lr": 1e-4,
        "optimizer.warmup_prefix": False,
        "optimizer.cosine_epochs": 8.0,
        "optimizer.end_lr": 1e-3,
        "optimizer.per_epoch": True,
    }
    built = build(tiny_config(epochs=10.0, **fields))
    cosine = [1e-3 + (1e-2 - 1e-3) * (1 + np.cos(np.pi * epoch / 8)) / 2 for epoch in range(8)]
    expected = [1e-4, (1e-4 + 1e-2) / 2, *cosine[2:], 1e-3, 1e-3]
    rates = [float(built.schedule(step)) for step in range(10 * built.steps_per_epoch)]
    np.testing.assert_allclose(rates, np.repeat(expected, built.steps_per_epoch), rtol=1e-5)


def test_groups_of_parameters_follow_the_config(tiny_config):
    """After one step of SGD each has moved by its own rate times its gradient and decay."""
    fields = {
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.0,
        "optimizer.warmup_epochs": 0.0,
        "optimizer.lr": 0.5,
        "optimizer.ssm_lr": 0.25,
        "optimizer.ssm_c_lr": 0.125,
        "optimizer.weight_decay": 0.5,
        "optimizer.decay_rule": "all",
    }
    built = build(tiny_config(**fields))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), built.abstract_state.params)
    gradients = jax.tree.map(np.ones_like, params)
    updates, _ = built.optimizer.update(gradients, built.optimizer.init(params), params)
    kernel = updates["blocks"][0]["mixer"]["kernels"][0]
    np.testing.assert_allclose(kernel["A_real"], -0.25)
    np.testing.assert_allclose(kernel["C"], -0.125 * 1.5)
    np.testing.assert_allclose(updates["head"]["bias"], -0.5 * 1.5)


def test_the_task_is_the_datasets_with_the_configs_smoothing(experiment, tiny_config):
    smooth = build(tiny_config(label_smoothing=0.1, double_label_smoothing=True)).problem.task
    assert smooth == Classification(10, label_smoothing=0.1, double_label_smoothing=True)
    labelled = dataclasses.replace(experiment, dataset=dataclasses.replace(experiment.dataset, multi_label=True))
    assert labelled.problem.task == MultiLabel(10)


def test_training_reads_from_its_step_on_and_repeats_examples(tiny_config):
    built = build(tiny_config(**{"augment.repeats": 2, "batch_size": 16}))
    first, second, third = (batch["label"] for batch in itertools.islice(built.train_batches(), 3))
    for labels in (first, second, third):
        np.testing.assert_array_equal(labels[::2], labels[1::2])
    np.testing.assert_array_equal(next(built.train_batches(2))["label"], third)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (36, "must divide the 96 rows of batch_size=96 / accumulate=1, or be larger, got 36"),
        (8, "must divide the 12 rows of each of 8 devices, or be a multiple of them, got 8"),
        (32, "must divide the 12 rows of each of 8 devices, or be a multiple of them, got 32"),
    ],
)
def test_groups_of_mixup_that_devices_would_share_unevenly_are_refused(tiny_config, group, message):
    with pytest.raises(ConfigError, match=rf"config\.augment\.mix_group {message}"):
        build(tiny_config(**{"batch_size": 96, "augment.mixup": 0.8, "augment.mix_group": group}))


@pytest.mark.parametrize("group", [6, 24, 128])
def test_devices_may_have_several_groups_or_share_one(tiny_config, group):
    build(tiny_config(**{"batch_size": 96, "augment.mixup": 0.8, "augment.mix_group": group}))
