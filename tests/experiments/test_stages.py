import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.config import ConfigError
from experiments.evaluate import evaluate
from experiments.experiment import Experiment, Stage, build
from experiments.train import train
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.metrics import MetricWriter, read_metrics

pytestmark = pytest.mark.slow  # each stage has a step of its own to compile

STAGES = {
    "stages.epochs": (1.75, 1.25),
    "stages.resolutions": (4, 8),
    "stages.bandlimits": (0.1, 0.0),
    "optimizer.warmup_epochs": 0.5,
}
STAGED = STAGES | {"ema_decay": 0.9, "checkpoint_every_epochs": 0.5}
"""Of 7 and 5 steps, with 2 of warm-up; saved after every 2, evaluated after every 8, and both after each stage."""


@pytest.fixture(scope="module")
def experiment(tiny_config):
    """On one device, for which less is compiled."""
    experiment = build(tiny_config(**STAGED))
    axes, types = experiment.mesh.axis_names, experiment.mesh.axis_types
    return dataclasses.replace(experiment, mesh=jax.make_mesh((1, 1), axes, types, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def run(experiment):
    """Trains in a workdir, each time with what has been compiled before."""

    def run(workdir):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("experiments.train.build", lambda config: experiment)
            return train(experiment.config, workdir)

    return run


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory):
    """The workdir of a finished run, its scores, and the splits and resolutions at which it evaluated."""
    workdir, evaluated = tmp_path_factory.mktemp("runs") / "unbroken", []
    original = Experiment.evaluate

    def spy(self, state, split, resolution, **options):
        evaluated.append((split, resolution))
        return original(self, state, split, resolution, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Experiment, "evaluate", spy)
        return workdir, run(workdir), evaluated


def last_state(experiment, workdir):
    with Checkpoints(workdir / "checkpoints", metric="val/accuracy") as checkpoints:
        return checkpoints.restore(experiment.abstract_state, checkpoints.last)


def rows(workdir):
    """The metrics, apart from how fast they came."""
    return [
        {k: v for k, v in row.items() if k != "input_wait" and "per_second" not in k} for row in read_metrics(workdir)
    ]


def assert_same_state(state, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_stages_end_where_their_epochs_do(experiment):
    assert experiment.stages == (Stage(4, 0.1, 7), Stage(8, None, 12))
    assert (experiment.resolution, experiment.total_steps) == (8, 12)


def test_each_stage_has_its_resolution_and_bandlimit(tiny_config, monkeypatch):
    """And evaluation the last one's, whatever model.mixer has."""
    seen = []
    experiment = build(tiny_config(**STAGED))
    assert experiment.config.model.mixer.bandlimit == 0.5
    model = type(experiment.abstract_model)
    original = model.__call__

    def spy(self, images, *, rate=1.0, rngs=None):
        (bandlimit,) = {m.bandlimit for _, m in nnx.iter_modules(self) if hasattr(m, "bandlimit")}
        seen.append((images.shape[1:3], rate, bandlimit))
        return original(self, images, rate=rate, rngs=rngs)

    monkeypatch.setattr(model, "__call__", spy)
    state = experiment.abstract_state
    batch = jax.eval_shape(experiment.put, next(experiment.train_batches()))
    masked = batch | {"mask": jax.ShapeDtypeStruct(batch["label"].shape, bool)}
    with jax.set_mesh(experiment.mesh):
        for stage in experiment.stages:
            jax.eval_shape(experiment.train_step(stage), state, batch)
        jax.eval_shape(experiment.eval_step(4), state.params, state.rest, masked)
    assert seen == [((4, 4), 2.0, 0.1), ((8, 8), 1.0, None), ((4, 4), 2.0, None)]


def test_the_learning_rate_restarts_with_each_stage(experiment):
    """Two steps of a line from 0, then half a cosine to the stage's end."""

    def stage(length):
        return [0, 0.5] + [(1 + math.cos(math.pi * step / (length - 2))) / 2 for step in range(length - 2)]

    rates = [float(experiment.schedule(step)) for step in range(12)]
    assert rates == pytest.approx([0.01 * share for share in stage(7) + stage(5)], rel=1e-5)


def test_the_cosine_of_each_stage_may_end_before_it(tiny_config):
    schedule = build(tiny_config(**STAGES, **{"optimizer.cosine_epochs": 1.0, "optimizer.end_lr": 1e-5})).schedule
    assert [float(schedule(step)) for step in (4, 5, 6, 10, 11)] == pytest.approx(
        [1e-5, 1e-5, 1e-5, (0.01 + 1e-5) / 2, 1e-5]
    )


def test_stages_share_parameters_moments_averages_and_the_order_of_the_data(experiment, unbroken):
    """A run is 7 steps of one kind and 5 of the other, on batches that are numbered through."""
    batches = map(experiment.put, experiment.train_batches())
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        for _ in range(7):
            state, _ = experiment.train_step(experiment.stages[0])(state, next(batches))
        border = jax.device_get(state.params)
        state, _ = experiment.train_step(experiment.stages[1])(state, next(batches))
        assert_same_state(state.params, border)  # the rate is 0 again, in all groups
        for _ in range(4):
            state, _ = experiment.train_step(experiment.stages[1])(state, next(batches))
    assert_same_state(last_state(experiment, unbroken[0]), state)


def test_stages_are_reported_as_one_run(experiment, unbroken):
    workdir, scores, evaluated = unbroken
    training = {row["step"]: row for row in rows(workdir) if "train/loss" in row}
    assert list(training) == [2, 3, 4, 6, 7, 8, 9, 10, 12]
    for step, row in training.items():
        assert row["train/lr"] == pytest.approx(float(experiment.schedule(step - 1)))
    validation = {row["step"]: row for row in rows(workdir) if "val/loss" in row}
    assert list(validation) == [7, 8, 12]
    names = {f"val/{name}" for name in ("loss", "accuracy", "ema_loss", "ema_accuracy")}
    assert all(row.keys() == {"step", *names} for row in validation.values())
    # Always at the resolution at which training ends; the test images also at those of config.eval.
    assert evaluated == [("val", 8)] * 3 + [("test", 4), ("test", 8)]
    assert list(scores) == [4, 8]


def test_the_best_checkpoint_can_be_evaluated(tiny_config, unbroken):
    workdir, scores, _ = unbroken
    again = evaluate(tiny_config(**STAGED), workdir)
    assert list(again) == [4, 8]
    for resolution, score in again.items():
        assert score == pytest.approx(scores[resolution], rel=1e-5)


class Stopped(Exception):  # noqa: N818
    """Instead of a signal."""


@pytest.fixture
def stop(monkeypatch):
    """Makes a run stop once it has written the row of a step that has `name`, or saved the step."""

    def stop(step, name):
        def write(self, at, metrics):
            original_write(self, at, metrics)
            if at == step and name in metrics:
                raise Stopped

        def save(self, state, metrics=None):
            original_save(self, state, metrics)
            if int(state.step) == step and name == "checkpoint":
                raise Stopped

        monkeypatch.setattr(MetricWriter, "write", write)
        monkeypatch.setattr(Checkpoints, "save", save)

    original_write, original_save = MetricWriter.write, Checkpoints.save
    return stop


def test_a_run_that_is_stopped_in_any_stage_and_started_again_ends_as_an_unbroken_one(
    experiment, run, unbroken, stop, tmp_path, capsys
):
    """Bit for bit: it is stopped before there is a checkpoint, in both stages, and twice between them."""
    stops = [(2, "train/loss"), (6, "train/loss"), (7, "val/loss"), (7, "checkpoint"), (9, "train/loss")]
    for step, name in stops:
        stop(step, name)
        with pytest.raises(Stopped):
            run(tmp_path / "run")
    stop(0, "")
    scores = run(tmp_path / "run")
    starts = [line.rpartition(" step ")[2] for line in capsys.readouterr().out.splitlines() if "going on" in line]
    assert starts == ["4", "6", "7", "8"]  # from the start, from there four times
    workdir, expected, _ = unbroken
    assert_same_state(last_state(experiment, tmp_path / "run"), last_state(experiment, workdir))
    assert rows(tmp_path / "run") == rows(workdir)
    assert scores == expected
    assert (tmp_path / "run" / "results.json").read_text() == (workdir / "results.json").read_text()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", (1.0, 1.0), r"stages\.epochs must be positive and add up to epochs=3\.0, got \(1\.0, 1\.0\)"),
        ("epochs", (4.0, -1.0), r"stages\.epochs must be positive and add up to epochs=3\.0"),
        ("epochs", (0.5, 2.5), r"optimizer\.warmup_epochs must be .* less than the shortest of stages\.epochs"),
        ("epochs", (3.0,), r"stages\.resolutions must be as many whole numbers as there are stages\.epochs=\(3\.0,\)"),
        ("epochs", (), r"stages\.resolutions must be as many whole numbers as there are stages\.epochs=\(\)"),
        ("resolutions", (4, 8, 8), r"stages\.resolutions must be as many whole numbers as there are stages\.epochs"),
        ("resolutions", (0, 8), r"stages\.resolutions must be as many whole numbers .*, got \(0, 8\)"),
        ("bandlimits", (0.1,), r"stages\.bandlimits must be as many as there are stages\.epochs=\(1\.75, 1\.25\)"),
        ("bandlimits", (-0.1, 0.0), r"stages\.bandlimits must be .*, each at least 0, .*, got \(-0\.1, 0\.0\)"),
        ("bandlimits", (math.nan, 0.0), r"stages\.bandlimits must be .*, each at least 0, .*, got \(nan, 0\.0\)"),
    ],
)
def test_a_mistake_is_answered_with_its_field(tiny_config, field, value, message):
    config = tiny_config(**STAGES | {f"stages.{field}": value})
    with pytest.raises(ConfigError, match=rf"^config\.{message}"):
        build(config)


def test_a_stage_without_a_step_is_refused(tiny_config):
    config = tiny_config(**STAGES | {"stages.epochs": (2.9, 0.1), "optimizer.warmup_epochs": 0.0})
    with pytest.raises(ConfigError, match=r"^config\.stages\.epochs must be of at least one step each, of 4 per epoch"):
        build(config)


@pytest.mark.parametrize(
    "model",
    [
        {"name": "isotropic_conv2d", "d_model": 8, "n_layers": 1, "mixer": {"kernel_size": 3}},
        {"name": "resnet_cifar", "depth": 11},
    ],
    ids=lambda model: model["name"],
)
@pytest.mark.parametrize("bandlimits", [(0.1, 0.0), (0.0, 0.1)])
def test_networks_whose_frequencies_cannot_be_limited_are_resized_only(tiny_config, model, bandlimits):
    fields = STAGES | {"model": model}
    with pytest.raises(ConfigError, match=r"^config\.stages\.bandlimits: model .* got an unexpected keyword argument"):
        build(tiny_config(**fields | {"stages.bandlimits": bandlimits}))
    unlimited = build(tiny_config(**fields | {"stages.bandlimits": (0.0, 0.0)}))
    assert unlimited.stages == (Stage(4, None, 7), Stage(8, None, 12))


def test_one_stage_has_the_mixers_bandlimit(tiny_config):
    experiment = build(tiny_config(**{"data.resolution": 4}))
    (bandlimit,) = {m.bandlimit for _, m in nnx.iter_modules(experiment.abstract_model) if hasattr(m, "bandlimit")}
    assert experiment.stages == (Stage(4, None, 12),)
    assert bandlimit == 0.5
