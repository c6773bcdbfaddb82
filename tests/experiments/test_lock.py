import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest
from etils import epath

from experiments.lock import WorkdirInUseError, locked


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path / "run")


def test_a_workdir_in_use_is_refused_by_who_has_it(workdir):
    who = f"process {os.getpid()} on {socket.gethostname()}"
    with locked(workdir):
        with (
            pytest.raises(WorkdirInUseError, match=f"^--workdir={workdir} is in use: {who} trains there"),
            locked(workdir),
        ):
            pass
        with pytest.raises(WorkdirInUseError), locked(workdir):  # the refused one has not ended the lock
            pass
        with locked(workdir.parent / "other"):
            pass


def test_a_workdir_is_free_when_the_start_has_ended(workdir):
    workdir.mkdir()
    for _ in range(2):
        with pytest.raises(KeyError), locked(workdir):
            raise KeyError("a mistake")
    assert [*workdir.iterdir()] == []


def test_a_new_workdir_to_which_nothing_was_added_is_removed(workdir):
    with locked(workdir):
        pass
    assert not workdir.exists()
    with locked(workdir):
        (workdir / "config.json").write_text("{}")
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_a_killed_process_has_no_lock(workdir):
    program = """
import sys
from etils import epath
from experiments.lock import locked
with locked(epath.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(workdir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(WorkdirInUseError, match=f"in use: process {other.pid} on "), locked(workdir):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with locked(workdir):
            pass


def test_a_lock_on_a_file_that_was_removed_is_none(workdir, monkeypatch):
    """Between opening and locking it, the start that had it ends."""
    flock, calls = fcntl.flock, []

    def after_removal(file, how):
        calls.append(how)
        if len(calls) == 1:
            os.unlink(file.name)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_removal)
    with locked(workdir):
        assert len(calls) == 2
        with pytest.raises(WorkdirInUseError), locked(workdir):
            pass


def test_storage_without_locks_has_none(workdir, monkeypatch):
    with locked(epath.Path("gs://bucket/run")):
        pass

    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(workdir), locked(workdir):
        pass
