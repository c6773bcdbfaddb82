import dataclasses
import itertools
import json
import re
import socket
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.experiment import build
from experiments.train import train, workdir_flag
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.metrics import read_metrics

# What XLA's library for collectives prints, piece by piece from several threads, so that pieces of lines get mixed.
GLOO = re.compile(r"Gloo|is connected to|peer ranks|^[\s\d]*$")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_open_mpi(rank, size, port):
    """What mpirun tells the processes that it starts, and where the first one listens."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"1531576320.0;tcp://127.0.0.1:{port}",
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    }


def run_as_two(command, *arguments, **environment):
    """Runs a command in two processes of four devices each; gives (status, output, errors) of both."""
    port = free_port()
    started = [command.start(*arguments, devices=4, **as_open_mpi(rank, 2, port), **environment) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        (process.returncode, "".join(line for line in output.splitlines(True) if not GLOO.search(line)), errors)
        for process, (output, errors) in zip(started, outputs, strict=True)
    ]


def numbers(workdir):
    return [
        {name: value for name, value in row.items() if name != "images_per_second"} for row in read_metrics(workdir)
    ]


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
        common = of_classes.evaluate(state, "prime", 8).logits.mean(0)
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
        assert evaluation.logits.shape == (count, 10)
        assert np.flatnonzero(evaluation.mask).tolist() == readable.tolist()
        logits, wanted = evaluation.logits[readable], labels[readable]
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


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_train_and_evaluate_as_one_with_all_the_devices(command, finished, on_eight, tmp_path):
    """Of the script at the end of this file: `train`, then evaluations of a checkpoint of one process."""
    together, (alone, config, _) = tmp_path / "together", finished
    (first, output, errors), (second, other_output, other_errors) = run_as_two(
        command(Path(__file__).stem),
        f"--workdir={together}",
        f"--finished={best(alone)}",
        f"--written={tmp_path}",
        PYTHONPATH=str(Path(__file__).parent),
    )
    assert (first, second) == (0, 0), errors + other_errors
    assert "on 8 x cpu" in output
    assert other_output == ""

    assert len(numbers(together)) == len(numbers(alone)) == 8
    for ours, theirs in zip(numbers(together), numbers(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

    results, expected = (json.loads((workdir / "results.json").read_text()) for workdir in [together, alone])
    assert results["step"] == expected["step"]
    for resolution, some in expected["test"].items():
        assert results["test"][resolution] == pytest.approx(some, rel=1e-4)
    assert len(list(together.glob("events.out.tfevents.*"))) == 1
    assert len(list((together / "pictures").iterdir())) == 4

    # Both processes have all scores, and those are the ones of one process.
    for rank in range(2):
        assert_same_scores(json.loads((tmp_path / f"{rank}.json").read_text()), scores(on_eight))

    parts = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for name in ("image", "label"):
        halves = [part[name] for part in parts]
        assert [half.shape[:2] for half in halves] == [(6, 128)] * 2
        whole = np.stack([batch[name] for batch in first_batches(build(config))])
        np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)


@pytest.mark.slow
def test_a_mistake_ends_all_processes(command, tmp_path):
    """Whichever ends first may take the other along before that has said the same."""
    ended = run_as_two(command(), f"--workdir={tmp_path / 'run'}", "--config.batch_size=63")
    message = "error: config.batch_size must be a multiple of 8 (8 devices x accumulate=1)"
    told = [(status, output) for status, output, errors in ended if message in errors and "Traceback" not in errors]
    assert told
    assert set(told) == {(2, "")}
    assert all(status != 0 for status, *_ in ended)
    assert not (tmp_path / "run").exists()


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
    run_command(
        lambda: train_and_evaluate(config_flag.value, workdir_flag.value, finished_flag.value, written_flag.value)
    )
