"""What a run reports of averaged parameters, and of images that cannot be read."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.experiment import Experiment, build
from experiments.train import train
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.metrics import read_metrics

pytestmark = pytest.mark.slow  # several runs

CONVOLUTION = {"model": {"name": "isotropic_conv2d", "d_model": 8, "n_layers": 1, "mixer": {"kernel_size": 3}}}
"""A network that compiles fast."""

AVERAGED = CONVOLUTION | {
    "ema_decay": 0.9,
    "ema_warmup": True,
    "epochs": 1.0,  # 4 steps
    "optimizer.warmup_epochs": 0.0,
    "eval.every_epochs": 0.5,
}


@pytest.fixture(scope="module")
def averaged(tiny_config):
    return build(tiny_config(**AVERAGED))


@pytest.fixture
def run(averaged, tmp_path, monkeypatch, capsys):
    """Trains with averages; gives the scores, the rows of validation, results.json, and what was printed."""

    def run():
        monkeypatch.setattr("experiments.train.build", lambda config: averaged)
        scores = train(averaged.config, tmp_path / "run")
        rows = [row for row in read_metrics(tmp_path / "run") if "val/accuracy" in row]
        return scores, rows, json.loads((tmp_path / "run" / "results.json").read_text()), capsys.readouterr().out

    return run


def restore(experiment, workdir, step):
    with Checkpoints(workdir / "checkpoints", metric="val/accuracy") as checkpoints:
        return checkpoints.restore(experiment.abstract_state, step)


def test_averages_are_scored_beside_the_parameters(averaged, run, tmp_path):
    """In metrics.jsonl, in results.json and in the table, as a network that has them for parameters."""
    scores, rows, results, printed = run()
    names = {"loss", "accuracy", "ema_loss", "ema_accuracy"}
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row.keys() == {"step"} | {f"val/{name}" for name in names} for row in rows)
    assert list(scores) == [4, 8]
    assert all(score.keys() == names for score in scores.values())
    assert results["test"] == {str(resolution): score for resolution, score in scores.items()}
    for score in scores.values():
        for name, value in score.items():
            assert (f"{value:.4f}" if name.endswith("loss") else f"{value:.2%}") in printed

    batches = map(averaged.put, averaged.train_batches())
    with jax.set_mesh(averaged.mesh):
        state = averaged.init()
        average = jax.device_get(state.params)
        for updates in range(4):
            state, _ = averaged.train_step(averaged.stages[0])(state, next(batches))
            decay = min(0.9, 1 - (1 + updates) ** (-2 / 3))
            parameters = jax.device_get(state.params)
            average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, parameters)
        saved = restore(averaged, tmp_path / "run", 4)
        for name, expected in [("params", parameters), ("ema", average)]:
            alone = dataclasses.replace(saved, params=getattr(saved, name), ema=None)
            for a, b in zip(*map(jax.tree.leaves, (alone.params, expected)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
            prefix = {"params": "val/", "ema": "val/ema_"}[name]
            for score, value in averaged.evaluate(alone, "val", 8).scores.items():
                assert value == rows[-1][f"{prefix}{score}"]
    assert rows[-1]["val/ema_loss"] != rows[-1]["val/loss"]


def test_the_best_checkpoint_is_that_of_the_best_parameters(averaged, run, tmp_path, monkeypatch):
    """Not of the best averages, which are here the last ones."""
    original = Experiment.evaluate
    validation = iter([{"accuracy": 0.6, "ema_accuracy": 0.1}, {"accuracy": 0.5, "ema_accuracy": 0.9}])

    def evaluate(self, state, split, resolution, **options):
        evaluation = original(self, state, split, resolution)
        return evaluation._replace(scores=evaluation.scores | next(validation)) if split == "val" else evaluation

    monkeypatch.setattr(Experiment, "evaluate", evaluate)
    scores, _, results, printed = run()
    assert results["step"] == 2
    assert "best checkpoint by val/accuracy, step 2" in " ".join(printed.split())
    with jax.set_mesh(averaged.mesh):
        assert scores[8] == averaged.evaluate(restore(averaged, tmp_path / "run", 2), "test", 8).scores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train images of two classes, 12 each, and 5 each for validation, of which one each is cut short."""
    folder, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, count in [("train", 12), ("val", 5)]:
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpeg")
    for broken in broken_files(folder):
        broken.write_bytes(broken.read_bytes()[:-100])
    return folder


def broken_files(folder):
    return folder / "train" / "dog" / "7.jpeg", folder / "val" / "cat" / "3.jpeg"


def on_folder(folder):
    return CONVOLUTION | {
        "data.name": "image_folder",
        "data.dir": str(folder),
        "data.image_size": 8,
        "batch_size": 8,  # 3 steps per epoch
        "eval.batch_size": 8,
        "eval.every_epochs": 1.0,
        "eval.resolutions": (),
    }


def test_a_run_goes_on_without_an_image_that_cannot_be_read(folder, tiny_config, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    scores = train(tiny_config(**on_folder(folder), **{"data.max_broken": 0.1}), tmp_path / "run")
    warnings = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    told = sorted(warning.partition(" cannot be read, 1 of ")[0] for warning in warnings)
    assert told == sorted(map(str, broken_files(folder)))  # once each, of three epochs and four evaluations
    right = 9 * scores[8]["accuracy"]  # of the readable ones
    assert right == pytest.approx(round(right), abs=1e-9)
    assert (tmp_path / "run" / "results.json").exists()
    assert (tmp_path / "run" / "pictures" / "predictions.png").exists()


def test_a_run_with_too_many_images_that_cannot_be_read_ends_with_a_message(folder, command, tmp_path):
    done = command().run(
        "--config.data.name=image_folder",
        f"--config.data.dir={folder}",
        "--config.data.image_size=8",
        "--config.data.max_broken=0.02",
        "--config.batch_size=24",
        f"--workdir={tmp_path / 'run'}",
    )
    file, _ = broken_files(folder)
    assert done.returncode == 1, done.stderr
    assert f"error: 1 of 24 examples cannot be read, more than config.data.max_broken=0.02 of them; one is {file}." in (
        done.stderr
    )
    assert "Traceback" not in done.stderr
