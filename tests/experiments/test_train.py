import json
import shutil
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.config import ConfigError
from experiments.experiment import build
from experiments.train import train
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.loop import NonFiniteLossError
from ssm_jax.training.metrics import read_metrics


def contents(folder):
    """All files under `folder` with their contents."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def last_state(workdir, config):
    """The newest checkpoint's state, and the steps of all checkpoints."""
    experiment = build(config)
    with Checkpoints(workdir / "checkpoints", metric="val/accuracy") as checkpoints:
        return checkpoints.restore(experiment.abstract_state, checkpoints.last), checkpoints.steps


def rows(workdir):
    """The metrics, apart from how fast they came."""
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(workdir)]


def assert_is_picture(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) >= 200
        assert len(image.convert("L").getcolors(256)) > 10


def test_a_run_leaves_everything_in_its_workdir(finished):
    workdir, config, _ = finished
    names = {entry.name for entry in workdir.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert names - events == {"config.json", "metrics.jsonl", "checkpoints", "results.json", "pictures"}
    assert len(events) == 1
    assert (workdir / events.pop()).stat().st_size > 0
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))
    assert {entry.name for entry in (workdir / "checkpoints").iterdir()} >= {"8", "12"}


def test_metrics_come_at_their_cadence(finished):
    """4 steps per epoch; logged every 3, saved every 4, evaluated every 8 and at the end."""
    workdir, _, _ = finished
    steps = [row["step"] for row in read_metrics(workdir) if "train/loss" in row]
    assert steps == [3, 4, 6, 8, 9, 12]
    assert [row["step"] for row in read_metrics(workdir) if "val/loss" in row] == [8, 12]


def test_results_are_the_returned_scores(finished):
    workdir, _, scores = finished
    results = json.loads((workdir / "results.json").read_text())
    assert results["test"] == {str(resolution): score for resolution, score in scores.items()}
    assert list(scores) == [4, 8]
    assert results["jax"] == jax.__version__


def test_results_are_those_of_the_best_checkpoint(finished):
    workdir, config, scores = finished
    results = json.loads((workdir / "results.json").read_text())
    scored = {row["step"]: row["val/accuracy"] for row in read_metrics(workdir) if "val/accuracy" in row}
    assert scored[results["step"]] == max(scored.values())
    experiment = build(config)
    with Checkpoints(workdir / "checkpoints", metric="val/accuracy") as checkpoints:
        state = checkpoints.restore(experiment.abstract_state, results["step"])
    with jax.set_mesh(experiment.mesh):
        again = experiment.evaluate(state, "test", 8).scores
    assert again == pytest.approx(scores[8], rel=1e-5)


def test_there_are_four_pictures(finished):
    workdir, _, _ = finished
    names = ["accuracy_by_resolution", "kernels", "predictions", "training_curves"]
    assert sorted(path.name for path in (workdir / "pictures").iterdir()) == [f"{name}.png" for name in names]
    for name in names:
        assert_is_picture(workdir / "pictures" / f"{name}.png")


def test_the_same_command_again_only_reports_again(finished, tmp_path, capsys):
    workdir, config, scores = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    assert train(config, copy) == scores
    assert read_metrics(copy) == read_metrics(workdir)
    assert contents(copy / "checkpoints") == contents(workdir / "checkpoints")
    assert (copy / "results.json").read_text() == (workdir / "results.json").read_text()
    assert "going on from step 12" in capsys.readouterr().out


def test_a_workdir_of_another_config_is_left_untouched(finished, tiny_config):
    workdir, _, _ = finished
    before = contents(workdir)
    with pytest.raises(ConfigError, match=r"config\.optimizer\.lr: 0\.01 there, 0\.5 now"):
        train(tiny_config(**{"optimizer.lr": 0.5}), workdir)
    assert contents(workdir) == before


def test_a_directory_with_foreign_files_is_left_untouched(tmp_path, tiny_config):
    (tmp_path / "thesis.tex").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"not empty and not a run"):
        train(tiny_config(), tmp_path)
    assert contents(tmp_path) == before


def test_networks_without_state_spaces_have_no_picture_of_kernels(tmp_path, tiny_config):
    config = tiny_config(
        **{
            "model.name": "isotropic_conv2d",
            "model.mixer": {"kernel_size": 3},
            "epochs": 1.0,
            "optimizer.warmup_epochs": 0.5,
        }
    )
    scores = train(config, tmp_path / "run")
    assert set(scores) == {4, 8}
    names = ["accuracy_by_resolution", "predictions", "training_curves"]
    assert sorted(path.stem for path in (tmp_path / "run" / "pictures").iterdir()) == names


def test_a_run_that_diverges_keeps_its_good_checkpoints(tmp_path, tiny_config):
    """A rate of 1e30 makes parameters infinite at the first step that has it: warm-up is at 0 for step 1."""
    config = tiny_config(**{"optimizer.lr": 1e30, "checkpoint_every_epochs": 0.25})
    with pytest.raises(NonFiniteLossError, match=r"at step \d+; .* Try a lower config\.optimizer\.lr") as error:
        train(config, tmp_path / "run")
    bad = int(str(error.value).split(" at step ")[1].split(";")[0])
    with Checkpoints(tmp_path / "run" / "checkpoints", metric="val/accuracy") as checkpoints:
        assert checkpoints.steps
        assert max(checkpoints.steps) < bad
        assert f"the checkpoint of step {checkpoints.last} is kept" in str(error.value)
    assert max(row["step"] for row in rows(tmp_path / "run")) < bad


LONG = {
    "batch_size": 64,  # 19 steps per epoch
    "epochs": 8.0,
    "ema_decay": 0.9,
    "log_every_steps": 5,
    "augment.flip": True,  # besides crops and dropout, which the config has
    "eval.resolutions": (),
}
"""A run of 152 steps, saved after every 19, for half of them without evaluation."""


def kill(process, workdir, *, when):
    """Kills a process at once when `when()` holds."""
    while not when():
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not any(row["step"] == 152 for row in read_metrics(workdir))


@pytest.mark.slow
def test_a_run_that_is_killed_and_started_again_ends_as_an_unbroken_one(command, tiny_config, tmp_path):
    """Bit for bit: it is killed amid training, and once more while it saves."""
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    long = command()
    long.arguments += [f"--config.{name}={value}" for name, value in LONG.items()]
    done = long.run(f"--workdir={unbroken}")
    assert done.returncode == 0, done.stderr

    checkpoints = killed / "checkpoints"
    kill(
        long.start(f"--workdir={killed}"),
        killed,
        when=lambda: any(row["step"] >= 44 for row in read_metrics(killed)),
    )
    there = {entry.name for entry in checkpoints.iterdir()}
    kill(
        long.start(f"--workdir={killed}"),
        killed,
        when=lambda: (
            (new := {entry.name for entry in checkpoints.iterdir()} - there)
            and any(name.isdigit() for name in new)
            and any(name.endswith(".orbax-checkpoint-tmp") for name in new)
        ),
    )
    done = long.run(f"--workdir={killed}")
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout

    config = tiny_config(**LONG)
    state, *found = last_state(killed, config)
    expected, *expected_found = last_state(unbroken, config)
    assert int(state.step) == 152
    assert found == expected_found
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
    assert rows(killed) == rows(unbroken)
    assert (killed / "results.json").read_text() == (unbroken / "results.json").read_text()
    assert not list(checkpoints.glob("*tmp*"))
