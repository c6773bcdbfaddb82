r"""Compiles a config's train step for TPUs that need not be there: whether it fits, and what XLA expects of it.

    pip install -e '.[tpu]'  # libtpu, which is also the compiler, for any Linux machine
    python -m experiments.compile --config=configs/s4nd/imagenet_convnext_s4nd.py --topology=v5e:16x16 \
        [--slices=2] [--stage=1] [--out=FILE.json] [--config.FIELD=VALUE ...]

`--topology` is a slice of chips, of which there may be several (`--slices`); of a config with progressive resizing all
stages are compiled, or the one of that number, from 1. No data is read. It prints the memory of a device that the step
takes, XLA's estimate of its time, the collectives, and what lies where, and for a batch that does not fit the largest
that does, found by compiling a few. `--out` gets the same as JSON. The exit status is 1 if something does not fit.

Only memory and collectives are facts of the compiled program. Its time is an estimate by the compiler's cost model,
which knows nothing of the input pipeline, of waiting for other devices, and of how long collectives take.
"""

import bisect
import importlib.metadata
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from etils import epath
from flax import nnx
from jax.sharding import SingleDeviceSharding
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.command import config_flag, fail, parse
from experiments.config import Config, ConfigError, write_file
from experiments.experiment import Experiment, build
from experiments.problem import is_detector
from ssm_jax import compiled
from ssm_jax.chips import chip
from ssm_jax.layers.stack import Stack
from ssm_jax.ops.backend import traced_for
from ssm_jax.topologies import tpu_devices
from ssm_jax.training.sharding import sharding_table

NOTE = "XLA's compile-time estimates, not measurements"

_GIB = 2**30
_TRIES = 8
"""Programs compiled at most in search of the largest batch that fits."""


class OutOfMemoryError(Exception):
    """A program does not fit a device."""

    def __init__(self, message: str):
        super().__init__(message)
        numbers = re.findall(r"(\d+(?:\.\d+)?)([KMGT])\b", message)
        sizes = [float(number) * 2 ** (10 * ("KMGT".index(unit) + 1)) for number, unit in numbers]
        self.needed, self.usable = (round(size) for size in sizes[:2])
        """Bytes that it takes, and that there are."""


def compile_for(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles. Raises OutOfMemoryError for what does not fit."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(str(error)) from error


def usable_memory(device: jax.Device) -> int:
    """Bytes of a device that programs may take, which is what the compiler says of one that takes too much."""
    too_much = jax.ShapeDtypeStruct((2**36,), jnp.float32)
    try:
        compile_for(jax.jit(jnp.negative, in_shardings=SingleDeviceSharding(device)).lower(too_much))
    except OutOfMemoryError as error:
        return error.usable
    raise RuntimeError(f"256 GiB fit {device.device_kind}.")


class Trial(NamedTuple):
    """A train step that was compiled, or was not because it does not fit."""

    experiment: Experiment
    program: jax.stages.Compiled | None
    needed: int
    """Bytes on each device."""
    seconds: float
    """That compilation took."""


def attempt(config: Config, devices: Sequence[jax.Device], stage: int, limit: int) -> Trial:
    """Compiles the step of a stage, from 0, for devices of which programs may take `limit` bytes."""
    experiment = build(config, files=False, devices=devices)
    start = time.perf_counter()
    state, batch = experiment.abstract_state, experiment.abstract_batch
    with jax.set_mesh(experiment.mesh):
        lowered = experiment.train_step(experiment.stages[stage]).lower(state, batch)
    try:
        program = compile_for(lowered)
        # Close to the limit, which what compiles keeps to, this sum is up to 2 % over it.
        needed = min(compiled.memory(program).total, limit)
    except OutOfMemoryError as error:
        program, needed = None, error.needed
        if "temporaries" in str(error):  # which are without arguments
            needed += _bytes_on_device((state, batch))
        needed = max(needed, limit + 1)
    return Trial(experiment, program, needed, time.perf_counter() - start)


def _bytes_on_device(arrays: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def batch_sizes(config: Config, devices: int) -> list[int]:
    """Those up to the config's that its devices, accumulation and mixing allow, in order; of many, the round ones.

    Where rows are mixed, devices hold whole groups or share one: else XLA gives all of them the whole batch.
    """
    parts, augment = devices * config.accumulate, config.augment
    step = 2 ** max(0, math.floor(math.log2(config.batch_size / parts)) - 6)  # of 64 to 127

    def mixes(rows: int) -> bool:
        return not (augment.mixup or augment.cutmix) or not (augment.mix_group % rows and rows % augment.mix_group)

    return [parts * rows for rows in range(step, config.batch_size // parts + 1, step) if mixes(rows)]


def largest(sizes: Sequence[int], needed: Callable[[int], float], limit: float, known: dict[int, float]) -> int | None:
    """The largest of `sizes`, in order, that needs at most `limit`; None if even the smallest needs more.

    What they need grows with them, almost on a line: `known` is two points or more of it, which the calls of `needed`
    are added to. Of these there are few, so that the last of `sizes` may be a little less than the best.
    """
    low, high, slow = -1, len(sizes), 0
    for size, need in known.items():
        if need > limit:
            high = min(high, bisect.bisect_left(sizes, size))
    for _ in range(_TRIES):
        width = high - low
        if width <= 1:
            break
        (x0, y0), (x1, y1) = sorted(sorted(known.items(), key=lambda point: abs(point[1] - limit))[:2])
        guess = x0 + (limit - y0) * (x1 - x0) / (y1 - y0) if y1 > y0 else 0
        index = min(max(bisect.bisect_right(sizes, guess) - 1, low + 1), high - 1)
        if slow > 1:  # close to the limit, the compiler makes programs smaller than the line says
            index = (low + high) // 2
        known[sizes[index]] = needed(sizes[index])
        if known[sizes[index]] <= limit:
            low = index
        else:
            high = index
        slow += high - low > width / 2
    return sizes[low] if low >= 0 else None


def examine(
    config: Config, devices: Sequence[jax.Device], stage: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """What there is to report of a stage, from 0, for JSON: in bytes and seconds, of one device where not said.

    `say` hears what is going on. Raises ConfigError for a config that cannot work on these devices.
    """
    limit = usable_memory(devices[0])
    say(f"compiling the step of batch {config.batch_size:,}")
    trial = attempt(config, devices, stage, limit)
    experiment, device = trial.experiment, chip(devices[0].device_kind)
    assert device is not None, "there are no slices of other chips"
    at = experiment.stages[stage]
    found: dict[str, Any] = {
        "model": config.model.name,
        "data": config.data.name,
        "resolution": at.resolution,
        "size": experiment.problem.size(at.resolution),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "dtype": config.dtype,
        "mesh": dict(experiment.mesh.shape),
        "device": device.name,
        "fits": trial.program is not None,
        "needed": trial.needed,
        "state": _bytes_on_device(experiment.abstract_state),
        "usable": limit,
        "memory": device.memory,
        "compile_seconds": trial.seconds,
    }
    if trial.program is None:
        return found | _largest_batch(trial, devices, stage, limit, say)
    hlo, memory = trial.program.as_text() or "", compiled.memory(trial.program)
    cost: Any = trial.program.cost_analysis()
    seconds = compiled.scheduled_cycles(hlo) / device.clock
    ideal = experiment.ideal_seconds(at)
    exchanged = compiled.collectives(hlo)
    bounds = {"traffic": cost["bytes accessed"] / device.bandwidth}
    of_network: dict[str, float] = {}
    if ideal is not None:
        products = ideal * config.batch_size
        bounds = {"products": products, **bounds}
        of_network = {"model_flops": products * device.flops * len(devices), "mfu": products / seconds}  # of a step
    if len({getattr(d, "slice_index", None) for d in devices}) == 1:
        bounds["collectives"] = sum(c.sent for c in exchanged) / device.interconnect
    return found | {
        "parts": memory._asdict(),
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "seconds": seconds,
        "open_loops": compiled.open_loops(hlo),
        "bounds": bounds,
        **of_network,
        "collectives": _by_kind(exchanged),
        "placements": sharding_table(experiment.abstract_state),
    }


def _by_kind(exchanged: Sequence[compiled.Collective]) -> list[dict[str, Any]]:
    """Collectives of a kind in one row, with where the largest of them comes from."""
    rows = []
    for kind in dict.fromkeys(c.kind for c in exchanged):
        these = [c for c in exchanged if c.kind == kind]
        total = Counter[str]()
        for c in these:
            total.update(count=c.count, bytes=c.count * c.bytes, sent=c.sent)  # type: ignore[call-overload]
        rows.append({"kind": kind, **total, "largest": max(these, key=lambda c: c.count * c.bytes).op_name})
    return rows


def _largest_batch(
    trial: Trial, devices: Sequence[jax.Device], stage: int, limit: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """The largest batch that fits, and what may make the whole one fit."""
    experiment = trial.experiment
    config = experiment.config
    say(f"batch {config.batch_size:,} does not fit: {_gib(trial.needed)} of {_gib(limit)}")

    def needed(batch: int) -> float:
        other = config.copy_and_resolve_references()
        with other.unlocked():
            other.batch_size = batch
        tried = attempt(other, devices, stage, limit)
        verdict = "fits" if tried.program is not None else "does not fit"
        say(f"batch {batch:,} {verdict}: {_gib(tried.needed)}")
        return tried.needed

    state = _bytes_on_device(experiment.abstract_state)
    known = {0: float(state), config.batch_size: float(trial.needed)}
    sizes = batch_sizes(config, len(devices))
    best = largest(sizes, needed, limit, known)
    refused = min(batch for batch, need in known.items() if need > limit)
    return {"largest_batch": best, "refused_batch": refused, "remedies": _remedies(experiment, best, state)}


def _remedies(experiment: Experiment, best: int | None, state: int) -> list[str]:
    """Fields of the config that make a step take less."""
    config, mesh = experiment.config, experiment.mesh
    remedies = []
    if best is not None:
        parts = [
            accumulate
            for accumulate in range(config.accumulate + 1, config.batch_size // mesh.size + 1)
            if config.batch_size % (accumulate * mesh.size) == 0
            and config.batch_size / accumulate <= best / config.accumulate
        ]
        remedies += [f"--config.accumulate={parts[0]}"] if parts else []
    if config.dtype == "float32":
        remedies.append("--config.dtype=bfloat16")
    stacks = [module for _, module in nnx.iter_modules(experiment.abstract_model) if isinstance(module, Stack)]
    network = "model.backbone" if is_detector(config) else "model"
    if stacks and config.model.get("backbone", config.model).get("remat", "none") == "none":
        remedies.append(f"--config.{network}.remat=nothing_saveable")
    if mesh.shape["fsdp"] == 1 and mesh.size > 1:
        remedies.append(f"--config.mesh.fsdp={min(mesh.size, 8)}, for the large ones of {state / 1e6:,.0f} MB of state")
    return remedies


def _gib(count: float) -> str:
    return f"{count / _GIB:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def print_report(console: Console, found: dict[str, Any]) -> None:
    """Prints what `examine` found."""
    devices = math.prod(found["mesh"].values())
    console.print(
        f"\n[bold]{found['model']}[/] on {found['data']} at {found['size']}, "
        f"{found['dtype']}, batch {found['batch_size']:,} on {devices} x {found['device']}"
        + (f" in {found['accumulate']} parts" if found["accumulate"] > 1 else "")
        + f" [dim](compiled in {found['compile_seconds']:.0f} s)[/]"
    )
    of = f"of the {_gib(found['usable'])} that programs have of a device's {_gib(found['memory'])}"
    if not found["fits"]:
        console.print(f"[bold red]does not fit[/]: about {_gib(found['needed'])} {of}")
        best = found["largest_batch"]
        if best is None:
            console.print(f"no batch fits, not even {found['refused_batch']:,}")
        else:
            console.print(f"largest batch that fits: [bold]{best:,}[/]; {found['refused_batch']:,} does not")
        if found["remedies"]:
            console.print("what may make it fit: " + "; ".join(found["remedies"]))
        return
    console.print(f"[bold green]fits[/]: {_gib(found['needed'])} {of}")
    parts, flops = found["parts"], found.get("model_flops")
    notes = ["estimated", "without collectives"]
    notes += [f"{found['open_loops']} loops of unknown length once"] if found["open_loops"] else []
    notes += [f"MFU {found['mfu']:.1%}"] if flops else []
    table = Table(box=box.SIMPLE_HEAD, show_header=False, title="a step on each device")
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    rows = [
        ("arguments", f"{parts['arguments'] / 1e6:,.1f} MB", "state and batch"),
        ("results", f"{parts['results'] / 1e6:,.1f} MB", f"{parts['donated'] / 1e6:,.1f} MB in donated arguments"),
        ("temporary", f"{parts['temporary'] / 1e6:,.1f} MB", ""),
        ("program", f"{parts['code'] / 1e6:,.1f} MB", ""),
        ("operations", f"{found['flops'] / 1e9:,.1f} GFLOP", "XLA's count, with loops once"),
        ("traffic", f"{found['bytes_accessed'] / 1e9:,.2f} GB", "likewise, of all operations"),
        *(
            [("network", f"{flops / devices / 1e9:,.1f} GFLOP", f"3 x forward; {flops / 1e12:,.2f} TFLOP in all")]
            if flops
            else []
        ),
        ("time", _ms(found["seconds"]), ", ".join(notes)),
        *((f"  {name} alone", _ms(seconds), "at the device's peak") for name, seconds in found["bounds"].items()),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, title="collectives of a step, on each device")
    for column in ("kind", "number", "MB", "MB sent, at least", "the largest is of"):
        table.add_column(column, justify="left" if column in ("kind", "the largest is of") else "right")
    for row in found["collectives"]:
        sizes = (f"{row[name] / 1e6:,.2f}" for name in ("bytes", "sent"))
        table.add_row(row["kind"], f"{row['count']:g}", *sizes, row["largest"])
    console.print(table)
    console.print(found["placements"], highlight=False)
    console.print(f"times are {NOTE}", style="dim")


def run(config: Config, topology: str, *, slices: int = 1, stage: int | None = None) -> list[dict[str, Any]]:
    """Compiles and prints one stage, or all, and returns what was found. Raises ConfigError for mistakes."""
    try:
        devices = tpu_devices(topology, slices)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(str(error)) from error
    console = Console(width=120)
    with traced_for("tpu"):
        count = len(build(config, files=False, devices=devices).stages)
        if stage is not None and not 1 <= stage <= count:
            raise ConfigError(f"--stage must be from 1 to {count}, the stages of this config, got {stage}.")
        numbers = range(count) if stage is None else [stage - 1]
        found = []
        for number in numbers:
            result = examine(config, devices, number, lambda text: console.print(text, style="dim"))
            print_report(console, result)
            found.append({"stage": number + 1, **result})
    return found


def main() -> None:
    """The command."""
    topology = flags.DEFINE_string("topology", None, "Slice to compile for, such as v5e:16x16.", required=True)
    slices = flags.DEFINE_integer("slices", 1, "Number of such slices.")
    stage = flags.DEFINE_integer("stage", None, "Which stage of training, from 1; default: all.")
    out = flags.DEFINE_string("out", None, "File for what was found, as JSON.")
    flags.mark_flag_as_required("config")

    def command(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: options are written --NAME=VALUE.", status=2)
        try:
            found = run(config_flag.value, topology.value, slices=slices.value, stage=stage.value)
        except ConfigError as error:
            fail(str(error), status=2)
        if out.value:
            versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
            setting = {"note": NOTE, "topology": topology.value, "slices": slices.value, **versions}
            write_file(epath.Path(out.value), json.dumps({**setting, "stages": found}, indent=1) + "\n")
        sys.exit(0 if all(result["fits"] for result in found) else 1)

    app.run(command, flags_parser=parse)


if __name__ == "__main__":
    main()
