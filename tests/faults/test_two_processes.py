"""Faults of one of two processes."""

import re
import signal

import pytest

pytestmark = pytest.mark.faults
PROCESSES = 2


def test_one_is_terminated(run, undisturbed):
    run.row["fault"] = "one of two: SIGTERM"
    run.start()
    run.hold(lambda: run.step >= 30, rank=1).send_signal(signal.SIGTERM)
    for status, _, errors in run.ended(within=30):
        assert status == 75, errors
        assert "Traceback" not in errors
        (step,) = re.findall(r"^stopped at step (\d+); the same command goes on\.$", errors, re.MULTILINE)
        assert int(step) == run.step == run.saved[-1]
    run.goes_on(undisturbed)


def test_one_is_killed(run, undisturbed):
    run.row["fault"] = "one of two: kill -9 of process 1"
    run.start()
    run.hold(lambda: run.step >= 30 and 19 in run.saved, rank=1).kill()
    (status, _, errors), (killed, *_) = run.ended()
    assert (status, killed) == (1, -signal.SIGKILL), errors
    last = errors.rstrip().rpartition("\n")[2]
    assert re.fullmatch(r"error: process 1 of 2 on \S+ does not answer: it was killed, or its host is lost\.", last)
    run.goes_on(undisturbed)


def test_the_first_is_killed(run, undisturbed):
    """The one that they find each other by. JAX itself aborts the others at once, unless they have ended before."""
    run.row["fault"] = "one of two: kill -9 of process 0"
    run.start()
    run.hold(lambda: run.step >= 30 and 19 in run.saved, rank=0).kill()
    (killed, *_), (status, _, errors) = run.ended()
    assert killed == -signal.SIGKILL
    if status == -signal.SIGABRT:
        assert "This most likely indicates that another task died" in errors
    else:
        assert status == 1
        assert re.search(r"^error: process 0 of 2 on \S+ does not answer: it was killed, ", errors, re.MULTILINE)
    run.goes_on(undisturbed)


def test_one_is_killed_in_the_middle_of_a_save(run, undisturbed):
    run.row["fault"] = "one of two: kill -9 in the middle of a save"
    run.start()
    run.hold(lambda: run.saving and run.saved, rank=1).kill()
    assert [status for status, *_ in run.ended()] == [1, -signal.SIGKILL]
    run.goes_on(undisturbed)


def test_one_fails(run, undisturbed):
    run.row["fault"] = "one of two: an exception"
    run.start("--fault=unreadable", "--at=30", module="injected")
    ended = run.ended()
    for rank, (status, _, errors) in enumerate(ended):
        assert status == 1
        who = "" if rank == 1 else r"process 1 of 2 on \S+: "
        last = errors.rstrip().rpartition("\n")[2]
        assert re.fullmatch(rf"error: {who}OSError: \[Errno 5\] Input/output error", last), errors
        assert ("Traceback" in errors) == (rank == 1)
    run.goes_on(undisturbed)
