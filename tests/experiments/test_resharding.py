"""A run goes on with other devices, another mesh, and another number of processes."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from processes import run_as_two

from experiments.experiment import build
from experiments.train import train, workdir_flag
from ssm_jax.training import sharding
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.metrics import read_metrics


def on(tiny_config, data, fsdp):
    """The tiny experiment on a mesh of the first data x fsdp devices."""
    config = tiny_config(**{"mesh.data": data, "mesh.fsdp": fsdp})
    return build(config, devices=jax.devices()[: data * fsdp])


def train_some(experiment, state, count):
    """The state after more steps of training, and the losses."""
    losses = []
    with jax.set_mesh(experiment.mesh):
        step = experiment.train_step(experiment.stages[0])
        batches = map(experiment.put, experiment.train_batches(int(state.step)))
        for _ in range(count):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics["loss"]))
    return state, losses


def assert_same(state, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def test_a_run_goes_on_with_eight_then_two_then_four_devices(tiny_config, tmp_path, monkeypatch):
    """Parameters are divided by 4, whole on 2, and divided by 2."""
    monkeypatch.setattr(sharding, "_MIN_SHARDED_BYTES", 0)
    eight, two, four = on(tiny_config, 2, 4), on(tiny_config, 2, 1), on(tiny_config, 2, 2)
    with jax.set_mesh(eight.mesh):
        state, _ = train_some(eight, eight.init(), 2)
    assert not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))
    expected = jax.device_get(state)
    folders = [tmp_path / name for name in ("eight", "two", "four")]
    for experiment, folder, following in zip([eight, two, four], folders, [two, four, None], strict=True):
        with Checkpoints(folder, metric="val/accuracy") as checkpoints:
            checkpoints.save(state)
        if following is not None:
            with Checkpoints(folder) as checkpoints:
                state = checkpoints.restore_last(following.abstract_state)
            assert_same(state, expected)
            shardings = jax.tree.map(lambda x: x.sharding, following.abstract_state)
            assert jax.tree.map(lambda x: x.sharding, state) == shardings
            assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {following.mesh.size}
        notes = [ocp.metadata(path / "2", "state").custom_metadata for path in folders if path.exists()]
        assert all(note["checksums"] == notes[0]["checksums"] for note in notes), experiment.mesh
    with Checkpoints(tmp_path / "eight") as checkpoints:
        _, losses = train_some(eight, checkpoints.restore_last(eight.abstract_state), 2)
    _, on_four = train_some(four, state, 2)
    assert on_four == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_of_two_processes_goes_on_in_one(command, tiny_config, tmp_path):
    """Of the script at the end of this file: a run, and a checkpoint that one of the processes cannot read."""
    together, again, tests = tmp_path / "together", tmp_path / "again", Path(__file__).parent.parent
    ended = run_as_two(
        command(Path(__file__).stem),
        f"--workdir={together}",
        f"--copy={again}",
        PYTHONPATH=os.pathsep.join(map(str, [tests, Path(__file__).parent])),
    )
    (_, _, errors), (_, _, other_errors) = ended
    assert [status for status, *_ in ended] == [0, 0], errors + other_errors

    # What one cannot read none takes: both went back to step 8, and saved step 12 anew.
    assert "process 1: checkpoint" in errors
    assert "12 is damaged: cannot be read in one process. Falling back to the checkpoint of step 8." in errors
    assert "Falling back" not in other_errors
    assert {path.name for path in (again / "checkpoints").iterdir()} == {"8", "12", "12.damaged"}
    config = tiny_config()
    experiment = build(config)
    with Checkpoints(again / "checkpoints") as checkpoints:
        assert_same(
            dataclasses.replace(checkpoints.restore(experiment.abstract_state, 12), step=8),
            checkpoints.restore(experiment.abstract_state, 8),
        )

    # Without its last epochs, the run goes on in this process, and ends as it did.
    expected, results = read_metrics(together), json.loads((together / "results.json").read_text())
    with Checkpoints(together / "checkpoints") as checkpoints:
        last = checkpoints.restore(experiment.abstract_state, 12)
    shutil.rmtree(together / "checkpoints" / "12")
    train(config, together)
    with Checkpoints(together / "checkpoints") as checkpoints:
        again = checkpoints.restore(experiment.abstract_state, 12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), again, last)
    for ours, theirs in zip(read_metrics(together), expected, strict=True):
        for name in theirs.keys() & {"step", "train/loss", "val/loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    assert json.loads((together / "results.json").read_text())["step"] == results["step"]


def train_and_fail_to_read(config, workdir, copy):
    """What each of the two processes does."""
    train(config, workdir)
    if jax.process_index() == 0:
        shutil.copytree(workdir, copy)
    jax.experimental.multihost_utils.sync_global_devices("copied")
    load = ocp.load

    def load_unless(path, *arguments, **options):
        state = load(path, *arguments, **options)
        if jax.process_index() == 1 and path.name == "12":
            raise ValueError("cannot be read in one process")
        return state

    ocp.load = load_unless
    experiment = build(config)
    with jax.set_mesh(experiment.mesh), Checkpoints(copy / "checkpoints", metric="val/accuracy") as checkpoints:
        state = checkpoints.restore_last(experiment.abstract_state)
        assert int(state.step) == 8
        checkpoints.save(dataclasses.replace(state, step=state.step + 4))


if __name__ == "__main__":
    from absl import flags

    from experiments.command import config_flag, run_command

    copy_flag = flags.DEFINE_string("copy", None, "Where to copy the run.")
    run_command(lambda: train_and_fail_to_read(config_flag.value, Path(workdir_flag.value), Path(copy_flag.value)))
