r"""What a training step of the networks costs: against timm's in PyTorch, and with S4ND against without.

    pip install torch timm
    python -m benchmarks.backbones [--models=resnet50,swin_tiny] [--batch=4] [--dtype=bfloat16] [--cores=1]

Times the forward pass, and forward and backward with the gradients of all parameters, in training: with batch
statistics and without stochastic depth; on one core (`--cores`) or on the accelerator that JAX finds. Networks of timm
are called in turns with ours, after a check that logits and gradients agree: both have the same weights. PyTorch runs
eagerly, its images `channels_last`, in bfloat16 by autocast, as ours keeps float32 parameters. Networks that timm does
not have are compared with what they are variants of. Then single operations, by XLA and by PyTorch, tell where a ratio
comes from. Writes backbones_DTYPE.json into `--out`.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks import operations
from benchmarks.operations import synchronize, torch_device
from benchmarks.side_by_side import CORES, DTYPE, ROUNDS, Passes, allocated, now, pin, save, surroundings, times
from ssm_jax import create_model
from ssm_jax.layers.stack import REMAT
from ssm_jax.pretrained import load_torch


class Network(NamedTuple):
    """One of ours, and what it is compared with."""

    timm: str | None = None
    """The same network's name in timm."""
    baseline: str | None = None
    """Else one of ours that it is a variant of."""
    sized: bool = True
    """Whether it is made for images of one size."""
    options: Mapping[str, Any] = {}
    """Of our constructor and timm's."""


NETWORKS = {
    "convnext_tiny": Network(timm="convnext_tiny", sized=False),
    "resnet50": Network(timm="resnet50", sized=False),
    "deit_small": Network(timm="deit_small_patch16_224"),
    "swin_tiny": Network(timm="swin_tiny_patch4_window7_224"),
    "convnext_tiny_s4nd": Network(baseline="convnext_tiny"),
    "vit_base_s4nd": Network(baseline="vit_base"),
    "vit_base": Network(),
    "resnet101": Network(timm="resnet101", sized=False),
}

AGGREGATED = {
    "resnet50": ("se", "eca", "cbam", "rla", "mrla_base", "mrla_light", "s6la"),
    "deit_small": ("se", "eca", "mrla_base", "mrla_light", "s6la"),
}
"""Networks that exist with modules for the aggregation of layers, or attention to channels, and those modules."""

NETWORKS |= {
    f"{name}_{module}": NETWORKS[name]._replace(timm=None, baseline=name)
    for name, modules in AGGREGATED.items()
    for module in modules
}

MODELS = flags.DEFINE_list(
    "models", "convnext_tiny,resnet50,deit_small,swin_tiny,convnext_tiny_s4nd,vit_base_s4nd", "Which networks."
)
BATCH = flags.DEFINE_integer("batch", None, "Images at a time; by default 4 on CPUs and 64 elsewhere.", lower_bound=1)
IMAGE_SIZE = flags.DEFINE_integer("image-size", 224, "Height and width of the images.", lower_bound=1)
SCAN = flags.DEFINE_bool("scan", False, "Run equal blocks of ours as loops.")
REMATERIALISE = flags.DEFINE_enum("remat", "none", list(REMAT), "What the backward pass of ours keeps of a block.")
_TF32 = flags.DEFINE_bool("tf32", False, "Let both compute float32's products in TensorFloat-32, on GPUs that can.")


def build(name: str, dtype: str, *, scan: bool) -> nnx.Module:
    """One of our networks, to be trained."""
    network = NETWORKS[name]
    size = {"img_size": IMAGE_SIZE.value} if network.sized else {}
    options = {"num_classes": 1000, **size, **network.options}
    model = create_model(name, dtype=dtype, rngs=nnx.Rngs(0), **options)
    return nnx.view(model, scan=scan, remat=REMATERIALISE.value)


def functions(graph: nnx.GraphDef) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two functions of (parameters, statistics, images): logits; and half their squares' sum, with its gradients.

    Both also return the new statistics, which PyTorch computes too.
    """

    def forward(params: nnx.State, rest: nnx.State, images: jax.Array) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(graph, params, rest, copy=True)
        return model(images), nnx.state(model, nnx.BatchStat)

    def loss(params: nnx.State, rest: nnx.State, images: jax.Array) -> tuple[jax.Array, nnx.State]:
        logits, statistics = forward(params, rest, images)
        return jnp.sum(jnp.square(logits.astype(jnp.float32))) / 2, statistics

    return forward, jax.value_and_grad(loss, has_aux=True)


class Compilation(NamedTuple):
    """What it takes to get a program that can run, and what it then allots beside arguments and results."""

    tracing: float
    compiling: float
    """Seconds, both."""
    temporary_bytes: int


def compile_step(f: Callable[..., Any], *arguments: Any) -> tuple[jax.stages.Compiled, Compilation]:
    """Compiles f for arguments, of which only shapes matter, and uses nothing that JAX kept of earlier programs."""
    jax.clear_caches()
    start = now()
    lowered = jax.jit(f).lower(*arguments)
    traced = now()
    compiled = lowered.compile()
    done = now()
    return compiled, Compilation(traced - start, done - traced, compiled.memory_analysis().temp_size_in_bytes)


def ours(model: nnx.Module, images: jax.Array) -> tuple[Passes, Compilation]:
    """A network's passes, and the compilation of the step."""
    graph, *state = nnx.split(model, nnx.Param, ...)
    forward, backward = functions(graph)
    step, compilation = compile_step(backward, *state, images)
    logits = jax.jit(forward).lower(*state, images).compile()
    peak = compilation.temporary_bytes + step.memory_analysis().output_size_in_bytes
    return Passes(lambda: logits(*state, images), lambda: step(*state, images), lambda: peak), compilation


def torch_module(network: Network) -> tuple[Any, dict[str, np.ndarray]]:
    """A network of timm's and its weights, which are drawn so that no branch of a block is closed, as some start."""
    import timm
    import torch

    size = {"img_size": IMAGE_SIZE.value} if network.sized else {}
    options = {"num_classes": 1000, "drop_path_rate": 0.0, **size, **network.options}
    module = timm.create_model(network.timm, **options).train()
    rng = np.random.default_rng(0)
    state = {name: value.numpy().copy() for name, value in module.state_dict().items()}
    for name, value in state.items():
        if value.ndim == 1 and not name.endswith(("running_mean", "running_var")):
            value += rng.normal(scale=0.2, size=value.shape)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return module, state


def torch_passes(module: Any, images: np.ndarray, dtype: str) -> Passes:
    """Of timm's network."""
    import torch

    device = torch_device()
    module = module.to(device, memory_format=torch.channels_last)
    x = torch.tensor(images, device=device).movedim(-1, 1)  # channels_last, that is
    autocast = functools.partial(torch.autocast, device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    def forward() -> tuple[Any]:
        with torch.no_grad(), autocast():
            logits = module(x)
        synchronize(device)
        return (logits,)

    def backward() -> tuple[Any, list[Any]]:
        with autocast():
            logits = module(x)
        loss = logits.float().square().sum() / 2
        loss.backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        module.zero_grad(set_to_none=True)  # so that the next step allocates them
        synchronize(device)
        return loss.detach(), gradients

    return Passes(forward, backward, lambda: allocated(backward, device))


def disagreement(name: str, passes: Passes, theirs: Passes) -> tuple[float, float]:
    """How much two networks differ: logits, relative to the largest, and the norm of all gradients.

    Raises ValueError if it is more than rounding explains.
    """
    logits = np.asarray(passes.forward()[0])
    error = float(np.abs(theirs.forward()[0].cpu().numpy() - logits).max() / np.abs(logits).max())
    norm = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(passes.backward()[1])) ** 0.5
    their_norm = sum(float(g.square().sum()) for g in theirs.backward()[1]) ** 0.5
    of_gradients = abs(their_norm / norm - 1)
    if not (error < 1e-4 and of_gradients < 1e-3):
        raise ValueError(
            f"timm's {name} is another function: logits differ by {error:.1e} of the largest, the gradients' norms by "
            f"{of_gradients:.1e}."
        )
    return error, of_gradients


def measure(name: str, batch: int, dtype: str, *, has_torch: bool) -> dict[str, Any]:
    """Seconds of each call, bytes, and seconds until the first step is done or can be, by contestant: ours first."""
    network = NETWORKS[name]
    images = np.random.default_rng(1).normal(size=(batch, IMAGE_SIZE.value, IMAGE_SIZE.value, 3)).astype(np.float32)
    x = jnp.asarray(images)
    result: dict[str, Any] = {"batch": batch}
    passes: dict[str, Passes] = {}
    first: dict[str, float] = {}

    def add(contestant: str, model: nnx.Module) -> None:
        passes[contestant], compilation = ours(model, x)
        first[contestant] = compilation.tracing + compilation.compiling

    model = build(name, dtype, scan=SCAN.value)
    if network.timm and has_torch:
        module, state = torch_module(network)
        load_torch(model, state)
        add("ssm_jax", model)
        exact = passes["ssm_jax"]
        if dtype != "float32" or _TF32.value:
            model = build(name, "float32", scan=SCAN.value)
            load_torch(model, state)
            with jax.default_matmul_precision("highest"):
                exact, _ = ours(model, x)
        allow_tf32(False)
        result["disagreement"] = disagreement(name, exact, torch_passes(module, images, "float32"))
        allow_tf32(_TF32.value)
        passes["PyTorch"] = torch_passes(module, images, dtype)
        start = now()
        passes["PyTorch"].backward()
        first["PyTorch"] = now() - start
    else:
        add("ssm_jax", model)
        if network.baseline:
            add(network.baseline, build(network.baseline, dtype, scan=SCAN.value))
    result["bytes"] = {contestant: each.peak_bytes() for contestant, each in passes.items()}
    return result | {"first": first} | seconds(passes)


def seconds(passes: Mapping[str, Passes]) -> dict[str, dict[str, list[float]]]:
    """Of each call, by pass and contestant."""
    return {
        part: times({name: getattr(each, part) for name, each in passes.items()}, rounds=ROUNDS.value, longest=60.0)
        for part in ("forward", "backward")
    }


def allow_tf32(allowed: bool) -> None:
    """Whether PyTorch may compute in TensorFloat-32; JAX is told by its precision of matrix products."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def ratio(ours: list[float], others: list[float]) -> str:
    """Of the medians, and the extremes of the rounds' ratios."""
    rounds = [mine / other for mine, other in zip(ours, others, strict=False)]  # slow ones have fewer
    return f"{np.median(ours) / np.median(others):.2f} ({min(rounds):.2f}-{max(rounds):.2f})"


def compared(result: Mapping[str, Any]) -> list[str]:
    """Cells: ms of the first contestant's step and forward pass, and their ratios to the last one's."""
    parts = result["backward"], result["forward"]
    all_times = [list(part.values()) for part in parts]
    ms = [f"{1e3 * np.median(first):.1f}" for first, *_ in all_times]
    return [*ms, *(ratio(each[0], each[1]) if len(each) > 1 else "-" for each in all_times)]


def table_of_networks(results: Mapping[str, Any]) -> Table:
    """A row for each network."""
    table = Table(title="training: ssm_jax, and its time as a multiple of the other's (extremes over the rounds)")
    for column in [
        "network",
        "other",
        "step, ms",
        "forward, ms",
        "step",
        "forward",
        "images/s",
        "peak MB",
        "first step, s",
    ]:
        table.add_column(column, justify="left" if column in ("network", "other") else "right")
    for name, result in results.items():
        other = [contestant for contestant in result["bytes"] if contestant != "ssm_jax"]
        rate = result["batch"] / np.median(result["backward"]["ssm_jax"])
        sizes = " : ".join(f"{size / 1e6:.0f}" for size in result["bytes"].values())
        first = " : ".join(f"{time:.1f}" for time in result["first"].values())
        table.add_row(name, *other or ["-"], *compared(result), f"{rate:.2f}", sizes, first)
    return table


def table_of_operations(results: Mapping[str, Any]) -> Table:
    """A row for each operation."""
    table = Table(title="single operations in float32: XLA, and its time as a multiple of PyTorch's")
    for column in ["operation", "forward and backward, ms", "forward, ms", "forward and backward", "forward"]:
        table.add_column(column, justify="left" if column == "operation" else "right")
    for name, result in results.items():
        table.add_row(name, *compared(result))
    return table


def prepare_torch() -> bool:
    """Settings of PyTorch; whether it and timm are there and run on what JAX does."""
    packages = ("torch", "timm")
    if jax.default_backend() not in ("cpu", "gpu") or not all(map(importlib.util.find_spec, packages)):
        return False
    import torch

    if torch_device() == "cuda" and not torch.cuda.is_available():
        raise app.UsageError("JAX runs on a GPU and PyTorch cannot: install PyTorch for CUDA.")
    torch.set_num_threads(CORES.value)
    torch.backends.cudnn.benchmark = True
    allow_tf32(_TF32.value)
    return True


def batch_size() -> int:
    """That of `--batch`, or the default for the device."""
    return BATCH.value or (4 if jax.default_backend() == "cpu" else 64)


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Products of float32 in float32, unless `--tf32` allows less: JAX's default on GPUs is TensorFloat-32."""
    return jax.default_matmul_precision("highest" if dtype == "float32" and not _TF32.value else "default")


def setting(dtype: str) -> dict[str, str]:
    """The flags that a measurement must be quoted with."""
    return {"dtype": dtype, "tf32": str(_TF32.value), "scan": str(SCAN.value), "remat": REMATERIALISE.value}


def main(_: list[str]) -> None:
    """Measures, prints and saves."""
    check_names()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of a GPU's memory
    pin(CORES.value)
    has_torch = prepare_torch()
    dtype, console = DTYPE.value or "float32", Console(width=160)
    where = surroundings("jaxlib", "flax", *["torch", "timm"] * has_torch) | setting(dtype)
    console.print(where if has_torch else f"{where}; no PyTorch with timm for this device: only our networks")
    batch = batch_size()
    networks, parts = {}, {}
    with precision(dtype):  # PyTorch's default is TensorFloat-32 for convolutions only: one for both
        for name in MODELS.value:
            networks[name] = measure(name, batch, dtype, has_torch=has_torch)
            console.print(f"{name}: {1e3 * np.median(networks[name]['backward']['ssm_jax']):.0f} ms")
        if has_torch:
            for name, operation in operations.operations(batch).items():
                parts[name] = seconds(operations.contestants(operation))
    console.print(table_of_networks(networks), table_of_operations(parts))
    save(f"backbones_{dtype}", {"where": where, "networks": networks, "operations": parts}, console)


def check_names() -> None:
    """Raises UsageError for an unknown name among `--models`."""
    unknown = set(MODELS.value) - set(NETWORKS)
    if unknown:
        raise app.UsageError(f"--models must be of {', '.join(NETWORKS)}; got {', '.join(unknown)}.")


if __name__ == "__main__":
    app.run(main)
