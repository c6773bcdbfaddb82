r"""What an S4ND layer costs: against the convolution that it replaces and against S4ND layers in PyTorch.

    python -m benchmarks.s4nd [--torch-s4=PATH] [--mode=dplr] [--shapes=CIFAR,ViT] [--keep-memory] [--rounds=7]

Times forward, and forward and backward with respect to parameters and input, kernel generation included, in float32,
on one core (`--cores`) or on the accelerator that JAX finds. With PyTorch installed, layers of the same parameters are
called in turns with ours, after a check that outputs agree: the authors' release if `--torch-s4` is a checkout of
https://github.com/state-spaces/s4 (with what its requirements.txt lists), and layers of benchmarks/torch_s4nd.py, one
of which computes as ours does. Writes s4nd_MODE.json and .png into `--out`.
"""

import importlib.util
import json
import warnings
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

from benchmarks.side_by_side import (
    CORES,
    OUT,
    ROUNDS,
    Passes,
    allocated,
    jax_passes,
    keep_memory,
    medians,
    pin,
    surroundings,
)
from ssm_jax import S4ND
from ssm_jax.pretrained import s4nd_from_torch

_TORCH_S4 = flags.DEFINE_string("torch-s4", None, "Checkout of the official repository.")
_MODE = flags.DEFINE_enum("mode", "diag", ["diag", "dplr"], "Kind of the kernels.")
_KEEP_MEMORY = flags.DEFINE_bool(
    "keep-memory", False, "Keep freed memory, so that new pages, of which the release takes most, cost nothing."
)


class Shape(NamedTuple):
    """One case: an input (batch, *lengths, d_model), and the depthwise convolution that S4ND replaces there."""

    batch: int
    lengths: tuple[int, ...]
    d_model: int
    depthwise: tuple[int, ...] | None
    blocks: int = 0  # how many ConvNeXt-T has


SHAPES = {
    "CIFAR": Shape(50, (32, 32), 256, (7, 7)),
    "ConvNeXt 1": Shape(8, (56, 56), 96, (7, 7), 3),
    "ConvNeXt 2": Shape(8, (28, 28), 192, (7, 7), 3),
    "ConvNeXt 3": Shape(8, (14, 14), 384, (7, 7), 9),
    "ConvNeXt 4": Shape(64, (7, 7), 768, (7, 7), 3),
    "ViT": Shape(16, (196,), 768, None),
    "video": Shape(1, (16, 56, 56), 96, (3, 7, 7)),
}
_SHAPES = flags.DEFINE_list("shapes", list(SHAPES), "Which of the shapes.")
_RESOLUTIONS = (14, 28, 56, 112)
_GROWTH = ((4, 48), (8, 96))  # batch and channels by which growth with resolution is measured
_SHARE_BATCH = 128  # by which the part of kernel generation in a training step is


def ours(layer: nnx.Module, u: jax.Array) -> Passes:
    """Of a layer of this library."""
    graph, params = nnx.split(layer)
    return jax_passes(lambda params, u: nnx.merge(graph, params)(u), params, u)


def kernels_alone(layer: S4ND, lengths: tuple[int, ...]) -> Passes:
    """Of the generation of a layer's kernels."""
    graph, params = nnx.split(layer)
    flat = lambda params: jnp.concatenate([k.ravel() for k in nnx.merge(graph, params).sample_kernels(lengths)])  # noqa: E731
    return jax_passes(flat, params)


def depthwise(shape: Shape, u: jax.Array) -> Passes:
    """Of the depthwise convolution, by XLA."""
    return ours(
        nnx.Conv(shape.d_model, shape.d_model, shape.depthwise, feature_group_count=shape.d_model, rngs=nnx.Rngs(0)),
        u,
    )


def torch_passes(module: Any, u: np.ndarray) -> Passes:
    """Of a PyTorch module on (batch, heads, *axes)."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    module = module.to(device)
    x = torch.tensor(np.ascontiguousarray(np.moveaxis(u, -1, 1)), device=device, requires_grad=True)

    def run(*, backward: bool) -> Any:
        with torch.set_grad_enabled(backward):
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            if backward:
                x.grad = None
                module.zero_grad()
                (y.square().sum() / 2).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return y.detach()

    both = lambda: run(backward=True)  # noqa: E731
    return Passes(lambda: run(backward=False), both, lambda: allocated(both, device))


def contestants(shape: Shape, mode: str, checkout: str | None) -> dict[str, Passes]:
    """By name, everything that is measured on one shape; all S4ND layers have the same parameters."""
    u = np.random.default_rng(0).normal(size=(shape.batch, *shape.lengths, shape.d_model)).astype(np.float32)
    dims = len(shape.lengths)
    layer = S4ND(shape.d_model, dims=dims, mode=mode, linear_output=True, rngs=nnx.Rngs(0))
    modules = {}
    if importlib.util.find_spec("torch"):
        import torch

        from benchmarks.torch_s4nd import PlainS4ND, SeparableS4ND, official_layer

        torch.set_num_threads(CORES.value)
        if checkout:
            options = {"d_model": shape.d_model, "dim": dims, "l_max": list(shape.lengths), "mode": mode}
            options |= {"d_state": 64, "init": "legs", "n_ssm": 1, "bidirectional": True, "linear": True}
            options |= {"transposed": True, "contract_version": 1}
            official = official_layer(checkout)(**options)
            with torch.no_grad():
                official(torch.zeros(1, shape.d_model, *shape.lengths))  # this rewrites C in mode dplr
            state = {name: value.detach().numpy() for name, value in official.state_dict().items()}
            layer = s4nd_from_torch(state, options)
            modules["PyTorch, release"] = official
        else:
            modules["PyTorch, plain"] = PlainS4ND(layer)
        modules["PyTorch, our algorithm"] = SeparableS4ND(layer)
        if shape.depthwise:
            conv = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
            modules["PyTorch, depthwise"] = conv(
                shape.d_model, shape.d_model, shape.depthwise, padding="same", groups=shape.d_model
            )
    passes = {"S4ND": ours(layer, jnp.asarray(u)), "kernels": kernels_alone(layer, shape.lengths)}
    if shape.depthwise:
        passes["XLA, depthwise"] = depthwise(shape, jnp.asarray(u))
    passes |= {name: torch_passes(module, u) for name, module in modules.items()}
    y = np.asarray(passes["S4ND"].forward())
    for name in modules:
        if name != "PyTorch, depthwise":
            theirs = np.moveaxis(passes[name].forward().cpu().numpy(), 1, -1)
            error = np.abs(theirs - y).max() / np.abs(y).max()
            if not error < 1e-4:
                raise ValueError(f"{name} is another function: outputs differ by {error:.1e} of the largest.")
    return passes


def measure(shape: Shape, mode: str, checkout: str | None) -> dict[str, dict[str, float]]:
    """Seconds and bytes by contestant."""
    passes = contestants(shape, mode, checkout)
    return {
        "forward": medians({name: p.forward for name, p in passes.items()}, rounds=ROUNDS.value),
        "backward": medians({name: p.backward for name, p in passes.items()}, rounds=ROUNDS.value),
        "bytes": {name: p.peak_bytes() for name, p in passes.items()},
    }


class Block(nnx.Module):
    """A ConvNeXt block whose convolution is S4ND."""

    def __init__(self, mixer: S4ND, *, rngs: nnx.Rngs):
        d_model = mixer.d_model
        self.mixer = mixer
        self.norm = nnx.LayerNorm(d_model, epsilon=1e-6, rngs=rngs)
        self.expand = nnx.Linear(d_model, 4 * d_model, rngs=rngs)
        self.contract = nnx.Linear(4 * d_model, d_model, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((1, 1, 1, d_model), 1e-6))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the block."""
        return x + self.gamma[...] * self.contract(nnx.gelu(self.expand(self.norm(self.mixer(x))), approximate=False))


def kernel_share(mode: str) -> float:
    """Part of the time of a training step of all ConvNeXt-T blocks that goes into generating kernels."""
    rounds = min(2, ROUNDS.value)  # at this batch size a block takes seconds on one core
    total = dict.fromkeys(("blocks", "kernels"), 0.0)
    for shape in (shape for shape in SHAPES.values() if shape.blocks):
        layer = S4ND(shape.d_model, mode=mode, linear_output=True, rngs=nnx.Rngs(0))
        u = jax.random.normal(jax.random.key(0), (_SHARE_BATCH, *shape.lengths, shape.d_model))
        block = ours(Block(layer, rngs=nnx.Rngs(1)), u)
        kernels = kernels_alone(layer, shape.lengths)
        functions = {"blocks": block.backward, "kernels": kernels.backward}
        for name, seconds in medians(functions, rounds=rounds).items():
            total[name] += shape.blocks * seconds
    return total["kernels"] / total["blocks"]


def growth(mode: str, batch: int, d_model: int) -> tuple[dict[str, float], float]:
    """Seconds of forward and backward by resolution, and the slope of their logarithms over that of the pixel count."""
    functions = {}
    for size in _RESOLUTIONS:
        layer = S4ND(d_model, mode=mode, linear_output=True, rngs=nnx.Rngs(0))
        functions[str(size)] = ours(layer, jax.random.normal(jax.random.key(0), (batch, size, size, d_model))).backward
    seconds = medians(functions, rounds=ROUNDS.value)
    pixels = 2 * np.log([float(size) for size in seconds])
    return seconds, float(np.polyfit(pixels, np.log(list(seconds.values())), 1)[0])


def geometric_mean(ratios: list[float]) -> float:
    """Of positive numbers."""
    return float(np.exp(np.mean(np.log(ratios))))


def others(results: dict[str, Any]) -> list[str]:
    """Everything that is compared with our layer."""
    names = dict.fromkeys(name for result in results.values() for name in result["backward"])
    return [name for name in names if name not in ("S4ND", "kernels")]


def tables(results: dict[str, Any], mode: str) -> list[Table]:
    """Time and memory, a row for each shape: ours, and the others' as multiples of it."""
    time = Table(title=f"S4ND ({mode}): ms forward and backward (forward), others as multiples of it")
    memory = Table(title=f"S4ND ({mode}): MB forward and backward, others as multiples of it")
    for view, columns in [(time, ["shape", "ms", "kernels alone"]), (memory, ["shape", "MB", "kernels alone"])]:
        for column in [*columns, *others(results)]:
            view.add_column(column, justify="right")
    for name, result in results.items():
        forward, backward, size = result["forward"], result["backward"], result["bytes"]
        ms = [f"{1e3 * backward[part]:.1f} ({1e3 * forward[part]:.1f})" for part in ("S4ND", "kernels")]
        ratios = {other: (backward[other] / backward["S4ND"], forward[other] / forward["S4ND"]) for other in backward}
        row = ["{:.2f} ({:.2f})".format(*ratios[other]) if other in ratios else "-" for other in others(results)]
        time.add_row(name, *ms, *row)
        row = [f"{size[other] / size['S4ND']:.2f}" if other in size else "-" for other in others(results)]
        memory.add_row(name, *(f"{size[part] / 1e6:.0f}" for part in ("S4ND", "kernels")), *row)
    return [time, memory]


def picture(results: dict[str, Any], mode: str, device: str) -> Figure:
    """The table's ratios as bars."""
    names = others(results)
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for position, other in enumerate(names):
        ratios = [result["backward"].get(other, np.nan) / result["backward"]["S4ND"] for result in results.values()]
        where = np.arange(len(results)) + (position - (len(names) - 1) / 2) * 0.8 / len(names)
        axes.bar(where, np.array(ratios) - 1, 0.8 / len(names), bottom=1, label=other)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(results)), list(results))
    axes.set(ylabel="time as a multiple of ssm_jax's", title=f"forward and backward, S4ND ({mode}), {device}")
    axes.legend(frameon=False, ncols=len(names))
    return figure


def main(_: list[str]) -> None:
    """Measures, prints and saves."""
    unknown = set(_SHAPES.value) - set(SHAPES)
    if unknown:
        raise app.UsageError(f"--shapes must be of {', '.join(SHAPES)}; got {', '.join(unknown)}.")
    has_torch = importlib.util.find_spec("torch") is not None
    if _TORCH_S4.value and not has_torch:
        raise app.UsageError("--torch-s4 needs PyTorch: pip install torch.")
    pin(CORES.value)
    if _KEEP_MEMORY.value:
        keep_memory()
    warnings.filterwarnings("ignore", module="src")  # of the release
    mode, console = _MODE.value, Console(width=160)
    where = surroundings("jaxlib", *["torch"] * has_torch) | {"keep_memory": str(_KEEP_MEMORY.value)}
    console.print(where if has_torch else f"{where}; PyTorch is not installed: comparing with XLA only")
    results = {}
    for name in _SHAPES.value:
        results[name] = measure(SHAPES[name], mode, _TORCH_S4.value)
        console.print(f"{name}: {1e3 * results[name]['backward']['S4ND']:.1f} ms")
    console.print(*tables(results, mode))
    means = {
        other: geometric_mean([r["backward"][other] / r["backward"]["S4ND"] for r in results.values()])
        for other in others(results)
        if all(other in result["backward"] for result in results.values())
    }
    grown = {f"batch {batch}, {d_model} channels": growth(mode, batch, d_model) for batch, d_model in _GROWTH}
    share = kernel_share(mode)
    for other, mean in means.items():
        console.print(f"geometric mean of {other}: {mean:.2f} times")
    for name, (_, slope) in grown.items():
        console.print(f"time grows as pixels^{slope:.2f} from {_RESOLUTIONS[0]} to {_RESOLUTIONS[-1]} squared, {name}")
    console.print(
        f"kernel generation: {100 * share:.1f} % of a training step of ConvNeXt-T's blocks, batch {_SHARE_BATCH}"
    )
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    record = {"where": where, "mode": mode, "shapes": results, "geometric_mean": means, "kernel_share": share}
    record["growth"] = {name: {"seconds": seconds, "slope": slope} for name, (seconds, slope) in grown.items()}
    (out / f"s4nd_{mode}.json").write_text(json.dumps(record, indent=1) + "\n")
    picture(results, mode, where["device"]).savefig(out / f"s4nd_{mode}.png", dpi=120)
    console.print(f"results in {out}")


if __name__ == "__main__":
    app.run(main)
