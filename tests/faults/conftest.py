"""Runs to which faults happen, compared with one that nothing happens to, and a table of what came of them."""

import dataclasses
import importlib.metadata
import os
import platform
import re
import signal
import socket
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from processes import ROOT, Command, as_told, free_port

from ssm_jax.training.metrics import read_metrics

EVERY = 19
"""Steps between checkpoints, of 76 in all; every other one comes with an evaluation."""

FIELDS: dict[str, Any] = {
    "batch_size": 64,  # 19 steps per epoch
    "epochs": 4.0,
    "eval.resolutions": (),
    "ema_decay": 0.9,
    "augment.flip": True,  # besides crops and dropout, which the config has
    "log_every_steps": 1,
}

_SLICE = 0.002  # seconds that a run goes on between two looks at its files


@dataclasses.dataclass
class Run:
    """A run of one or several processes in a workdir."""

    workdir: Path
    fields: dict[str, Any]
    size: int = 1
    processes: list[subprocess.Popen] = dataclasses.field(default_factory=list)
    row: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the table."""

    def start(self, *arguments: str, module: str = "experiments.train") -> None:
        """Starts the command, always the same one unless it has an injected fault."""
        command, port = Command(module), free_port()
        command.arguments += [f"--config.{name}={value}" for name, value in self.fields.items()]
        self.processes = [
            command.start(
                f"--workdir={self.workdir}",
                *arguments,
                *(as_told(rank, self.size, port) if self.size > 1 else ()),
                PYTHONPATH=os.pathsep.join(map(str, (ROOT, Path(__file__).parent))),
            )
            for rank in range(self.size)
        ]

    @property
    def step(self) -> int:
        """The last one that was told of."""
        return max((row["step"] for row in read_metrics(self.workdir)), default=0)

    @property
    def saved(self) -> list[int]:
        """Steps of the checkpoints."""
        folder = self.workdir / "checkpoints"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []

    @property
    def saving(self) -> bool:
        """Whether there is a part of a checkpoint, with arrays."""
        return any(self.workdir.glob("checkpoints/*.orbax-checkpoint-tmp/state*/**/d/*"))

    def hold(self, when, rank=0):
        """Stops a process in the moment in which `when()` holds: it goes on in slices from its first step on."""
        process = self.processes[rank]
        while not self.step:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        while True:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert process.poll() is None, process.communicate()
            if when():
                return process
            process.send_signal(signal.SIGCONT)
            time.sleep(_SLICE)

    def ended(self, within: float = 120) -> list[tuple[int, str, str]]:
        """Waits for all; status, output and errors of each."""
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
        until = time.monotonic() + within
        outputs = [process.communicate(timeout=until - time.monotonic()) for process in self.processes]
        statuses = [process.returncode for process in self.processes]
        ended = [(status, *output) for status, output in zip(statuses, outputs, strict=True)]
        names = [str(status) if status >= 0 else signal.Signals(-status).name for status in statuses]
        messages = [self._last_line(errors) for status, _, errors in ended if status != -signal.SIGKILL]
        self.row["saw"] = ": ".join([" and ".join(names), *messages[:1]]).removesuffix(": ")
        return ended

    def _last_line(self, errors: str) -> str:
        # Without what absl writes before a warning, and JAX before what it aborts for, which is not the last line.
        aborted = re.search(r"^F\d{4} .*", errors, re.MULTILINE)
        last = aborted[0] if aborted else errors.rstrip().rpartition("\n")[2]
        told = re.sub(r"^[A-Z]\d{4} .*?\] ", "", last)
        told = told.replace(str(self.workdir), "WORKDIR").replace(socket.gethostname(), "HOST")
        return textwrap.shorten(told, 160, placeholder=" ...")

    def goes_on(self, undisturbed: "Run", *, after: int | None = None) -> list[tuple[int, str, str]]:
        """The same command again goes on from the last checkpoint before `after`, and ends as if nothing had been."""
        at, saved = self.step, [step for step in self.saved if after is None or step < after]
        from_step = max(saved, default=0)
        self.row["steps"] = f"{at} / {from_step}"
        assert at - from_step <= (2 * EVERY if self.saving else EVERY)
        seen = self.row.get("saw")
        self.start()
        ended = self.ended()
        for rank, (status, output, errors) in enumerate(ended):
            assert status == 0, errors
            assert (f", going on from step {from_step}\n" in output) == (rank == 0 and from_step > 0), output
        self.row |= {"saw": seen} if seen else {}
        self.equals(undisturbed)
        self.row["equal"] = "yes"
        return ended

    def equals(self, undisturbed: "Run") -> None:
        """State, metrics, scores and checkpoints, and nothing else is left."""
        ours, theirs = (dict(arrays(run.workdir / "checkpoints" / "76")) for run in (self, undisturbed))
        assert {name.partition(".")[0] for name in theirs} >= {"params", "opt_state", "ema", "step"}
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
            assert ours[name].tobytes() == array.tobytes(), name
        assert self.saved == undisturbed.saved
        assert rows(self.workdir) == rows(undisturbed.workdir)
        assert (self.workdir / "results.json").read_text() == (undisturbed.workdir / "results.json").read_text()
        assert not [path for path in self.workdir.rglob("*") if "tmp" in path.name]

    def kill(self) -> None:
        """Ends what is left of the processes."""
        for process in self.processes:
            process.kill()
            process.communicate()


def arrays(checkpoint):
    """The arrays of a checkpoint by name, whatever they are and however they were divided."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    there = ocp.metadata(checkpoint, "state").metadata
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), there)
    for path, leaf in jax.tree_util.tree_leaves_with_path(ocp.load(checkpoint, like, checkpointable_name="state")):
        yield jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf)


def rows(workdir):
    """The metrics, apart from how fast they came."""
    speed = ("images_per_second", "images_per_second_per_device", "input_wait")
    return [{name: x for name, x in row.items() if name not in speed} for row in read_metrics(workdir)]


@pytest.fixture(scope="module")
def fields():
    """Of the config."""
    return FIELDS


@pytest.fixture(scope="module")
def undisturbed(request, fields, tmp_path_factory):
    """A run of the module's number of processes, PROCESSES, to which nothing happened."""
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", fields, request.module.PROCESSES)
    run.start()
    for status, _, errors in run.ended():
        assert status == 0, errors
    assert run.step == 76
    return run


@pytest.fixture
def run(request, fields, tmp_path):
    """A run to which something is about to happen, with its row of the table."""
    run = Run(tmp_path / "run", fields, request.module.PROCESSES)
    request.node.user_properties.append(("fault", run.row))
    yield run
    run.kill()


def pytest_terminal_summary(terminalreporter):
    """Prints the table."""
    reports = [report for some in terminalreporter.stats.values() for report in some]
    told = [
        (report, dict(report.user_properties)["fault"])
        for report in sorted(reports, key=lambda report: getattr(report, "location", ()))
        if isinstance(report, pytest.TestReport) and report.when == "call" and report.user_properties
    ]
    if not told:
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "orbax-checkpoint"))
    write = terminalreporter.write_line
    write(f"\n{jax.devices()[0].device_kind}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}\n")
    write("| fault | exit status and last line | last step / goes on from | same to the end, bit for bit | seconds |")
    write("|---|---|---|---|---|")
    for report, row in told:
        same = row.get("equal", "no") if report.passed else report.outcome
        cells = [row.get("fault", report.nodeid), row.get("saw", ""), row.get("steps", ""), same]
        write("| " + " | ".join([*cells, f"{report.duration:.0f}"]) + " |")
