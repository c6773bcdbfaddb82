import contextlib
import os
import re
import signal
import threading
import time
import types

import jax
import pytest
from etils import epath
from processes import outputs

from experiments import processes
from experiments.lock import locked
from experiments.processes import Stopping
from experiments.train import train
from ssm_jax.training.loop import Stopped
from ssm_jax.training.metrics import read_metrics


@pytest.fixture
def refused(command, tmp_path):
    """Runs a command that is to be refused, and gives its message."""

    def run(*arguments, workdir=True, **options):
        workdir = [f"--workdir={tmp_path / 'run'}"] if workdir else []
        done = command(tiny=False, **options).run(*workdir, *arguments)
        assert done.returncode == 2
        assert done.stdout == ""
        message = "".join(line for line in done.stderr.splitlines(keepends=True) if "TPU" not in line)
        assert "Traceback" not in message
        assert not (tmp_path / "run").exists()
        return message[message.index("error: ") :]

    return run


def test_an_unknown_field_is_answered_with_a_near_one(refused):
    message = refused("--config.model.mixer.d_stat=4")
    assert message.startswith("error: config has no field 'model.mixer.d_stat'; did you mean ")
    assert "config.model.mixer.d_state" in message


def test_an_unknown_switch_is_answered_with_a_near_one(refused):
    assert refused("--noconfig.augment.flop").startswith(
        "error: config has no field 'augment.flop'; did you mean config.augment.flip?"
    )


def test_an_outlandish_field_is_answered_with_all_fields(refused):
    message = refused("--config.zzz", "4")
    assert message.startswith("error: config has no field 'zzz'; did you mean one of accumulate, augment.color_jitter,")
    assert "model.mixer.d_state" in message


def test_a_value_of_the_wrong_type_is_refused(refused):
    message = refused("--config.batch_size=many")
    assert "--config.batch_size=many" in message


def test_a_missing_workdir_is_refused(refused):
    assert "--workdir must have a value" in refused(workdir=False)


def test_a_missing_config_is_refused(refused):
    assert "--config must have a value" in refused(config=None)


def test_a_config_file_that_is_not_there_is_refused(refused):
    assert "configs/s4nd/digit.py" in refused("--config.epochs=1", config="configs/s4nd/digit.py")


@pytest.mark.parametrize("argument", ["", ":resnet51"])
def test_an_unknown_argument_of_a_config_is_answered_with_all(refused, argument):
    message = refused(config=f"configs/backbones/image_folder.py{argument}")
    assert message.startswith("error: --config=configs/backbones/image_folder.py:FAMILY needs a FAMILY of resnet, vit,")
    assert message.strip().endswith(f"got {argument.removeprefix(':')!r}.")


def test_a_positional_argument_is_refused(refused):
    assert refused("runs/digits").startswith("error: unexpected argument 'runs/digits': options are written --NAME=")


def test_an_impossible_value_is_refused(refused):
    assert refused("--config.model.mixer.d_state=5").startswith("error: config.model.mixer.d_state must be even")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "--coordinator_address is missing: --coordinator_address, --num_processes and "),
        (["--coordinator_address=10.0.0.1:1234", "--num_processes=2"], "--process_id is missing: "),
        (["--process_id=0"], "--coordinator_address is missing: "),
        (["--coordinator_address=10.0.0.1", "--num_processes=2", "--process_id=0"], "--coordinator_address must be "),
        (["--coordinator_address=a:70000", "--num_processes=2", "--process_id=0"], "--coordinator_address must be "),
        (
            ["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"],
            "--process_id must be from 0 on and less",
        ),
        (
            ["--coordinator_address=a:1", "--num_processes=0", "--process_id=0"],
            "--process_id must be from 0 on and less",
        ),
    ],
)
def test_processes_that_are_half_described_are_refused(flags, message):
    names = {name: int(value) if value.isdigit() else value for name, value in (f[2:].split("=") for f in flags)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        processes.join(**names)


def test_half_described_processes_end_with_a_message(refused):
    flags = ["--coordinator_address=10.0.0.1:1234", "--num_processes=2", "--process_id=2"]
    assert refused(*flags).startswith("error: --process_id must be from 0 on and less than --num_processes=2, got 2.")


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:5", "OMPI_COMM_WORLD_RANK": "1"}
OPEN_MPI |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize is called with by a process that has some variables; None if it is not."""

    def join(variables, **flags):
        given = []
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("jax.distributed.initialize", lambda *args, **options: given.append((args, options)))
        monkeypatch.setattr("experiments.processes._listen_to_others", lambda: None)
        monkeypatch.setattr(jax.config, "update", lambda *args: None)
        monkeypatch.setattr(processes, "_joined", threading.Event())
        processes.join(**flags)
        return given[0] if given else None

    return join


@pytest.mark.parametrize(
    "variables",
    [
        SLURM | {"SLURM_NTASKS": "1"},
        SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},  # a shell in an allocation
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_NTASKS": "8"},
    ],
)
def test_the_only_task_of_a_scheduler_is_a_process_of_its_own(joined, variables):
    assert joined(variables) is None


def test_one_of_one_is_a_process_of_its_own_wherever_it_is(joined):
    assert joined(SLURM | {"SLURM_NTASKS": "8"}, num_processes=1) is None


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, None),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, []),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
    ],
)
def test_a_process_has_the_devices_of_its_node_unless_others_are_there(joined, variables, devices):
    """None is JAX's own choice, the device of the process's number there."""
    args, options = joined(variables)
    assert args == (None, None, None)
    assert options["local_device_ids"] == devices
    assert options["cluster_detection_method"] is None


def test_processes_that_are_described_are_not_looked_for(joined):
    flags = {"coordinator_address": "[::1]:1234", "num_processes": 2, "process_id": 1}
    args, options = joined(SLURM | {"SLURM_NTASKS": "8"}, **flags)
    assert args == ("[::1]:1234", 2, 1)
    assert options["cluster_detection_method"] == "deactivate"


def test_a_cluster_that_jax_cannot_make_out_is_told_with_what_to_do(monkeypatch, joined):
    def fails(*args, **options):
        raise RuntimeError("no such job.")

    monkeypatch.setattr("jax.distributed.initialize", fails)
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    with pytest.raises(
        ValueError, match=r"^cannot join the other processes: no such job\. If there are none, say --num_p"
    ):
        processes.join()


def test_all_that_ask_are_told_to_stop_at_the_same_question():
    """One is three steps ahead of another when a third one gets the signal."""
    asked = [4, 7, 5]
    all_of_them = [Stopping() for _ in asked]
    for stopping, count in zip(all_of_them, asked, strict=True):
        assert not any(stopping(step) for step in range(count))
    for stopping in all_of_them:
        assert stopping.agree(75, lambda own: asked if own in asked else [])
    for stopping, count in zip(all_of_them, asked, strict=True):
        answers = [stopping(step) for step in range(count, 9)]
        assert answers.index(True) + count == 7
        assert stopping.status == 75


def test_there_is_nothing_to_be_saved_before_all_have_taken_a_step():
    stopping = Stopping()
    stopping(1)
    assert not stopping.agree(75, lambda own: [own, 0])


def test_the_second_interrupt_ends_a_run_at_once_unless_it_is_the_first_that_came_twice(monkeypatch):
    """After half a second, and after another one and a half."""
    said = []

    def end(message, status):
        said.append((message.partition(";")[0], status))
        raise SystemExit

    clock = iter([0.0, 0.5, 2.0])
    monkeypatch.setattr(processes, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(processes, "_finished", threading.Event())
    monkeypatch.setattr(processes, "_stop", lambda status, exchange: said.append(("stopping", status)))
    monkeypatch.setattr(processes, "_end", end)
    read, write = os.pipe()
    os.write(write, bytes([signal.SIGINT] * 3))
    with pytest.raises(SystemExit):
        processes._listen_to_signals(read)
    assert said == [("stopping", 130), ("stopped at once", 130)]
    assert next(clock, None) is None


def test_a_run_that_is_told_to_stop_before_its_first_step_ends_at_once(command, tmp_path):
    process = command().start(f"--workdir={tmp_path}", "--config.epochs=10000", "--config.eval.every_epochs=10000")
    assert "steps of 256 images" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    [(_, errors)] = outputs([process])
    assert process.returncode == 130
    assert "; the same command goes on" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_an_interrupted_run_saves_its_step_and_goes_on_from_it(command, tmp_path):
    """Ctrl-C reaches all processes of a terminal's job, also those that read for it."""
    long = [f"--workdir={tmp_path}", "--config.epochs=10000", "--config.eval.every_epochs=10000"]
    long += ["--config.checkpoint_every_epochs=10000", "--config.data.workers=1"]
    process = command().start(*long, start_new_session=True)
    while not read_metrics(tmp_path):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    [(_, errors)] = outputs([process])
    assert process.returncode == 130
    assert "stopping after this step; Ctrl-C once more stops at once." in errors
    (step,) = re.findall(r"^stopped at step (\d+); the same command goes on\.$", errors, re.MULTILINE)
    assert "Traceback" not in errors
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [step]


@pytest.mark.slow
def test_a_run_that_is_stopped_amid_an_evaluation_evaluates_that_first(finished, tiny_config, tmp_path, monkeypatch):
    """After 11 steps and 2 questions about the evaluation at step 8, it is stopped in that of the last step, 12."""
    workdir, config, scores = finished
    stopping = Stopping()
    stopping.agree(75, lambda asked: [12])
    with monkeypatch.context() as patch:
        patch.setattr("experiments.train.training", lambda: contextlib.nullcontext(stopping))
        with pytest.raises(Stopped, match=r"step 12"):
            train(config, tmp_path / "run")
    assert not any(row["step"] == 12 for row in read_metrics(tmp_path / "run") if "val/loss" in row)
    assert train(config, tmp_path / "run") == scores

    def validation(folder):
        return [{k: v for k, v in row.items() if k[:4] == "val/"} for row in read_metrics(folder) if "val/loss" in row]

    assert validation(tmp_path / "run") == validation(workdir)


def test_a_workdir_in_use_is_told_as_something_to_try_again(command, tmp_path):
    with locked(epath.Path(tmp_path / "run")):
        done = command().run(f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert f"error: --workdir={tmp_path / 'run'} is in use: process {os.getpid()} on " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
