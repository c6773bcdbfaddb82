"""Where the numbers of a run go: metrics.jsonl, TensorBoard, whatever else is given, and the terminal."""

import contextlib
import datetime
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

_UPLOAD_SECONDS = 60.0
"""Between copies of files to an object store, which takes each one whole."""

_LINE_SECONDS = 30.0
"""Between lines about the progress where the output is no terminal."""


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, each a dict with `step`. A last line cut short by a kill is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@runtime_checkable
class Writer(Protocol):
    """Something that takes the rows of a run."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes one row. There may be several of a step, with other names."""
        ...

    def flush(self) -> None:
        """Keeps what was written, whatever happens to this process: a checkpoint is about to be saved."""
        ...

    def close(self) -> None:
        """Ends the run, or this part of it."""
        ...


class JsonlWriter:
    """Appends rows to `metrics.jsonl` in a local folder."""

    def __init__(self, folder: epath.PathLike, rows: Iterable[Mapping[str, Any]] = ()):
        """Begins with `rows`, in place of what is there."""
        self._path = epath.Path(folder) / "metrics.jsonl"
        rewritten = self._path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rewritten.replace(self._path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row, which is in the file when this returns."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def flush(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Nothing is left to do."""


class TensorBoardWriter:
    """Writes rows as scalars to an event file in a local folder.

    Not by `tensorboardX.SummaryWriter`, whose `flush` leaves in memory what its thread has not come to yet.
    """

    def __init__(self, folder: epath.PathLike, *, step: int = 0):
        """Goes on after `step`: TensorBoard drops what earlier files have of later steps."""
        self._file = EventsWriter(str(epath.Path(folder) / "events"))
        self._add(step + 1, file_version="brain.Event:2")
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **what: Any) -> None:
        self._file.write_event(Event(wall_time=time.time(), step=step, **what))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step, summary=Summary(value=values))

    def flush(self) -> None:
        """Writes what is still in memory."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MetricWriter:
    """Gives rows of numbers to `metrics.jsonl` and TensorBoard in a run's directory, and to others; a context manager.

    In a directory of an object store, where nothing can be appended to, the files are copies of local ones: they are
    renewed once a minute, and whenever a checkpoint is about to be saved. Of several processes only the first writes.
    """

    def __init__(self, workdir: epath.PathLike, *, step: int = 0, others: Iterable[Callable[[], Writer]] = ()):
        """Goes on after `step`: later rows, written by a run that was killed, are about to be computed again.

        `others` make further writers; they are called on the first process.
        """
        self._workdir = folder = epath.Path(workdir)
        self._writers: list[Writer] = []
        self._uploads: epath.Path | None = None
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                if "://" in str(workdir):
                    self._uploads = folder = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    stack.callback(self._upload)
                kept = [row for row in read_metrics(workdir) if row["step"] <= step]
                makers = [lambda: JsonlWriter(folder, kept), lambda: TensorBoardWriter(folder, step=step), *others]
                for make in makers:
                    self._writers.append(make())
                    stack.callback(self._writers[-1].close)
                self._upload()
            self._exit = stack.pop_all()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.__exit__(*exception)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row."""
        for writer in self._writers:
            writer.write(step, metrics)
        if self._uploads is not None and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes all rows outlive this process."""
        for writer in self._writers:
            writer.flush()
        self._upload()

    def _upload(self) -> None:
        if self._uploads is not None:
            for path in self._uploads.iterdir():
                (self._workdir / path.name).write_bytes(path.read_bytes())
            self._uploaded = time.monotonic()


class ProgressBar:
    """A bar with loss, accuracy, images per second and time left; where the output is no terminal, lines of that.

    Such a line comes at an `update` that is 30 seconds or more after the last line. Of several processes only the first
    shows anything.
    """

    def __init__(self, *, total_steps: int, step: int):
        """Starts at `step` of `total_steps`."""
        self.total_steps = total_steps
        terminal = sys.stdout.isatty()
        self._lines = jax.process_index() == 0 and not terminal
        self._printed = -math.inf
        self._start = step, time.monotonic()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[metrics]}"),
            TextColumn("{task.fields[images_per_second]:,.0f} images/s"),
            TimeRemainingColumn(),
            TextColumn("left"),
            disable=jax.process_index() != 0 or not terminal,
            speed_estimate_period=600,  # seconds; an update may come once a minute
        )
        unknown: dict[str, Any] = {"metrics": _shown({}), "images_per_second": math.nan}
        self._task = self._progress.add_task("train", total=total_steps, completed=step, **unknown)

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, step: int, metrics: Mapping[str, float], *, images_per_second: float) -> None:
        """Moves the bar to `step`, and shows of `metrics` the loss and, where there is one, the accuracy."""
        fields: dict[str, Any] = {"metrics": _shown(metrics), "images_per_second": images_per_second}
        self._progress.update(self._task, completed=step, **fields)
        if self._lines and time.monotonic() - self._printed >= _LINE_SECONDS:
            self.print(
                f"step {step:,}/{self.total_steps:,}  {_shown(metrics)}  "
                f"{images_per_second:,.0f} images/s  {self._left(step)} left"
            )

    def _left(self, step: int) -> datetime.timedelta:
        """Time to the end, evaluations included, if it goes on as since the start."""
        first, then = self._start
        seconds = (time.monotonic() - then) * (self.total_steps - step) / (step - first)
        return datetime.timedelta(seconds=round(seconds))

    def print(self, line: str) -> None:
        """Prints a line above the bar."""
        if jax.process_index() == 0:
            self._progress.console.print(line, soft_wrap=True, highlight=False)
            self._printed = time.monotonic()


def _shown(metrics: Mapping[str, float]) -> str:
    names = ["loss", *(["accuracy"] if "accuracy" in metrics else [])]
    return "  ".join(f"{name} {metrics.get(name, math.nan):.4f}" for name in names)


class Throughput:
    """How fast training is, and what it waits for, the pauses (evaluation, compilation) left out."""

    def __init__(self, *, devices: int = 1, ideal_seconds: float | None = None):
        """Counts images of `devices` together.

        `ideal_seconds` are those that an image would take on all of them at the peak of their arithmetic; None where it
        is unknown.
        """
        self._devices = devices
        self._ideal_seconds = ideal_seconds
        self.restart()

    def restart(self) -> None:
        """Starts to count anew."""
        self._images, self._waited, self._start = 0, 0.0, time.perf_counter()

    def add(self, images: int) -> None:
        """Counts images."""
        self._images += images

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for input."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @property
    def row(self) -> dict[str, float]:
        """Since the last restart; {} where no image was counted.

        * `images_per_second`, `images_per_second_per_device`
        * `mfu`, where the peak is known: the share of it that went into the products of a forward and a backward pass.
        * `input_wait`: the share of time for which the next batch was waited for. Devices work on the batches before
          meanwhile; where they are what is waited for, it is near 0, and where input is, near 1.
        """
        if not self._images:
            return {}
        seconds = time.perf_counter() - self._start
        rate = self._images / seconds
        row = {"images_per_second": rate, "images_per_second_per_device": rate / self._devices}
        if self._ideal_seconds is not None:
            row["mfu"] = rate * self._ideal_seconds
        return row | {"input_wait": self._waited / seconds}


def memory() -> dict[str, int]:
    """`memory_bytes` in use and `memory_peak_bytes`, of the local device with most; {} on a CPU, which tells none."""
    known = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {name: max(stats[key] for stats in known) for name, key in names.items() if known}
