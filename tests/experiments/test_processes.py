import json
import re
import socket

import pytest

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


def run_as_two(command, *arguments):
    """Runs a command in two processes of four devices each; gives (status, output, errors) of both."""
    port = free_port()
    started = [command.start(*arguments, devices=4, **as_open_mpi(rank, 2, port)) for rank in range(2)]
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


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_processes_train_as_one_with_all_the_devices(command, finished, tmp_path):
    together, (alone, _, _) = tmp_path / "together", finished
    (first, output, errors), (second, other_output, other_errors) = run_as_two(command(), f"--workdir={together}")
    assert (first, second) == (0, 0), errors + other_errors
    assert "on 8 x cpu" in output
    assert other_output == ""

    assert len(numbers(together)) == len(numbers(alone)) == 8
    for ours, theirs in zip(numbers(together), numbers(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

    results, expected = (json.loads((workdir / "results.json").read_text()) for workdir in [together, alone])
    assert results["step"] == expected["step"]
    for resolution, scores in expected["test"].items():
        assert results["test"][resolution] == pytest.approx(scores, rel=1e-4)
    assert len(list(together.glob("events.out.tfevents.*"))) == 1
    assert len(list((together / "pictures").iterdir())) == 4


@pytest.mark.slow
def test_a_mistake_ends_all_processes(command, tmp_path):
    for status, output, errors in run_as_two(command(), f"--workdir={tmp_path / 'run'}", "--config.batch_size=63"):
        assert status == 2
        assert output == ""
        assert "error: config.batch_size must be a multiple of 8 (8 devices x accumulate=1)" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()
