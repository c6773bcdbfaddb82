r"""Training on a CPU with and without huge pages of memory, which GLIBC_TUNABLES=glibc.malloc.hugetlb=1 asks for.

    python -m benchmarks.huge_pages [--cores=1] [--rounds=7]

XLA allocates the large arrays of a step anew each time, and the system hands such memory out page by page. With
transparent huge pages (/sys/kernel/mm/transparent_hugepage/enabled: always or madvise) that is 2 MiB at a time and not
4 KiB. As the C library reads the variable only when a process starts, each number is of a process of its own, in turns.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

import ssm_jax
from benchmarks.side_by_side import CORES, ROUNDS, Passes, jax_passes, medians, pin, save, surroundings

ONE = flags.DEFINE_string("one", None, "Measure only this network, as the process is, and print its seconds.")

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SETTING = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
NETWORKS = {
    "S4ND-ISO, 32 x 32": ("isotropic_s4nd", 32, {"d_model": 32, "n_layers": 4}),
    "Conv2D-ISO, 32 x 32": ("isotropic_conv2d", 32, {"d_model": 96, "n_layers": 4}),
    "S4ND-ConvNeXt-M, 64 x 64": (
        "convnext_micro_s4nd",
        64,
        {"img_size": 64, "depths": (1, 1, 2, 1), "dims": (32, 64, 128, 256)},
    ),
    "ResNet-56-S6LA, 32 x 32": ("resnet_cifar_s6la", 32, {"depth": 56}),
}
"""Name, resolution and arguments."""

BATCH = 50


def passes(name: str) -> Passes:
    """Of a network, with its gradients."""
    network, size, arguments = NETWORKS[name]
    model = ssm_jax.create_model(network, num_classes=10, rngs=nnx.Rngs(0), **arguments)
    model = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.random.normal(jax.random.key(1), (BATCH, size, size, 3))
    return jax_passes(lambda params: nnx.merge(graphdef, params, rest)(images), params)


def measure_one(name: str) -> None:
    """Prints seconds of a pass with gradients."""
    of = passes(name)
    print(f"seconds={medians({'step': of.backward}, rounds=3)['step']}")


def measured(name: str, *, huge: bool) -> float:
    """Seconds, of a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in SETTING}
    command = [sys.executable, "-m", "benchmarks.huge_pages", f"--one={name}", f"--cores={CORES.value}"]
    done = subprocess.run(command, env=environment | (SETTING if huge else {}), capture_output=True, text=True)
    if not (found := re.search(r"seconds=(\S+)", done.stdout)):
        raise RuntimeError(f"{name}: {done.stderr}")
    return float(found[1])


def main(argv: list[str]) -> None:
    """Prints the table, and writes huge_pages.json."""
    del argv
    pin(CORES.value)
    jax.config.update("jax_platforms", "cpu")
    if ONE.value:
        measure_one(ONE.value)
        return
    if not PAGES.exists():
        raise app.UsageError(f"this system has no transparent huge pages: there is no {PAGES}.")
    pages = re.findall(r"\[(\w+)\]", PAGES.read_text())[0]  # always, madvise or never
    table = Table(box=box.SIMPLE_HEAD, title=f"ms of a pass with gradients of {BATCH} images")
    for column in ("network", "small pages", "huge pages", "ratio"):
        table.add_column(column, justify="left" if column == "network" else "right")
    record = {}
    for name in NETWORKS:
        turns = [(measured(name, huge=False), measured(name, huge=True)) for _ in range(ROUNDS.value)]
        small, huge = (float(np.median(seconds)) for seconds in zip(*turns, strict=True))
        record[name] = {"small": small, "huge": huge}
        table.add_row(name, f"{1e3 * small:.0f}", f"{1e3 * huge:.0f}", f"{small / huge:.2f}")
    found = surroundings() | {"pages": pages}
    table.caption = ", ".join(f"{key} {value}" for key, value in found.items())
    console = Console()
    console.print(table)
    save("huge_pages", {"where": found, "seconds": record}, console)


if __name__ == "__main__":
    app.run(main)
