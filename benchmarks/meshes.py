r"""Whether every network trains alike on one device and on several, and what the devices exchange for it.

    python -m benchmarks.meshes
    python -m benchmarks.meshes --topology=v5e:8x8    # needs the extra `tpu`: compiles only

Takes one recipe of each kind, cut as with --config.smoke=True, and images and labels of noise. The first command trains
some steps on one CPU device, on 8 that share the batch, and on 2 x 4 of which each 4 share the parameters too, from
1 KiB on. The second compiles a step for 64 chips that need not exist, in both ways. Collectives that are not the sum of
gradients and batch statistics, the gathering of divided parameters, or the exchange of rows that mixup asks for are an
error. Writes meshes.json, or meshes_TOPOLOGY.json, into `--out`.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import OUT, surroundings
from experiments import smoke
from experiments.config import Config
from experiments.configs import recipes
from experiments.experiment import Experiment, build
from experiments.stages import Stage
from ssm_jax.compiled import Collective, collectives
from ssm_jax.layers import S4ND
from ssm_jax.ops.backend import traced_for
from ssm_jax.topologies import tpu_devices
from ssm_jax.training import sharding

KINDS = flags.DEFINE_list("kinds", "", "Recipes to take, as `python -m experiments.configs` names them; default: all.")
TOPOLOGY = flags.DEFINE_string("topology", "", "TPUs to compile for, such as v5e:8x8.")
STEPS = flags.DEFINE_integer("steps", 4, "Steps of training in each stage.", lower_bound=1)

MESHES = {"alone": (1, {"data": 1}), "data": (8, {"data": -1}), "fsdp": (8, {"data": -1, "fsdp": 4})}
"""Numbers of devices and how they are arranged."""

SMALL = 1 << 10
"""Bytes from which on parameters are divided here, as the cut networks have none of 1 MiB."""

SLACK = 1 << 14
"""Bytes of what is not counted: the loss, the other metrics, norms, and what is done with keys."""


def cut(config: Config, sizes: dict[str, int], devices: int) -> Config:
    """A small network's recipe for a batch that `devices` can share, on a mesh of these sizes."""
    config = smoke.cut(config, devices)
    with config.unlocked():
        config.smoke = False
        config.mesh = sizes
    return config


def batch_of_noise(experiment: Experiment, step: int) -> dict[str, np.ndarray]:
    """What a batch for training may be."""
    rng = np.random.default_rng(step)

    def values(name: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        if name == "image":
            return rng.integers(0, 256, like.shape, np.uint8)
        most = 2 if experiment.dataset.multi_label else experiment.dataset.num_classes
        return rng.integers(0, most, like.shape).astype(like.dtype)

    return {name: values(name, like) for name, like in experiment.abstract_batch.items()}


def train(experiment: Experiment, steps: int) -> tuple[list[float], tuple[Collective, ...]]:
    """Losses of some steps of each stage, and the collectives of all stages' programs."""
    losses, found = [], ()
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        for stage in experiment.stages:
            batches = (experiment.put(batch_of_noise(experiment, step)) for step in range(steps))
            step = experiment.train_step(stage).lower(state, experiment.abstract_batch).compile()
            found += collectives(step.as_text())
            for batch in batches:
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
    return losses, found


def unneeded(found: Iterable[Collective], experiment: Experiment, stages: Sequence[Stage] = ()) -> list[str]:
    """What is exchanged beyond need, by the programs of some stages or all, in words.

    Needed are, once for each part of the batch and stage: sums of gradients, which are those of S4ND's kernels in place
    of its parameters', and of batch statistics forward and backward; all-gathers of divided parameters, again in the
    backward pass and where the compiler would rather repeat them than keep what they give; and the rows whose mixup
    partners other devices have.
    """
    found = tuple(found)
    config, state = experiment.config, experiment.abstract_state
    times = config.accumulate * len(stages or experiment.stages)
    divided = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    largest = max((_bytes([x]) for x in divided), default=0)
    rows = -(-config.batch_size // config.accumulate // experiment.mesh.size)
    groups_span = config.augment.mix_group > rows and (config.augment.mixup or config.augment.cutmix)
    mixed = 4 * (math.prod(experiment.abstract_batch["image"].shape[1:]) + experiment.dataset.num_classes) * rows
    limits = {
        "sum": times
        * (
            _bytes(jax.tree.leaves(state.params))
            + _kernel_bytes(experiment)
            + 4 * _bytes(jax.tree.leaves(state.rest))
            + SLACK
        ),
        "all-gather": 4 * times * _bytes(divided),
        "collective-permute": 2 * times * mixed if groups_span else 0,
        "all-to-all": 0,
        "ragged-all-to-all": 0,
        "collective-broadcast": 0,
    }
    totals: dict[str, float] = defaultdict(float)
    for collective in found:
        kind = "sum" if collective.kind in ("all-reduce", "reduce-scatter") else collective.kind
        totals[kind] += collective.count * collective.bytes
    complaints = [
        f"{kind}: {totals[kind] / 1e6:.3f} MB, {limit / 1e6:.3f} MB would do"
        for kind, limit in limits.items()
        if not totals[kind] <= limit
    ]
    complaints += [
        f"all-gather of {c.bytes / 1e6:.3f} MB, more than any parameter, in {c.op_name}"
        for c in found
        if c.kind == "all-gather" and c.bytes > largest
    ]
    return complaints


def _kernel_bytes(experiment: Experiment) -> int:
    """Of all kernels of S4ND, in float32, were every axis as long as the images'."""
    layers = [module for _, module in nnx.iter_modules(experiment.abstract_model) if isinstance(module, S4ND)]
    # Of C (re and im, directions, rank, channels, d_model, modes), all but the first and the last.
    kernels = sum(math.prod(kernel.C.shape[1:-1]) for layer in layers for kernel in layer.kernels)
    return 4 * experiment.dataset.resolution * kernels


def _bytes(leaves: Sequence[Any]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def summed(found: Iterable[Collective]) -> dict[str, float]:
    """Bytes by kind."""
    totals: dict[str, float] = defaultdict(float)
    for collective in found:
        totals[collective.kind] += collective.count * collective.bytes
    return dict(totals)


def growing(found: Iterable[Collective], config: Config, sizes: dict[str, int], rows: int) -> list[str]:
    """Kinds of collectives that move more where the batch is twice as large, mixup's exchange left out, in words."""
    experiment = build(cut(config, sizes, 2 * rows), files=False, devices=jax.devices()[:8])
    more = ()
    with jax.set_mesh(experiment.mesh):
        for stage in experiment.stages:
            step = experiment.train_step(stage).lower(experiment.abstract_state, experiment.abstract_batch)
            more += collectives(step.compile().as_text())
    before, after = summed(found), summed(more)
    return [
        f"{kind} grows with the batch, from {before.get(kind, 0):,.0f} bytes to {after[kind]:,.0f}"
        for kind in after
        if kind != "collective-permute" and after[kind] > before.get(kind, 0) + SLACK
    ]


def compare(config: Config, steps: int, *, growth: bool = True) -> dict[str, dict[str, Any]]:
    """Losses, their distance from those of one device, collectives and complaints by mesh.

    With `growth` there are complaints about what grows with the batch, which takes twice as long.
    """
    results = {}
    for name, (count, sizes) in MESHES.items():
        experiment = build(cut(config, sizes, 8), files=False, devices=jax.devices()[:count])
        losses, found = train(experiment, steps)
        complaints = unneeded(found, experiment)
        if growth and count > 1:
            complaints += growing(found, config, sizes, 8)
        apart = float(np.max(np.abs(np.array(losses) / results.get("alone", {}).get("losses", losses) - 1)))
        results[name] = {"losses": losses, "apart": apart, "bytes": summed(found), "unneeded": complaints}
    return results


def compile_for(config: Config, devices: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Collectives and complaints by mesh, for TPUs."""
    results = {}
    for name, (_, sizes) in MESHES.items():
        if name == "alone":
            continue
        with traced_for("tpu"):
            experiment = build(cut(config, sizes, len(devices)), files=False, devices=devices)
            with jax.set_mesh(experiment.mesh):
                lowered = [
                    experiment.train_step(stage).lower(experiment.abstract_state, experiment.abstract_batch)
                    for stage in experiment.stages
                ]
        found = tuple(c for program in lowered for c in collectives(program.compile().as_text()))
        results[name] = {"bytes": summed(found), "unneeded": unneeded(found, experiment)}
    return results


def main(_: list[str]) -> None:
    """Goes through the kinds, prints the table and writes the file."""
    sharding._MIN_SHARDED_BYTES = SMALL
    configs = {recipe.name: recipe.config for recipe in recipes()}
    if absent := {*KINDS.value} - {*configs}:
        raise app.UsageError(f"--kinds must be of {', '.join(configs)}; got {', '.join(absent)}.")
    names = KINDS.value or list(smoke.kinds(configs))
    console = Console()
    if TOPOLOGY.value:
        devices = tpu_devices(TOPOLOGY.value)
        measure = lambda config: compile_for(config, devices)  # noqa: E731
    else:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
        measure = lambda config: compare(config, STEPS.value)  # noqa: E731

    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    file = out / ("_".join(["meshes", *filter(None, [TOPOLOGY.value.replace(":", "_")])]) + ".json")
    results: dict[str, dict[str, Any]] = {}
    table = Table(title="one recipe of each kind, cut" + (f", on {TOPOLOGY.value}" if TOPOLOGY.value else ""))
    for column in ("recipe", "mesh", "losses apart", "collectives, MB", "not needed"):
        table.add_column(column)
    for name in names:
        results[name] = measure(configs[name])
        for mesh, result in results[name].items():
            if mesh == "alone":
                continue
            kinds = ", ".join(f"{kind} {size / 1e6:.3f}" for kind, size in sorted(result["bytes"].items()))
            row = (name, mesh, f"{result['apart']:.1e}" if "apart" in result else "", kinds)
            table.add_row(*row, "; ".join(result["unneeded"]))
            console.print(*row, *result["unneeded"], soft_wrap=True, highlight=False)
        file.write_text(json.dumps({"where": surroundings("jaxlib", "flax"), "kinds": results}, indent=1) + "\n")
    console.print(table)
    console.print(f"results in {file}")


if __name__ == "__main__":
    app.run(main)
