"""Faults of a run in one process, each of which really happens."""

import contextlib
import re
import resource
import shutil
import signal
import subprocess

import pytest

pytestmark = pytest.mark.faults
PROCESSES = 1


def test_terminated(run, undisturbed):
    """It has 30 seconds: what comes after SIGTERM where machines are taken away."""
    run.row["fault"] = "SIGTERM (preemption)"
    run.start()
    run.hold(lambda: run.step >= 30).send_signal(signal.SIGTERM)
    ((status, _, errors),) = run.ended(within=30)
    assert status == 75, errors
    (step,) = re.findall(r"^stopped at step (\d+); the same command goes on\.$", errors, re.MULTILINE)
    assert "Traceback" not in errors
    assert run.step == run.saved[-1] == int(step)
    run.goes_on(undisturbed)


@pytest.mark.parametrize(
    ("moment", "when"),
    [
        ("between saves", lambda run: run.step >= 45 and 38 in run.saved and not run.saving),
        ("in the middle of a save", lambda run: run.saving and run.saved),
        ("during the first save", lambda run: run.saving),
    ],
)
def test_killed(run, undisturbed, moment, when):
    run.row["fault"] = f"kill -9 {moment}"
    run.start()
    run.hold(lambda: when(run)).kill()
    ((status, *_),) = run.ended()
    assert status == -signal.SIGKILL
    assert run.saving == (moment != "between saves")
    assert bool(run.saved) == (moment != "during the first save")
    run.goes_on(undisturbed)


@pytest.fixture
def disk(run):
    """A small disk for the workdir, with a function that fills it for a process and one that frees it again.

    Where none may be mounted, the size of files is limited, which is as on a full disk.
    """
    folder = run.workdir.parent / "disk"
    folder.mkdir()
    run.workdir = folder / "run"
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
        mounted = done.returncode == 0
    except OSError:
        mounted = False
    if not mounted and not hasattr(resource, "prlimit"):
        pytest.skip("neither a disk can be mounted nor the size of another process's files be limited")
    rest = folder / "rest"

    def fill(process):
        if not mounted:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return
        with rest.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    yield fill, lambda: rest.unlink(missing_ok=True)
    if mounted:
        run.kill()
        subprocess.run(["umount", folder], check=True)


def test_disk_full(run, undisturbed, disk):
    run.row["fault"] = "disk full"
    fill, free = disk
    run.start()
    fill(run.hold(lambda: run.step >= 30))
    ((status, _, errors),) = run.ended()
    assert status == 1, errors
    assert re.search(r"^error: .*(No space left|File too large).* start the same command again", errors, re.MULTILINE)
    assert "Traceback" not in errors
    free()
    run.goes_on(undisturbed)


def cut_off(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(("how", "damage"), [("cut off in the middle", cut_off), ("with one bit flipped", flipped)])
def test_damaged_checkpoint(run, undisturbed, how, damage):
    """Of the newest one, the file that has the arrays."""
    run.row["fault"] = f"file of the newest checkpoint {how}"
    shutil.copytree(undisturbed.workdir, run.workdir)
    file = max(run.workdir.glob("checkpoints/76/state/d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(damage(file.read_bytes()))
    ((_, _, errors),) = run.goes_on(undisturbed, after=76)
    told = r"checkpoint \S+/76 is damaged: .+ Falling back to the checkpoint of step 57\.$"
    assert re.search(told, errors, re.MULTILINE)
    assert (run.workdir / "checkpoints" / "76.damaged").is_dir()


def test_nan(run, undisturbed):
    run.row["fault"] = "NaN in a batch"
    run.start("--fault=with_nan", "--at=30", module="injected")
    ((status, _, errors),) = run.ended()
    assert status == 1
    assert "error: the loss is nan at step 30; the checkpoint of step 19 is kept." in errors
    assert "Traceback" not in errors
    assert run.saved == [19]
    run.goes_on(undisturbed)
