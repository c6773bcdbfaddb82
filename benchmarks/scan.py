r"""What the methods of `selective_scan` cost: the table behind `ssm_jax.ops.scan.choose`.

    python -m benchmarks.scan [--chunks=4,8,16,32] [--rounds=7]
    python -m benchmarks.scan --tpu

Times forward, and forward and backward, with respect to all inputs, in turns, on one core of a CPU or on the
accelerator that JAX finds. With `--tpu` nothing runs: XLA compiles both passes for a chip, as in
`benchmarks.tpu_aot`, and its estimates are printed. Everything is float32, or what `--dtype` says of activations.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import DTYPE, ROUNDS, Passes, jax_passes, medians, pin, surroundings
from benchmarks.tpu_aot import NOTE, TOPOLOGY, Estimate, chip, estimate
from ssm_jax.ops import selective_scan
from ssm_jax.ops.scan import CHUNK, choose

SHAPES = ((64, 4, 192, 16), (32, 12, 192, 16), (16, 50, 192, 16), (8, 196, 192, 16), (2, 1024, 128, 16))
TPU_SHAPES = ((64, 12, 384, 16), (64, 50, 384, 16), (64, 196, 384, 16), (8, 2048, 768, 16))
"""Batch, length, d, n."""

_TPU = flags.DEFINE_bool("tpu", False, "Estimate for a TPU instead of measuring.")
_CHUNKS = flags.DEFINE_list("chunks", [str(CHUNK)], "Sizes of chunks.")
_DISCRETIZATION = flags.DEFINE_enum("discretization", "euler", ["euler", "zoh"], "That of the scan.")


def contestants(chunks: list[int], discretization: str) -> dict[str, Callable[..., jax.Array]]:
    """From u, delta, A, B, C, D to outputs."""
    methods = {"associative": {"method": "associative"}, "sequential": {"method": "sequential"}}
    methods |= {f"chunked, {chunk}": {"method": "chunked", "chunk": chunk} for chunk in chunks}

    def outputs(*inputs: jax.Array, **options: str | int) -> jax.Array:
        return selective_scan(*inputs, discretization=discretization, **options)[1]

    return {name: functools.partial(outputs, **options) for name, options in methods.items()}


def arguments(shape: tuple[int, int, int, int], dtype: str) -> tuple[jax.Array, ...]:
    """u, delta, A, B, C, D as they are in Mamba at the start of training."""
    batch, length, d, n = shape
    keys = jax.random.split(jax.random.key(0), 4)
    u, delta, B, C = (
        jax.random.normal(key, (batch, length, size), dtype) for key, size in zip(keys, (d, d, n, n), strict=True)
    )
    A = -jnp.broadcast_to(jnp.arange(1.0, n + 1), (d, n))
    return u, jax.nn.softplus(delta - 4), A, B, C, jnp.ones(d)


def measure(shape: tuple[int, int, int, int], console: Console) -> None:
    """Prints a table."""
    inputs = arguments(shape, DTYPE.value or "float32")
    passes: dict[str, Passes] = {}
    compilation = {}
    for name, f in contestants([*map(int, _CHUNKS.value)], _DISCRETIZATION.value).items():
        start = time.perf_counter()
        passes[name] = jax_passes(f, *inputs)
        compilation[name] = time.perf_counter() - start
    forward = medians({name: each.forward for name, each in passes.items()}, rounds=ROUNDS.value)
    both = medians({name: each.backward for name, each in passes.items()}, rounds=ROUNDS.value)
    table = _table(shape, "forward, ms", "both, ms", "associative / this", "peak MB", "compilation of the two, s")
    for name, each in passes.items():
        ratio = both["associative"] / both[name]
        numbers = 1e3 * forward[name], 1e3 * both[name], ratio, each.peak_bytes() / 1e6, compilation[name]
        table.add_row(name, *(f"{number:.1f}" for number in numbers))
    table.caption = f"auto: {choose(shape[1])}"
    console.print(table)


def predict(shape: tuple[int, int, int, int], console: Console) -> None:
    """Prints a table."""
    sharding = chip()
    inputs = jax.eval_shape(functools.partial(arguments, shape, DTYPE.value or "float32"))
    estimates: dict[str, Estimate] = {}
    table = _table(shape, "both, ms", "associative / this", "temporary MB", "compilation, s")
    for name, f in contestants([*map(int, _CHUNKS.value)], _DISCRETIZATION.value).items():

        def both(inputs, cotangent, f=f):
            y, backward = jax.vjp(f, *inputs)
            return y, backward(cotangent)

        lowered = jax.jit(both, in_shardings=sharding, out_shardings=sharding).lower(inputs, inputs[0])
        start = time.perf_counter()
        numbers = estimates[name] = estimate(lowered.compile())
        seconds = time.perf_counter() - start
        ratio = estimates["associative"].milliseconds / numbers.milliseconds
        columns = numbers.milliseconds, ratio, numbers.temporary_megabytes, seconds
        table.add_row(name, *(f"{number:.2f}" for number in columns))
    table.caption = f"auto: {choose(shape[1], 'tpu')}"
    console.print(table)


def _table(shape: tuple[int, int, int, int], *columns: str) -> Table:
    table = Table(title=f"batch, length, d, n = {shape}")
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main(_: list[str]) -> None:
    """Prints the tables."""
    console = Console(width=120)
    if _TPU.value:
        chip()  # before JAX looks for devices
        console.print(TOPOLOGY, surroundings("libtpu"), NOTE)
    else:
        pin(1)
        console.print(surroundings("jaxlib"))
    for shape in TPU_SHAPES if _TPU.value else SHAPES:
        (predict if _TPU.value else measure)(shape, console)


if __name__ == "__main__":
    app.run(main)
