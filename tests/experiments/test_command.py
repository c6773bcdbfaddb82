import contextlib
import itertools
import signal
import threading

import pytest

from experiments.command import _interrupt, until_interrupted


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


def test_an_interrupt_that_got_lost_ends_the_run_at_the_next_batch(monkeypatch):
    """As in a destructor, where Python prints exceptions and goes on."""
    interrupted = threading.Event()
    monkeypatch.setattr("experiments.command._interrupted", interrupted)
    batches = until_interrupted(itertools.count())
    assert [next(batches), next(batches)] == [0, 1]
    with contextlib.suppress(KeyboardInterrupt):
        _interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        next(batches)


def test_an_interrupted_run_says_how_it_goes_on(command, tmp_path):
    process = command().start(f"--workdir={tmp_path}", "--config.epochs=10000", "--config.eval.every_epochs=10000")
    assert "steps of 256 images" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "error: stopped; the same command goes on from the last checkpoint." in errors
    assert "Traceback" not in errors
