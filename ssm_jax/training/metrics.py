"""Where the numbers of a run go: metrics.jsonl, TensorBoard, the terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import tensorboardX
from etils import epath
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, each a dict with `step`. A last line cut short by a kill is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricWriter:
    """Appends rows of numbers to `metrics.jsonl` and to TensorBoard event files in a run's directory.

    Of several processes only the first writes.
    """

    def __init__(self, workdir: epath.PathLike, *, step: int = 0):
        """Goes on after `step`: later rows, written by a run that was killed, are about to be computed again."""
        self._tensorboard = None
        if jax.process_index() != 0:
            return
        self._path = epath.Path(workdir) / "metrics.jsonl"
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        rewritten = self._path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
        rewritten.replace(self._path)
        self._tensorboard = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one row."""
        if self._tensorboard is None:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)


class ProgressBar:
    """A bar with loss, accuracy, images per second and time left; where the output is no terminal, only `print`s.

    Of several processes only the first shows it.
    """

    def __init__(self, *, total_steps: int, step: int):
        """Starts at `step` of `total_steps`."""
        self.total_steps = total_steps
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.4f}"),
            TextColumn("{task.fields[images_per_second]:,.0f} images/s"),
            TimeRemainingColumn(),
            TextColumn("left"),
            disable=jax.process_index() != 0 or not sys.stdout.isatty(),
        )
        unknown: dict[str, Any] = {"loss": math.nan, "accuracy": math.nan, "images_per_second": math.nan}
        self._task = self._progress.add_task("train", total=total_steps, completed=step, **unknown)

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, step: int, *, loss: float, accuracy: float, images_per_second: float) -> None:
        """Moves the bar to `step`."""
        fields: dict[str, Any] = {"loss": loss, "accuracy": accuracy, "images_per_second": images_per_second}
        self._progress.update(self._task, completed=step, **fields)

    def print(self, line: str) -> None:
        """Prints a line above the bar."""
        if jax.process_index() == 0:
            self._progress.console.print(line, soft_wrap=True, highlight=False)


class Throughput:
    """Images per second of training, the pauses (evaluation, compilation) left out."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Starts to count anew."""
        self._images, self._start = 0, time.perf_counter()

    def add(self, images: int) -> None:
        """Counts images."""
        self._images += images

    @property
    def rate(self) -> float:
        """Images per second since the last restart."""
        return self._images / (time.perf_counter() - self._start)
