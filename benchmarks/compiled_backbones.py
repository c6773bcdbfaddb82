r"""What a training step of the networks compiles to; nothing is run.

    python -m benchmarks.compiled_backbones [--models=convnext_tiny,deit_small,swin_tiny,resnet101] [--rounds=1]
    pip install -e '.[tpu]'
    python -m benchmarks.compiled_backbones --target=tpu [--dtype=float32]

The step is that of benchmarks/backbones.py: forward and backward pass with the gradients of all parameters. The first
command prints how long it takes to trace and to compile it for this machine, on one core (`--cores`), with blocks one
by one and with equal blocks as loops (`scan`). The second compiles it for one TPU v5e chip, which takes minutes for a
network, and prints XLA's estimates of time and of traffic. Writes compiled_backbones.json, or
tpu_backbones_DTYPE.json, into `--out`.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from benchmarks.backbones import (
    BATCH,
    IMAGE_SIZE,
    MODELS,
    REMATERIALISE,
    SCAN,
    build,
    check_names,
    compile_step,
    functions,
)
from benchmarks.side_by_side import CORES, DTYPE, ROUNDS, pin, save, surroundings
from benchmarks.tpu_aot import CHIP, NOTE, TOPOLOGY, Estimate, chip, estimate
from ssm_jax.ops.backend import traced_for

TARGET = flags.DEFINE_enum("target", "here", ["here", "tpu"], "What to compile for: this machine, or one TPU chip.")


def training_step(name: str, batch: int, dtype: str, *, scan: bool) -> tuple[Callable[..., Any], list[Any]]:
    """A network's step, and its arguments without values."""
    graph, *state = nnx.split(nnx.eval_shape(lambda: build(name, dtype, scan=scan)), nnx.Param, ...)
    images = jax.ShapeDtypeStruct((batch, IMAGE_SIZE.value, IMAGE_SIZE.value, 3), jnp.float32)
    return functions(graph)[1], [*state, images]


def compile_here(name: str, batch: int, dtype: str, *, scan: bool) -> tuple[float, float, float]:
    """Seconds to trace and to compile a step, and the MB that it takes beside arguments and results."""
    step, arguments = training_step(name, batch, dtype, scan=scan)
    _, compilation = compile_step(step, *arguments)
    return compilation.tracing, compilation.compiling, compilation.temporary_bytes / 1e6


def here(console: Console) -> None:
    """Compiles for this machine, prints and saves."""
    pin(CORES.value)
    dtype, batch = DTYPE.value or "float32", BATCH.value or 4
    where = surroundings("jaxlib", "flax") | {"dtype": dtype, "batch": str(batch), "remat": REMATERIALISE.value}
    console.print(where)
    table = Table(title="a step: s to trace it + s to compile it, and temporary MB")
    for column in ["network", "one by one", "loops", "loops : one by one", "MB", "MB, loops"]:
        table.add_column(column, justify="left" if column == "network" else "right")
    results: dict[str, dict[str, list[Any]]] = {}
    for name in MODELS.value:
        each: dict[str, list[Any]] = {"one by one": [], "loops": []}
        for _ in range(ROUNDS.value):
            for way, rounds in each.items():
                rounds.append(compile_here(name, batch, dtype, scan=way == "loops"))
        results[name] = each
        unrolled, looped = (np.median(rounds, axis=0) for rounds in each.values())
        row = [f"{way[0]:.1f} + {way[1]:.1f}" for way in (unrolled, looped)]
        row.append(f"{looped[:2].sum() / unrolled[:2].sum():.2f}")
        table.add_row(name, *row, *(f"{way[2]:.0f}" for way in (unrolled, looped)))
        console.print(name, *row)
    console.print(table)
    save("compiled_backbones", {"where": where, "networks": results}, console)


def on_tpu(name: str, batch: int, dtype: str, sharding: SingleDeviceSharding) -> Estimate:
    """Of a step on one chip."""
    with traced_for("tpu"):
        step, arguments = training_step(name, batch, dtype, scan=SCAN.value)
        lowered = jax.jit(step, in_shardings=sharding, out_shardings=sharding).lower(*arguments)
    return estimate(lowered.compile())


def shares(numbers: Estimate) -> tuple[float, float]:
    """Parts of the estimated time that the counted products, and the counted traffic, would take at full speed."""
    seconds = numbers.milliseconds / 1e3
    return numbers.gigaflops * 1e9 / CHIP.flops / seconds, numbers.gigabytes * 1e9 / CHIP.bandwidth / seconds


ESTIMATED = ("ms", "GB accessed", "GFLOP", "temporary MB", "products", "traffic")
"""Columns of a table of estimates."""


def cells(numbers: Estimate) -> list[str]:
    """A row of them."""
    return [*(f"{n:.1f}" for n in numbers), *(f"{100 * share:.0f} %" for share in shares(numbers))]


def record(numbers: Estimate) -> dict[str, float]:
    """What is saved of an estimate."""
    products, traffic = shares(numbers)
    return numbers._asdict() | {"products": products, "traffic": traffic}


def one_chip(console: Console) -> tuple[SingleDeviceSharding, dict[str, str], int, str]:
    """A chip to compile for, what its estimates must be quoted with, batch and dtype. Exits without libtpu."""
    try:
        sharding = chip()
    except ModuleNotFoundError as error:
        sys.exit(str(error))
    dtype, batch = DTYPE.value or "bfloat16", BATCH.value or 64
    where = surroundings("flax", "libtpu") | {"device": TOPOLOGY, "dtype": dtype, "batch": str(batch), "note": NOTE}
    where |= {"scan": str(SCAN.value), "remat": REMATERIALISE.value}
    console.print(where)
    return sharding, where, batch, dtype


def there(console: Console) -> None:
    """Compiles for one chip, prints and saves."""
    sharding, where, batch, dtype = one_chip(console)
    table = Table(title=f"a step of {batch} images: {NOTE}")
    for column in ["network", *ESTIMATED]:
        table.add_column(column, justify="left" if column == "network" else "right")
    results = {}
    for name in MODELS.value:
        numbers = on_tpu(name, batch, dtype, sharding)
        results[name] = record(numbers)
        table.add_row(name, *cells(numbers))
        console.print(name, *cells(numbers))
    console.print(table)
    save(f"tpu_backbones_{dtype}", {"where": where, "networks": results}, console)


def main(_: list[str]) -> None:
    """Does what `--target` says."""
    check_names()
    console = Console(width=160)
    if TARGET.value == "tpu":
        there(console)
    else:
        here(console)


if __name__ == "__main__":
    app.run(main)
