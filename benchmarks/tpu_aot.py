r"""What S4ND costs on a TPU, beside the depthwise convolution that it replaces: XLA's estimates, no TPU needed.

    pip install -e '.[tpu]'
    python -m benchmarks.tpu_aot [--dtype=float32] [--methods=auto,toeplitz,dft] [--cases=ViT,video]

Compiles the forward and backward pass of one layer for one TPU v5e chip: kernels computed from the parameters,
convolution, bias or term D u, gradients of the parameters and of the input, channels last. It prints how long the
compiled program takes by XLA's cost model, and writes it, with a picture, to `--out`. These are no measurements: read
the ratios, and choose between methods by them. In float32, S4ND's matrix products ask for float32's precision (several
passes of the matrix unit); the depthwise convolution has JAX's default. One program takes up to minutes to compile.
"""

import functools
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import DTYPE, OUT
from ssm_jax import S4ND
from ssm_jax.chips import TPUS
from ssm_jax.compiled import memory, scheduled_cycles
from ssm_jax.ops.backend import traced_for
from ssm_jax.ops.conv import METHODS
from ssm_jax.topologies import tpu_devices

CASES = {
    "CIFAR": (50, 32, 32, 256),
    "ConvNeXt 1": (64, 56, 56, 96),
    "ConvNeXt 2": (64, 28, 28, 192),
    "ConvNeXt 3": (64, 14, 14, 384),
    "ConvNeXt 4": (64, 7, 7, 768),
    "ViT": (64, 196, 768),
    "video": (4, 16, 56, 56, 96),
}
"""Shapes of the inputs, (batch, *axes, channels)."""

WINDOWS = {1: (196,), 2: (7, 7), 3: (3, 7, 7)}
"""Windows of the depthwise convolution by number of axes; among tokens it is one that reaches as far as S4ND."""

TOPOLOGY = "v5e:2x2"  # the smallest; one chip of it is used
CHIP = TPUS["v5e"]
NOTE = "XLA's compile-time estimates for one chip, not measurements"

_METHODS = flags.DEFINE_list("methods", "auto,toeplitz,dft", f"Ways to convolve, of {', '.join(METHODS)}.")
_CASES = flags.DEFINE_list("cases", ",".join(CASES), "Which layers.")


class Estimate(NamedTuple):
    """What XLA says of a compiled program."""

    milliseconds: float
    gigabytes: float
    """Read and written, by all operations."""
    gigaflops: float
    temporary_megabytes: float
    """In the chip's main memory."""


def chip() -> SingleDeviceSharding:
    """All of an array on a chip that need not exist. Raises ModuleNotFoundError without libtpu."""
    return SingleDeviceSharding(tpu_devices(TOPOLOGY)[0])


class Kernels(S4ND):
    """A layer that stops at its kernels, which are float32 whatever the dtype."""

    def __call__(self, u: jax.Array) -> list[jax.Array]:
        """Samples them for an input."""
        return self.sample_kernels(u.shape[1:-1])


def layer(method: str, dims: int, channels: int, dtype: DTypeLike) -> nnx.Module:
    """S4ND by a method of `ssm_jax.ops.conv`, its `kernels` alone, or the `depthwise` convolution; without values."""
    if method == "depthwise":
        build = functools.partial(nnx.Conv, channels, channels, WINDOWS[dims], feature_group_count=channels)
    elif method == "kernels":
        build = functools.partial(Kernels, channels, dims=dims, linear_output=True)
    else:
        build = functools.partial(S4ND, channels, dims=dims, linear_output=True, conv=method)
    return nnx.eval_shape(lambda: build(dtype=dtype, rngs=nnx.Rngs(0)))


def lower(
    module: nnx.Module, shape: tuple[int, ...], dtype: DTypeLike, sharding: SingleDeviceSharding
) -> jax.stages.Lowered:
    """The forward and backward pass of an abstract module, as a TPU runs it, to be compiled."""
    graphdef, parameters = nnx.split(module)

    def forward(parameters, u):
        return nnx.merge(graphdef, parameters)(u)

    def step(parameters, u, cotangent):
        y, backward = jax.vjp(forward, parameters, u)
        return y, backward(cotangent)

    u = jax.ShapeDtypeStruct(shape, dtype)
    with traced_for("tpu"):
        cotangent = jax.eval_shape(forward, parameters, u)
        return jax.jit(step, in_shardings=sharding, out_shardings=sharding).lower(parameters, u, cotangent)


def estimate(compiled: jax.stages.Compiled) -> Estimate:
    """Reads the numbers off a compiled program."""
    cost: Any = compiled.cost_analysis()
    return Estimate(
        1e3 * scheduled_cycles(compiled.as_text() or "") / CHIP.clock,
        cost["bytes accessed"] / 1e9,
        cost["flops"] / 1e9,
        memory(compiled).temporary / 1e6,
    )


def picture(estimates: Mapping[tuple[str, str], Estimate], title: str) -> Figure:
    """Bars of time by (case, method), relative to `depthwise`."""
    cases = list(dict.fromkeys(case for case, _ in estimates))
    methods = list(dict.fromkeys(method for _, method in estimates if method not in ("depthwise", "kernels")))
    figure = Figure(figsize=(max(7, 1.4 * len(cases)), 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        heights = [estimates[case, method].milliseconds / estimates[case, "depthwise"].milliseconds for case in cases]
        bars = axes.bar([x + (i + 0.5) * width - 0.4 for x in range(len(cases))], heights, 0.9 * width, label=method)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="black", linewidth=1, linestyle=":", label="depthwise convolution")
    axes.set_xticks(range(len(cases)), cases)
    axes.set(ylabel="estimated time, relative")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main(_: list[str]) -> None:
    """Compiles, prints the table and writes the files."""
    unknown = sorted(({*_METHODS.value} - {*METHODS}) | ({*_CASES.value} - {*CASES}))
    if unknown:
        raise app.UsageError(
            f"--methods must be of {', '.join(METHODS)}, --cases of {', '.join(CASES)}; got {', '.join(unknown)}."
        )
    try:
        sharding = chip()
    except ModuleNotFoundError as error:
        sys.exit(str(error))
    dtype = DTYPE.value or "bfloat16"
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    setting = {"topology": TOPOLOGY, "dtype": dtype, **versions}
    title = f"S4ND, forward and backward, {', '.join(f'{k} {v}' for k, v in setting.items())}\n{NOTE}"
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)

    console = Console()
    table = Table(title=title)
    for column in ["layer", "method", "ms", "relative to depthwise", "GB accessed", "GFLOP", "temporary MB"]:
        table.add_column(column, justify="left" if column in ("layer", "method") else "right")
    estimates: dict[tuple[str, str], Estimate] = {}
    programs: dict[str, Estimate] = {}  # `auto` is often one of the others
    for case in _CASES.value:
        shape, dims, channels = CASES[case], len(CASES[case]) - 2, CASES[case][-1]
        for method in ["depthwise", "kernels", *_METHODS.value]:
            lowered = lower(layer(method, dims, channels, dtype), shape, dtype, sharding)
            program = lowered.as_text()
            if program not in programs:
                programs[program] = estimate(lowered.compile())
            numbers = estimates[case, method] = programs[program]
            relative = numbers.milliseconds / estimates[case, "depthwise"].milliseconds
            console.print(f"{case}, {method}: {numbers.milliseconds:.2f} ms, {relative:.2f} of depthwise")
            table.add_row(case, method, f"{numbers[0]:.2f}", f"{relative:.2f}", *(f"{n:.1f}" for n in numbers[1:]))
    console.print(table)
    rows = [{"layer": case, "method": method, **n._asdict()} for (case, method), n in estimates.items()]
    file = out / f"tpu_aot_{dtype}"
    file.with_suffix(".json").write_text(json.dumps({"note": NOTE, **setting, "estimates": rows}, indent=1) + "\n")
    picture(estimates, title).savefig(file.with_suffix(".png"), dpi=120)
    console.print(f"results in {file}.json and .png")


if __name__ == "__main__":
    app.run(main)
