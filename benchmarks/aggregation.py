r"""What it costs a network to aggregate its layers: every method over the plain network, and over each other.

    python -m benchmarks.aggregation [--models=resnet50,deit_small] [--aggregations=rla,s6la] [--batch=4] [--cores=1]
    pip install -e '.[tpu]'
    python -m benchmarks.aggregation --target=tpu [--dtype=float32]

The step is that of benchmarks/backbones.py: forward and backward pass in training, with batch statistics and the
gradients of all parameters; the forward pass, in training too, is also timed alone. On one core, or on the accelerator
that JAX finds, the plain network is called before and after each of the others, which is then compared with the mean of
these two: neighbours in time share what else the machine does, and all methods come after the same network. The plain
network takes a turn like any other, and how far its ratio is from 1 is what ratios are uncertain by. Memory is what the
compiled step allots to temporaries. The second command runs nothing: it prints XLA's estimates for one TPU v5e chip.
Writes aggregation_DTYPE.json and .png, or tpu_aggregation_DTYPE.json and .png, into `--out`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks import backbones
from benchmarks.backbones import IMAGE_SIZE, MODELS, SCAN, batch_size, build, ours, precision, setting
from benchmarks.compiled_backbones import ESTIMATED, TARGET, cells, on_tpu, one_chip, record
from benchmarks.side_by_side import CORES, DTYPE, OUT, ROUNDS, Passes, pin, save, surroundings, times
from benchmarks.tpu_aot import NOTE

PLAIN, OURS = "plain", "s6la"

LIMITS = {"resnet50": {"step": 1.25, "memory": 1.10}, "deit_small": {"step": 1.03, "memory": 1.10}}
"""What S6LA may cost, as multiples of the plain network."""
RIVALS = ("rla", "mrla_light")
"""What it has to be cheaper than."""

Relative = Mapping[str, Mapping[str, Sequence[float]]]
"""By method and kind of cost: multiples of the plain network's, one or one for each round."""

_AGGREGATIONS = flags.DEFINE_list("aggregations", None, "Which methods; by default all that a network is made with.")


class Bar(NamedTuple):
    """What S6LA costs, and whether that is what was wanted."""

    cost: str
    value: float
    wanted: str
    met: bool


def network(name: str, method: str) -> str:
    """Its name with a method."""
    return name if method == PLAIN else f"{name}_{method}"


def methods(name: str) -> list[str]:
    """Those to be compared, in a network."""
    chosen = _AGGREGATIONS.value
    return [PLAIN, *(method for method in backbones.AGGREGATED[name] if chosen is None or method in chosen)]


def stir(model: nnx.Module) -> None:
    """Adds noise to all parameters: many start with zeros, and on those a GPU takes less power, and so less time."""
    rng = np.random.default_rng(0)
    parameters = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: p + jnp.asarray(0.02 * rng.normal(size=p.shape), p.dtype), parameters))


def beside_plain(functions: Mapping[str, Callable[[], Any]]) -> dict[str, dict[str, list[float]]]:
    """Of each function: `seconds`, by round, and `ratios` to the mean of `PLAIN` just before and just after it."""
    turns = {}
    for name, function in functions.items():
        turns |= {f"before {name}": functions[PLAIN], name: function}
    turns["after all"] = functions[PLAIN]
    # On an accelerator a call only starts the work: enough of them that starting does not count.
    calls = 1 if jax.default_backend() == "cpu" else 10
    seconds = times(turns, rounds=ROUNDS.value, longest=math.inf, calls=calls)
    plain = np.array([seconds[turn] for turn in turns if turn not in functions])
    return {
        name: {"seconds": seconds[name], "ratios": list(seconds[name] / ((before + after) / 2))}
        for name, before, after in zip(functions, plain[:-1], plain[1:], strict=True)
    }


def measure(name: str, batch: int, dtype: str) -> dict[str, dict[str, Any]]:
    """What a network costs, by method."""
    size = IMAGE_SIZE.value
    images = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    # All of them are there at the same time. That takes little: parameters and programs, as temporaries come and go.
    passes: dict[str, Passes] = {}
    results: dict[str, dict[str, Any]] = {}
    for method in methods(name):
        model = build(network(name, method), dtype, scan=SCAN.value)
        stir(model)
        passes[method], compilation = ours(model, images)
        results[method] = {
            "parameters": sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))),
            **compilation._asdict(),
            "peak_bytes": passes[method].peak_bytes(),
        }
    for part, attribute in {"step": "backward", "forward": "forward"}.items():
        timed = beside_plain({method: getattr(each, attribute) for method, each in passes.items()})
        for method, numbers in timed.items():
            results[method][part] = numbers
    return results


def measured(results: Mapping[str, Mapping[str, Any]]) -> Relative:
    """Multiples of the plain network, of what `measure` returns."""

    def multiple(each: Mapping[str, Any], *fields: str) -> list[float]:
        return [_over(*(sum(result[field] for field in fields) for result in (each, results[PLAIN])))]

    return {
        method: {
            "step": each["step"]["ratios"],
            "forward": each["forward"]["ratios"],
            "memory": multiple(each, "temporary_bytes"),
            "compiling": multiple(each, "tracing", "compiling"),
        }
        for method, each in results.items()
    }


def estimated(results: Mapping[str, Mapping[str, float]]) -> Relative:
    """Multiples of the plain network, of XLA's estimates."""
    kinds = {"step": "milliseconds", "memory": "temporary_megabytes"}
    return {
        method: {kind: [_over(each[field], results[PLAIN][field])] for kind, field in kinds.items()}
        for method, each in results.items()
    }


def _over(cost: float, plain: float) -> float:
    return cost / plain if plain else math.nan  # a chip may have room for all temporaries of a small network


def bars(name: str, relative: Relative) -> list[Bar]:
    """What was wanted of S6LA in a network, as far as it was compared."""
    if OURS not in relative:
        return []
    medians = {method: {kind: float(np.median(each)) for kind, each in of.items()} for method, of in relative.items()}
    result = []
    for kind, limit in LIMITS[name].items():
        value = medians[OURS][kind]
        result.append(Bar(f"{kind}, of {PLAIN}'s", value, f"at most {limit:.2f}", value <= limit))
    for rival in RIVALS:
        if rival in medians:
            for kind in LIMITS[name]:
                value = _over(medians[OURS][kind], medians[rival][kind])
                result.append(Bar(f"{kind}, of {rival}'s", value, "less than 1", value < 1))
    return result


def spread(ratios: Sequence[float]) -> str:
    """The median, and the extremes if there are more."""
    median = f"{np.median(ratios):.2f}"
    return median if len(ratios) == 1 else f"{median} ({min(ratios):.2f}-{max(ratios):.2f})"


def table_of_measurements(name: str, results: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each method."""
    table = Table(title=f"{name}, training: multiples of the plain network's, with the extremes over the rounds")
    columns = ["method", "parameters, M", "step, ms", "step", "forward, ms", "forward", "temporary MB", "temporary"]
    for column in [*columns, "and results, MB", "trace + compile, s", "both"]:
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, of in measured(results).items():
        each = results[method]
        step, forward = (f"{1e3 * np.median(each[part]['seconds']):.1f}" for part in ("step", "forward"))
        table.add_row(
            method,
            f"{each['parameters'] / 1e6:.3f}",
            *(step, spread(of["step"])),
            *(forward, spread(of["forward"])),
            *(f"{each['temporary_bytes'] / 1e6:.0f}", spread(of["memory"])),
            f"{each['peak_bytes'] / 1e6:.0f}",
            *(f"{each['tracing']:.1f} + {each['compiling']:.1f}", spread(of["compiling"])),
        )
    return table


def picture(relative: Mapping[str, Relative], title: str) -> Figure:
    """Multiples of the plain networks' costs, with the extremes over the rounds, and what S6LA's should be."""
    figure = Figure(figsize=(10, 0.5 + 2.8 * len(relative)), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axes, (name, of) in zip(figure.subplots(len(relative), squeeze=False)[:, 0], relative.items(), strict=True):
        kinds = [kind for kind in ("step", "forward", "memory") if kind in of[PLAIN]]
        width = 0.8 / len(kinds)
        for i, kind in enumerate(kinds):
            low, middle, high = np.array([np.quantile(each[kind], [0, 0.5, 1]) for each in of.values()]).T
            x = np.arange(len(of)) + (i + 0.5) * width - 0.4
            axes.bar(x, middle - 1, 0.9 * width, bottom=1, yerr=(middle - low, high - middle), capsize=2, label=kind)
            if OURS in of and kind in LIMITS[name]:
                at, limit = x[list(of).index(OURS)], LIMITS[name][kind]
                label = None if i else "wanted"
                axes.hlines(limit, at - width / 2, at + width / 2, color="black", linestyle=":", label=label)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_xticks(range(len(of)), list(of))
        axes.set(ylabel="multiples of plain", title=name)
        axes.legend(frameon=False, fontsize=8, ncols=len(kinds) + 1)
    return figure


def check_flags() -> None:
    """Raises UsageError for an unknown name among `--models` or `--aggregations`."""
    known = {*sum(backbones.AGGREGATED.values(), ())}
    for flag, allowed in ((MODELS, {*backbones.AGGREGATED}), (_AGGREGATIONS, known)):
        unknown = {*(flag.value or ())} - allowed
        if unknown:
            raise app.UsageError(
                f"--{flag.name} must be of {', '.join(sorted(allowed))}; got {', '.join(sorted(unknown))}."
            )


def here(console: Console) -> tuple[str, dict[str, Any], dict[str, Relative]]:
    """Measures on this machine: a name for the files, what goes into them, and ratios by network."""
    pin(CORES.value)
    dtype, batch = DTYPE.value or "float32", batch_size()
    where = surroundings("jaxlib", "flax") | setting(dtype) | {"batch": str(batch)}
    console.print(where)
    results = {}
    with precision(dtype):
        for name in MODELS.value:
            results[name] = measure(name, batch, dtype)
            console.print(table_of_measurements(name, results[name]))
    relative = {name: measured(each) for name, each in results.items()}
    return f"aggregation_{dtype}", {"where": where, "networks": results}, relative


def there(console: Console) -> tuple[str, dict[str, Any], dict[str, Relative]]:
    """Compiles for one TPU chip; the rest as in `here`."""
    sharding, where, batch, dtype = one_chip(console)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in MODELS.value:
        table = Table(title=f"{name}, a step of {batch} images: {NOTE}")
        for column in ["method", *ESTIMATED, "ms : plain", "MB : plain"]:
            table.add_column(column, justify="left" if column == "method" else "right")
        results[name] = {}
        for method in methods(name):
            numbers = on_tpu(network(name, method), batch, dtype, sharding)
            results[name][method] = record(numbers)
            of = estimated(results[name])[method]
            row = [method, *cells(numbers), spread(of["step"]), spread(of["memory"])]
            table.add_row(*row)
            console.print(name, *row)
        console.print(table)
    relative = {name: estimated(each) for name, each in results.items()}
    return f"tpu_aggregation_{dtype}", {"where": where, "networks": results}, relative


def main(_: list[str]) -> None:
    """Does what `--target` says, and saves it."""
    check_flags()
    console = Console(width=180)
    file, results, relative = (there if TARGET.value == "tpu" else here)(console)
    verdicts = {name: bars(name, of) for name, of in relative.items()}
    for name, each in verdicts.items():
        for bar in each:
            met = "met" if bar.met else "not met"
            console.print(f"{name}, S6LA's {bar.cost}: {bar.value:.3f}, {bar.wanted} is wanted: {met}")
    save(file, results | {"bars": {name: [bar._asdict() for bar in each] for name, each in verdicts.items()}}, console)
    where = results["where"]
    title = f"what aggregation costs a training step, {where['device']}, {where['dtype']}, {where['batch']} images"
    title += f"\n{where['note']}" if "note" in where else ""
    picture(relative, title).savefig(Path(OUT.value) / f"{file}.png", dpi=120)


if __name__ == "__main__":
    flags.set_default(MODELS, list(backbones.AGGREGATED))
    app.run(main)
