"""Measuring functions against each other on a machine that does other things too: in turns, and as ratios."""

import ctypes
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed calls of each function.", lower_bound=1)
OUT = flags.DEFINE_string("out", "runs/benchmarks", "Directory that the results go into.")


class Passes(NamedTuple):
    """A forward pass, a forward and backward pass, ready to be called, and what memory the latter takes."""

    forward: Callable[[], Any]
    backward: Callable[[], Any]
    peak_bytes: Callable[[], int]


def jax_passes(f: Callable[..., jax.Array], *arguments: Any) -> Passes:
    """Of f(*arguments), compiled; the loss is half the sum of squares, which needs the output."""
    forward = jax.jit(f).lower(*arguments).compile()
    gradients = jax.grad(lambda *arguments: jnp.sum(f(*arguments) ** 2) / 2, argnums=tuple(range(len(arguments))))
    backward = jax.jit(gradients).lower(*arguments).compile()
    memory = backward.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return Passes(lambda: forward(*arguments), lambda: backward(*arguments), lambda: peak)


def pin(cores: int) -> None:
    """Keeps this process on its first `cores` cores, with all threads that it starts from now on: call it first."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def keep_memory() -> None:
    """Has the C library (glibc) keep what is freed, which else the system takes back and hands out page by page."""
    library = ctypes.CDLL("libc.so.6")
    most, trim = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    if not (library.mallopt(most, 0) and library.mallopt(trim, -1)):
        raise OSError("mallopt refused; --keep-memory needs glibc.")


def medians(functions: Mapping[str, Callable[[], Any]], *, rounds: int, longest: float = 20.0) -> dict[str, float]:
    """Median seconds of each function, called in turns after one call that is not counted.

    Processor seconds on CPUs, where another program may have the core for a while, and elapsed ones elsewhere; what a
    function returns is waited for. Slow ones drop out of the later rounds: after `longest` seconds in all.
    """
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            if len(times[name]) < 2 or sum(times[name]) < longest:
                _settle()
                start = clock()
                jax.block_until_ready(function())
                times[name].append(clock() - start)
    return {name: float(np.median(seconds[1:])) for name, seconds in times.items()}


def _settle() -> None:
    """Waits for what the last function left to do to others' cost: XLA frees large arrays later, in other threads."""
    before = -1.0
    while time.process_time() - before > 0.002:
        before = time.process_time()
        time.sleep(0.05)  # on a busy machine those threads may wait for a core


def surroundings(*packages: str) -> dict[str, str]:
    """What a measurement must be quoted with: device, cores in use, versions of Python, jax and `packages`."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
        name = model[1] if model else platform.processor() or "CPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    versions = {package: version(package) for package in ("jax", *packages)}
    return {"device": name, "cores": str(cores), "python": platform.python_version(), **versions}
