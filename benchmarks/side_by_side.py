"""Measuring functions against each other on a machine that does other things too: in turns, and as ratios."""

import ctypes
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console

CORES = flags.DEFINE_integer("cores", 1, "Cores to use of a CPU.", lower_bound=1)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32"], "Dtype of the activations; by default the benchmark's own."
)
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
    """Median of the `times` of each function."""
    all_times = times(functions, rounds=rounds, longest=longest)
    return {name: float(np.median(seconds)) for name, seconds in all_times.items()}


def times(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int, longest: float = 20.0, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function, called in turns after one turn that is not counted; what it returns is waited for.

    Slow ones drop out of the later rounds: after `longest` seconds in all. Each turn is the mean of `calls`, of which
    only the last one is waited for, as in training, so that the time that Python takes to start them is hidden.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            if len(seconds[name]) < 2 or calls * sum(seconds[name]) < longest:
                _settle()
                start = now()
                for _ in range(calls - 1):
                    function()
                jax.block_until_ready(function())
                seconds[name].append((now() - start) / calls)
    return {name: counted for name, (_, *counted) in seconds.items()}


def now() -> float:
    """Processor seconds on CPUs, where another program may have the core for a while, and elapsed ones elsewhere."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def _settle() -> None:
    """Waits for what the last function left to do to others' cost: XLA frees large arrays later, in other threads."""
    before = -1.0
    while time.process_time() - before > 0.002:
        before = time.process_time()
        time.sleep(0.05)  # on a busy machine those threads may wait for a core


def allocated(function: Callable[[], Any], device: str) -> int:
    """The most bytes that PyTorch has allocated at any time in `function`, beyond those that it had before."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(profile_memory=True) as profile:
            function()
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return int(np.cumsum([size for _, size in changes]).max())


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


def save(name: str, record: Mapping[str, Any], console: Console) -> None:
    """Writes a record into `--out`."""
    file = Path(OUT.value) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"results in {file}")
