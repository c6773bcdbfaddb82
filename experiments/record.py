"""run.json: what a run is, in numbers, and when, where and with what it was started."""

import contextlib
import datetime
import importlib.metadata
import json
import logging
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from flax import nnx

import ssm_jax
from experiments import page
from experiments.config import write_file
from experiments.experiment import Experiment
from ssm_jax.training.loop import Stopped
from ssm_jax.training.optimizer import group_sizes
from ssm_jax.training.sharding import sharding_table

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")


@contextlib.contextmanager
def recorded(experiment: Experiment, workdir: epath.Path) -> Iterator[None]:
    """Notes in run.json the start of a run and how it ended, and then writes report.html; on the first process."""
    if jax.process_index() != 0:
        yield
        return
    path = workdir / "run.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    start = environment() | {"start": _now()}

    def write() -> None:
        write_file(path, json.dumps(facts(experiment) | {"starts": [*starts, start]}, indent=2) + "\n")

    write()
    try:
        yield
    except BaseException as error:
        start |= {"end": _now(), "outcome": _outcome(error)}
        try:
            write()
            page.write(workdir)
        except OSError as unwritten:  # what happened to the run is more important
            logging.warning("run.json and report.html are not up to date: %s", unwritten)
        except Exception:
            logging.exception("report.html could not be written")
        raise
    start |= {"end": _now(), "outcome": "finished"}
    write()
    page.write(workdir)


def _outcome(error: BaseException) -> str:
    if isinstance(error, Stopped):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"{type(error).__name__}: {error}"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def facts(experiment: Experiment) -> dict[str, Any]:
    """What does not change from start to start, unless the data or the devices do."""
    dataset = experiment.dataset
    params = nnx.state(experiment.abstract_model, nnx.Param)
    return {
        "dataset": {
            "title": dataset.title,
            "classes": dataset.num_classes,
            **{split: len(source) for split, source in dataset.splits.items()},
        },
        "resolution": experiment.resolution,
        "size": experiment.problem.size(experiment.resolution),
        "total_steps": experiment.total_steps,
        "steps_per_epoch": experiment.steps_per_epoch,
        "best_by": experiment.best_by,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "groups": group_sizes(experiment.groups, params),
        "sharding": sharding_table(experiment.abstract_state),
    }


def environment() -> dict[str, Any]:
    """Versions, devices, commit and command line."""
    versions = {"python": platform.python_version(), "ssm_jax": ssm_jax.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(sys.orig_argv),
        "commit": _commit(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "platform": platform.platform(),
        "versions": versions,
    }


def _commit() -> str | None:
    """Of the checkout that this file is in, `-dirty` if it was changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
