"""Keeping a run's workdir to one start of it at a time."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from etils import epath

from ssm_jax.training.checkpoint_files import of_first_process


class WorkdirInUseError(RuntimeError):
    """Another process trains in the workdir; no mistake of a config, as this may be over when it is tried again."""


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Raises WorkdirInUseError, in all processes of a run, where another one is in here with the same `workdir`.

    The system ends a lock with the process that has it, however that ends. Storage without locks, such as gs://, has
    none. A workdir that did not exist, and to which nothing was added, is removed again.
    """
    with contextlib.ExitStack() as stack:

        def refused() -> str:
            try:
                if "://" not in str(workdir):
                    stack.enter_context(_locked(Path(workdir)))
            except WorkdirInUseError as error:
                return str(error)
            return ""

        if message := of_first_process(refused):
            raise WorkdirInUseError(message)
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    new = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "in_use.tmp"  # a suffix that `check_workdir` overlooks
    with _acquired(path) as file:
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if new:
                with contextlib.suppress(OSError):  # it is not empty
                    workdir.rmdir()


def _acquired(path: Path) -> TextIO:
    """A file that is locked until it is closed. Raises WorkdirInUseError."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise WorkdirInUseError(
                f"--workdir={path.parent} is in use: {holder} trains there. Wait until it ends, or use another workdir."
            ) from None
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # who had it has ended in the meantime, and has removed it
