"""How the processes of a run find each other, fail together and stop together.

A run on several hosts is a process on each, or for each GPU, that does what the others do. Their computations wait for
each other, so that one that left without a word would let the others wait for ever. A thread in each therefore listens,
in the key-value store that process 0 serves, to what others have to say: that one has failed, and why, upon which all
end; or that one was asked to stop, upon which they agree after which step. It also gives a sign of life.

Stopping is asked for by SIGTERM, which announces that a machine is taken away, or by Ctrl-C. Inside of `training` the
step under way is finished and the state saved; where there is nothing to be saved, the process ends at once.
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # which has no public name for the key-value store; orbax takes it from here, too
from rich.console import Console

STATUSES = {signal.SIGTERM: 75, signal.SIGINT: 130}
"""Exit statuses of a run that was stopped: EX_TEMPFAIL, as the same command goes on, and that of shells for Ctrl-C."""

_JOIN_SECONDS = 300  # within which all processes have to come
_TELL_SECONDS = 10  # until it is said that others are waited for
_TWICE_SECONDS = 1  # within which a signal may come again that was sent to the process and to its group
_LISTEN_SECONDS = 1  # at most, until a process has heard what it is told
_SILENCE_SECONDS = 20  # of a process that is taken for dead
_ANSWER_SECONDS = 5  # for the others to hear that all end
_SAVE_SECONDS = 25  # of the 30 that cloud machines have after SIGTERM

_DAY = 24 * 60 * 60

_DEAD = "it was killed, or its host is lost"
_THREAD = "ssm_jax processes"

# Keys of the store, or what they begin with.
_END = "ssm_jax/end"
_STOP = "ssm_jax/stop/"
_ASKED = "ssm_jax/asked/"
_ALIVE = "ssm_jax/alive/"
_LEAVING = "ssm_jax/leaving/"


class Stopping:
    """Tells when to stop. All processes ask, equally often, and are answered alike."""

    def __init__(self):
        self._lock = threading.Lock()
        self._asked = 0
        self._answer_at = math.inf
        self.status = 0
        """Exit status of a process that stops."""

    @property
    def requested(self) -> bool:
        """Whether it was agreed when to stop."""
        return self._answer_at < math.inf

    def __call__(self, step: int | None = None) -> bool:
        """Asks, after a step or amid an evaluation; from the time on that is agreed upon the answer is yes."""
        del step
        with self._lock:
            self._asked += 1
            return self._asked >= self._answer_at

    def agree(self, status: int, exchange: Callable[[int], list[int]]) -> bool:
        """Sets when to stop, and with which status; False if a process has nothing to be saved.

        `exchange` gives all processes' numbers of questions so far, given that of this one, which asks no more in the
        meantime.
        """
        with self._lock:
            asked = exchange(self._asked)
            self.status, self._answer_at = status, max(asked) + 1
            return min(asked) > 0

    def nothing_to_save(self) -> None:
        """Takes back that there were questions."""
        with self._lock:
            self._asked = 0


_stopping = Stopping()
_joined = threading.Event()
_finished = threading.Event()
_ending = threading.Lock()


@contextlib.contextmanager
def training() -> Iterator[Stopping]:
    """Inside, a process that is to stop goes on until what is given here says so, if that was asked at least once."""
    try:
        yield _stopping
    finally:
        _stopping.nothing_to_save()
    if _stopping.requested:  # for a step after the last one
        _end_stopped()


def join(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of the run: those described, or those that a TPU pod, SLURM or Open MPI has started.

    Raises ValueError for arguments that do not fit, and where it is not clear how many processes there are.
    """
    _check(coordinator_address, num_processes, process_id)
    if num_processes == 1 or (num_processes is None and _only_task()):
        return  # JAX would take one of the devices
    jax.config.update("jax_enable_preemption_service", False)  # takes SIGTERM for itself, and asks after steps only
    late = f"not all processes of this run have come within {_JOIN_SECONDS} seconds."
    patience = _after(_TELL_SECONDS, lambda: print("waiting for the other processes", file=sys.stderr, flush=True))
    timer = _after(_JOIN_SECONDS - 2, lambda: _end(f"error: {late}", 1))  # before JAX aborts, which leaves a page
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids=[] if _only_task_of_its_node() else None,  # that is, all; JAX would take one
            cluster_detection_method="deactivate" if coordinator_address else None,
            initialization_timeout=_JOIN_SECONDS,
            # JAX notices the same after half of this to all of it, and aborts; it should not be first.
            heartbeat_timeout_seconds=2 * (_SILENCE_SECONDS + _ANSWER_SECONDS + 3),
        )
    except (ValueError, RuntimeError, OSError) as error:
        if "coordinator_address should be defined" in str(error):
            return  # nothing has started several
        raise ValueError(
            f"cannot join the other processes: {error} If there are none, say --num_processes=1; if there are, "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I."
        ) from error
    finally:
        patience.cancel()
        timer.cancel()
    _joined.set()
    _listen_to_others()


def _check(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    flags = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if len(missing) == 3 or (num_processes == 1 and len(missing) == 2):
        return
    if coordinator_address is None or num_processes is None or process_id is None:
        raise ValueError(
            f"--{missing[0]} is missing: --coordinator_address, --num_processes and --process_id go together, or are "
            "left out where a TPU pod, SLURM or Open MPI starts the processes."
        )
    found = re.fullmatch(r".+:(\d+)", coordinator_address)
    if not found or not 0 < int(found[1]) < 1 << 16:
        raise ValueError(
            f"--coordinator_address must be HOST:PORT, the host of process 0 and a free port there, such as "
            f"10.0.0.1:1234, got {coordinator_address!r}."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must be from 0 on and less than --num_processes={num_processes}, got {process_id}."
        )


def _only_task() -> bool:
    """Whether SLURM or Open MPI has started one process.

    For a shell in an allocation for several SLURM_NTASKS is of the allocation, but not what is of the step.
    """
    names = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    return next((os.environ[name] for name in names if name in os.environ), None) == "1"


def _only_task_of_its_node() -> bool:
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
    return tasks is not None and tasks == os.environ.get("SLURM_STEP_NUM_NODES")


def listen_to_signals() -> None:
    """From now on, SIGTERM and Ctrl-C stop the run as described above. To be called in the main thread."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in STATUSES:
        signal.signal(number, lambda *_: None)
    # A thread that this wakes, as the main one runs no handlers while it compiles, which may take minutes.
    signal.set_wakeup_fd(write)
    threading.Thread(target=_listen_to_signals, args=(read,), daemon=True).start()


def several() -> bool:
    """Whether this process is one of several."""
    return _joined.is_set()


def finish() -> None:
    """Waits until all processes have done what there is to do."""
    if several():
        store = _store()
        store.wait_at_barrier(_END, 1000 * _DAY)  # unless one fails
        if _this().process_id == 0:
            store.key_value_set(_END, "")
        _finished.set()
        for thread in threading.enumerate():  # not to be in the middle of something when the store is gone
            if thread.name == _THREAD:
                thread.join()
    _finished.set()


def stop_status() -> int:
    """Exit status of a run that was stopped."""
    return _stopping.status


def fail(message: str, *, status: int, details: str = "") -> NoReturn:
    """Ends all processes with a message; the others show it, without the details, as that of this one."""
    if not _ending.locked():  # or another process has failed, and this is what came of it
        print(f"{details}error: {message}", file=sys.stderr, flush=True)
    if not several():
        sys.exit(status)
    _tell_all(message, status)
    _end("", status)


def _tell_all(message: str, status: int) -> None:
    number = _this().process_id
    told = {"from": number, "message": f"{_name(number)}: {message}", "status": status}
    with contextlib.suppress(Exception):  # as another one was first, or process 0 is gone
        _store().key_value_set(_END, json.dumps(told))


def _this() -> Any:
    return distributed.global_state


def _store() -> Any:
    return _this().client


def _name(number: int, host: str = "") -> str:
    return f"process {number} of {_this().num_processes} on {host or socket.gethostname()}"


def _listen_to_signals(read: int) -> None:
    first: float | None = None
    while True:
        number = os.read(read, 1)[0]
        if number not in STATUSES or _finished.is_set():
            continue
        status, now = STATUSES[signal.Signals(number)], time.monotonic()
        if first is None:
            first = now
            if several():
                _store().key_value_set(f"{_STOP}{_this().process_id}", str(status))  # _show_life goes on from there
            else:
                _stop(status, lambda asked: [asked])
        elif number == signal.SIGINT and now - first > _TWICE_SECONDS:
            if several():
                _tell_all("stopped by Ctrl-C.", status)
            _end("stopped at once; the same command goes on from the last checkpoint, if there is one.", status)


def _stop(status: int, exchange: Callable[[int], list[int]]) -> None:
    if not _stopping.agree(status, exchange):
        _end_stopped()
    if status == STATUSES[signal.SIGINT]:
        print("stopping after this step; Ctrl-C once more stops at once.", file=sys.stderr, flush=True)
    _after(_SAVE_SECONDS, lambda: _end_stopped(f" without the state saved, which takes over {_SAVE_SECONDS} seconds"))


def _exchange(asked: int) -> list[int]:
    """The numbers of all processes; that there is nothing to be saved if one does not answer."""
    store = _store()
    store.key_value_set(f"{_ASKED}{_this().process_id}", str(asked))
    try:
        store.wait_at_barrier(_STOP, 1000 * _ANSWER_SECONDS)
    except jax.errors.JaxRuntimeError:
        return [0]
    return [int(value) for _, value in store.key_value_dir_get(_ASKED)]


def _listen_to_others() -> None:
    for listen in (_show_life, _listen_to_failures):
        threading.Thread(target=listen, name=_THREAD, daemon=True).start()


def _show_life() -> None:
    """Gives signs of life, sees whether others do, if this is process 0, and whether one was asked to stop."""
    store, number = _store(), _this().process_id
    seen: dict[str, tuple[str, float]] = {}
    for beat in itertools.count():
        try:
            store.key_value_set(f"{_ALIVE}{number}", f"{beat} {socket.gethostname()}", allow_overwrite=True)
            requests = [] if _stopping.requested else store.key_value_dir_get(_STOP)
            signs = store.key_value_dir_get(_ALIVE) if number == 0 else []
        except Exception:  # process 0 is gone, which the other thread sees, or there is nothing to do any more
            return
        if requests:
            _stop(int(requests[0][1]), _exchange)
        for key, sign in signs:
            if sign != seen.get(key, ("", 0))[0]:
                seen[key] = sign, time.monotonic()
            elif time.monotonic() - seen[key][1] > _SILENCE_SECONDS:
                silent = _name(int(key.removeprefix(_ALIVE)), sign.partition(" ")[2])
                fail(f"{silent} has given no sign of life for {_SILENCE_SECONDS} seconds: {_DEAD}.", status=1)
        if _finished.wait(_LISTEN_SECONDS):
            return


def _listen_to_failures() -> None:
    """Ends this process where another one has failed."""
    while True:
        try:
            told = _store().blocking_key_value_get(_END, 1000 * _DAY)
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            _end(_process_0_is_gone(), 1, together=False)
        if told:
            failure = json.loads(told)
            if failure["from"] != _this().process_id:
                _end(f"error: {failure['message']}", failure["status"])
        return


def _end_stopped(how: str = "") -> NoReturn:
    _end(f"stopped{how}; the same command goes on from the last checkpoint, if there is one.", _stopping.status)


def _end(message: str, status: int, *, together: bool = True) -> NoReturn:
    """Ends this process, from any thread, whatever the others are doing: it is not a regular exit, which waits."""
    _ending.acquire()  # for ever: the first thread that comes ends the process
    if message:
        print(message, file=sys.stderr, flush=True)
    if several() and together:
        _leave_together()
    for worker in multiprocessing.active_children():
        worker.kill()
    Console().show_cursor()  # which a progress bar hides
    sys.stdout.flush()
    os._exit(status)


def _leave_together() -> None:
    """Waits for the other processes to have heard of the end: what they see of one that is gone would confuse."""
    store, this = _store(), _this()
    try:
        store.key_value_set(f"{_LEAVING}{this.process_id}", "")
        try:
            store.wait_at_barrier(_LEAVING, 1000 * _ANSWER_SECONDS)
        except jax.errors.JaxRuntimeError:
            here = {key.removeprefix(_LEAVING) for key, _ in store.key_value_dir_get(_LEAVING)}
            for key, sign in store.key_value_dir_get(_ALIVE):
                if (number := key.removeprefix(_ALIVE)) not in here:
                    print(
                        f"error: {_name(int(number), sign.partition(' ')[2])} does not answer: {_DEAD}.",
                        file=sys.stderr,
                    )
        if this.process_id == 0:
            time.sleep(1)  # JAX aborts those that cannot reach the store
    except Exception:
        print(_process_0_is_gone(), file=sys.stderr, flush=True)


def _process_0_is_gone() -> str:
    return f"error: {_name(0, _this().coordinator_address.rpartition(':')[0])} does not answer: {_DEAD}."


def _after(seconds: float, call: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer
