r"""Depthwise convolutions on a CPU: sums of shifted products, which `Depthwise` takes there, and XLA's convolution.

    python -m benchmarks.depthwise [--cores=1] [--rounds=7]

Forward alone, and with the gradients of the map and of the kernel; the ratio is XLA's time by ours.
"""

import jax
import jax.numpy as jnp
from absl import app
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import CORES, ROUNDS, Passes, jax_passes, medians, pin, save, surroundings
from ssm_jax.layers.conv import Depthwise
from ssm_jax.ops.backend import traced_for

CASES = {
    "Conv2D-ISO at 8 x 8": ((50, 8, 8, 144), 3),
    "Conv2D-ISO at 32 x 32": ((10, 32, 32, 144), 3),
    "Conv2D-ISO at 32 x 32, 5 x 5 taps": ((10, 32, 32, 144), 5),
    "PVTv2-B0, stage 1": ((4, 56, 56, 256), 3),
    "MRLA in ResNet-50, stage 3": ((4, 14, 14, 1024), 3),
}
"""Shape of the map, and taps along each axis."""


def passes(shape: tuple[int, ...], kernel_size: int, backend: str) -> Passes:
    """Of the layer as it is for a backend, on this one."""
    graphdef, params = nnx.split(Depthwise(shape[-1], kernel_size, use_bias=False, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), shape)
    (kernel,) = jax.tree.leaves(params)
    structure = jax.tree.structure(params)
    with traced_for(backend):
        return jax_passes(lambda x, kernel: nnx.merge(graphdef, structure.unflatten([kernel]))(x), x, kernel)


def main(argv: list[str]) -> None:
    """Prints the table, and writes depthwise.json."""
    del argv
    pin(CORES.value)
    jax.config.update("jax_platforms", "cpu")
    table = Table(box=box.SIMPLE_HEAD, title="ms of shifted products / XLA's convolution, and the ratio")
    for column in ("convolution", "forward", "with gradients"):
        table.add_column(column, justify="left" if column == "convolution" else "right")
    record = {}
    for name, (shape, kernel_size) in CASES.items():
        both = {"ours": passes(shape, kernel_size, "cpu"), "xla": passes(shape, kernel_size, "tpu")}
        assert jnp.allclose(both["ours"].forward(), both["xla"].forward(), atol=1e-4), name
        cells, record[name] = [], {}
        for kind in ("forward", "backward"):
            seconds = medians({who: getattr(of, kind) for who, of in both.items()}, rounds=ROUNDS.value)
            record[name][kind] = seconds
            ours, xla = 1e3 * seconds["ours"], 1e3 * seconds["xla"]
            cells.append(f"{ours:.1f} / {xla:.1f}, {xla / ours:.1f}")
        table.add_row(f"{name}, {' x '.join(map(str, shape))}", *cells)
    found = surroundings()
    table.caption = ", ".join(f"{key} {value}" for key, value in found.items())
    console = Console()
    console.print(table)
    save("depthwise", {"where": found, "seconds": record}, console)


if __name__ == "__main__":
    app.run(main)
