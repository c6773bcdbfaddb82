import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from processes import run_as_four, run_as_two

from experiments.experiment import Experiment, build
from experiments.train import train, workdir_flag
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.metrics import read_metrics

COUNT = 97
"""Of examples: a prime number, which no batch divides."""

BROKEN = (0, 23, 24, 95, 96)
"""Of them, some on each process, next to each other, and before the rows that fill up the last batch."""


class Some:
    """Examples in memory of which some cannot be read, and which may belong to groups."""

    def __init__(self, images, labels, *, broken=(), groups=None):
        self.images, self.labels, self.broken, self.groups = images, labels, broken, groups

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = b"no image" if index in self.broken else self.images[index]
        return {"image": image, "label": self.labels[index]}

    def name(self, index):
        return f"example {index}"


def odd_evaluations(config, checkpoint, devices=None):
    """Evaluations of a checkpoint, on some of the devices or all, where rows and devices do not go together."""
    config = config.copy_and_resolve_references()
    config.eval.batch_size = 20  # and so 20 on 1 or 2 devices, 24 on 8
    config.data.max_broken = 0.1
    experiment = build(config)
    if devices is not None:
        axes, types = experiment.mesh.axis_names, experiment.mesh.axis_types
        mesh = jax.make_mesh((devices, 1), axes, types, devices=jax.devices()[:devices])
        experiment = dataclasses.replace(experiment, mesh=mesh)
    test = experiment.dataset.splits["test"]
    images, labels = test.images[:COUNT], test.labels[:COUNT]
    classes = {
        "prime": Some(images, labels),
        "fewer than devices": Some(images[:3], labels[:3]),
        "unreadable": Some(images, labels, broken=BROKEN),
        "clips": Some(images, labels, broken=BROKEN, groups=2 * labels),
    }
    attributes = {"attributes": Some(images, labels[:, None] >> np.arange(10) & 1, broken=BROKEN)}
    of_classes, of_attributes = (
        dataclasses.replace(experiment, dataset=dataclasses.replace(experiment.dataset, **fields))
        for fields in [{"splits": classes}, {"splits": attributes, "multi_label": True}]
    )
    with jax.set_mesh(experiment.mesh), Checkpoints(checkpoint.parent, metric="val/accuracy") as checkpoints:
        state = checkpoints.restore(experiment.abstract_state, int(checkpoint.name))
        # So small a network says the same of nearly all images, were it not for what they have in common.
        common = of_classes.evaluate(state, "prime", 8).rows["logits"].mean(0)
        head = state.params["head"]
        params = state.params | {"head": head | {"bias": head["bias"] - common}}
        state = dataclasses.replace(state, params=params)
        return {
            split: some.evaluate(state, split, 8)
            for some in (of_classes, of_attributes)
            for split in some.dataset.splits
        }


def best(workdir):
    return workdir / "checkpoints" / str(json.loads((workdir / "results.json").read_text())["step"])


@pytest.fixture(scope="module")
def on_eight(finished):
    """Evaluations of the finished run on all devices of one process."""
    workdir, config, _ = finished
    return odd_evaluations(config, best(workdir))


def assert_same_scores(evaluated, expected):
    """Equal where scores count, to rounding where they add up, and nearly where rounding may swap two ranks."""
    assert evaluated.keys() == expected.keys()
    for split, scores in evaluated.items():
        assert scores.keys() == expected[split].keys()
        for name, value in scores.items():
            if name.endswith("accuracy"):
                assert value == expected[split][name], (split, name)
            else:
                tolerance = {"abs": 1e-3} if name == "mean_average_precision" else {"rel": 1e-6}
                assert value == pytest.approx(expected[split][name], **tolerance), (split, name)


def scores(evaluations):
    return {split: evaluation.scores for split, evaluation in evaluations.items()}


def test_every_readable_example_counts_once(on_eight, finished):
    """Against the labels, counted in numpy."""
    labels = build(finished[1]).dataset.splits["test"].labels
    for split, evaluation in on_eight.items():
        count = 3 if split == "fewer than devices" else COUNT
        readable = np.arange(count)
        if split not in ("prime", "fewer than devices"):
            readable = np.setdiff1d(readable, BROKEN)
        assert evaluation.rows["logits"].shape == (count, 10)
        assert np.flatnonzero(evaluation.rows["mask"]).tolist() == readable.tolist()
        logits, wanted = evaluation.rows["logits"][readable], labels[readable]
        if split == "attributes":
            right = (logits >= 0) == (wanted[:, None] >> np.arange(10) & 1)
            assert evaluation.scores["accuracy"] == pytest.approx(np.mean(right), abs=1e-7)
            assert 0 < evaluation.scores["mean_average_precision"] < 1
        else:
            assert evaluation.scores["accuracy"] == np.sum(logits.argmax(-1) == wanted) / len(readable)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            assert evaluation.scores["loss"] == pytest.approx(-log_p[np.arange(len(wanted)), wanted].mean(), rel=1e-5)
        if split == "clips":
            means = [logits[wanted == label].mean(0) for label in range(10)]
            assert evaluation.scores["video_accuracy"] == np.mean(np.argmax(means, -1) == np.arange(10))


@pytest.mark.parametrize("devices", [1, 2])
def test_scores_are_those_of_any_number_of_devices(finished, on_eight, devices):
    workdir, config, _ = finished
    assert_same_scores(scores(odd_evaluations(config, best(workdir), devices)), scores(on_eight))


def first_batches(experiment):
    """What a process reads for the first training steps."""
    return [*itertools.islice(experiment.train_batches(), 6)]  # an epoch has 4


SCRIPT = {"PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent.parent, Path(__file__).parent]))}
"""Where the processes find this file, as the script that it is at its end."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_train_and_evaluate_as_one_with_all_the_devices(command, finished, on_eight, tmp_path):
    """Two, of which one gets a SIGTERM; then both again, with evaluations; and four from where the two were stopped."""
    together, (alone, config, _) = tmp_path / "together", finished
    script, where = command(Path(__file__).stem), f"--workdir={together}"
    for status, _, errors in run_as_two(script, where, "--role=terminated", **SCRIPT):
        assert status == 75, errors
        assert "Traceback" not in errors
        (step,) = re.findall(r"^stopped at step (\d+); the same command goes on\.$", errors, re.MULTILINE)
    assert 5 <= int(step) < 12
    assert (together / "checkpoints" / step).is_dir()
    by_four = tmp_path / "by_four"
    shutil.copytree(together, by_four)

    (first, output, errors), (second, other_output, other_errors) = run_as_two(
        script, where, f"--finished={best(alone)}", f"--written={tmp_path}", **SCRIPT
    )
    assert (first, second) == (0, 0), errors + other_errors
    assert "on 8 x cpu" in output
    assert f"going on from step {step}" in output
    assert other_output == ""
    assert_same_results(together, alone)

    # Both processes have all scores, and those are the ones of one process.
    for rank in range(2):
        assert_same_scores(json.loads((tmp_path / f"{rank}.json").read_text()), scores(on_eight))

    parts = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for name in ("image", "label"):
        halves = [part[name] for part in parts]
        assert [half.shape[:2] for half in halves] == [(6, 128)] * 2
        whole = np.stack([batch[name] for batch in first_batches(build(config))])
        np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)

    (status, output, errors), *others = run_as_four(command(), f"--workdir={by_four}")
    assert status == 0, errors
    assert f"going on from step {step}" in output
    assert [(status, output) for status, output, _ in others] == [(0, "")] * 3
    assert_same_results(by_four, alone)


def assert_same_results(workdir, expected):
    """Up to rounding: sums over devices are made in another order."""
    for ours, theirs in zip(validation(workdir), validation(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (workdir, expected))
    assert ours["step"] == theirs["step"]
    for resolution, some in theirs["test"].items():
        assert ours["test"][resolution] == pytest.approx(some, rel=1e-4)
    assert {path.name for path in (workdir / "pictures").iterdir()} == {
        path.name for path in (expected / "pictures").iterdir()
    }


def validation(workdir):
    """Rows of metrics that do not depend on where training was stopped."""
    rows = [row for row in read_metrics(workdir) if "val/accuracy" in row]
    return [{name: value for name, value in row.items() if name == "step" or name[:4] == "val/"} for row in rows]


@pytest.mark.slow
def test_a_mistake_in_some_processes_ends_all(command, tmp_path):
    """Each says what it was, be it its own or another one's."""
    where = f"--workdir={tmp_path / 'run'}"
    ended = run_as_four(command(), where, of_some=["--config.batch_size=63"], some=(1, 3))
    mistake = r"config\.batch_size must be a multiple of 8 \(8 devices x accumulate=1\)"
    for rank, (status, output, errors) in enumerate(ended):
        who = r"(process \d of 4 on \S+: )?" if rank in (1, 3) else r"process [13] of 4 on \S+: "
        assert status == 2, errors
        assert output == ""
        assert re.search(rf"^error: {who}{mistake}", errors, re.MULTILINE)
        assert "Traceback" not in errors
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_ends_another_that_waits_for_it(command, tmp_path):
    waiting, failing = run_as_two(command(Path(__file__).stem), f"--workdir={tmp_path}", "--role=failing", **SCRIPT)
    assert [waiting[0], failing[0]] == [1, 1]
    assert "Traceback" in failing[2]
    assert "error: RuntimeError: on fire" in failing[2]
    assert re.search(r"^error: process 1 of 2 on \S+: RuntimeError: on fire$", waiting[2], re.MULTILINE)
    assert "Traceback" not in waiting[2]


def terminated(config, workdir):
    """The second process gets a SIGTERM at its fifth batch, from which on both take their time."""
    experiment = build(config)

    def put(batch, count=itertools.count(1)):  # noqa: B008
        if (number := next(count)) >= 5:
            if number == 5 and jax.process_index() == 1:
                signal.raise_signal(signal.SIGTERM)
            time.sleep(0.5)
        return Experiment.put(experiment, batch)

    object.__setattr__(experiment, "put", put)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.train.build", lambda config: experiment)
        train(config, workdir)


def failing():
    """The first process waits for the second one, which fails."""
    if jax.process_index() == 1:
        raise RuntimeError("on fire")
    multihost_utils.sync_global_devices("all are well")


def train_and_evaluate(config, workdir, finished, written):
    """What each of the two processes does."""
    train(config, workdir)
    rank = jax.process_index()
    evaluations = odd_evaluations(config, Path(finished))
    (Path(written) / f"{rank}.json").write_text(json.dumps(scores(evaluations)))
    batches = first_batches(build(config))
    np.savez(
        Path(written) / f"{rank}.npz", **{name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    )


if __name__ == "__main__":
    from absl import flags

    from experiments.command import config_flag, run_command

    finished_flag = flags.DEFINE_string("finished", None, "A checkpoint to evaluate.")
    written_flag = flags.DEFINE_string("written", None, "Folder for the results.")
    role_flag = flags.DEFINE_string("role", None, "What else to do.")

    def main():
        if role_flag.value == "failing":
            failing()
        elif role_flag.value == "terminated":
            terminated(config_flag.value, workdir_flag.value)
        else:
            train_and_evaluate(config_flag.value, workdir_flag.value, finished_flag.value, written_flag.value)

    run_command(main)
