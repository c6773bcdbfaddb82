r"""What a causal layer costs as a recurrence, by the size of the chunks: against its convolution.

    python -m benchmarks.recurrence [--kernels=dplr] [--rounds=7]

Times forward, and forward and backward, of `S4ND.scan` with several chunks and of calling the layer, in turns, without
the output map, on one core of a CPU or on the accelerator that JAX finds, and prints multiples of the latter.
"""

import functools

import jax
from absl import app, flags
from flax import nnx
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import ROUNDS, Passes, jax_passes, medians, pin, surroundings
from ssm_jax import S4ND

_KERNELS = flags.DEFINE_enum("kernels", "diag", ["diag", "dplr"], "Kind of the kernels.")
_CHUNKS = (16, 32, 64, 128, 256)
_SHAPES = ((8, 1024, 64), (8, 1024, 256), (8, 4096, 64))  # batch, length, d_model


def contestants(shape: tuple[int, int, int], mode: str) -> dict[str, Passes]:
    """The layer as a convolution, and as a recurrence by chunks of so many positions."""
    batch, _, d_model = shape
    layer = S4ND(d_model, dims=1, bidirectional=False, mode=mode, linear_output=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    u = jax.random.normal(jax.random.key(0), shape)

    def scan(params: nnx.State, u: jax.Array, chunk: int) -> jax.Array:
        layer = nnx.merge(graph, params)
        return layer.scan(layer.initial_state(batch), u, chunk=chunk)[1]

    passes = {"convolution": jax_passes(lambda params, u: nnx.merge(graph, params)(u), params, u)}
    return passes | {str(chunk): jax_passes(functools.partial(scan, chunk=chunk), params, u) for chunk in _CHUNKS}


def main(_: list[str]) -> None:
    """Prints the table."""
    pin(1)
    console = Console(width=120)
    console.print(surroundings("jaxlib"))
    table = Table(title=f"S4ND ({_KERNELS.value}) as a recurrence: forward and backward (forward), in convolutions")
    for column in ["batch, length, channels", "convolution, ms", *(f"chunk {chunk}" for chunk in _CHUNKS)]:
        table.add_column(column, justify="right")
    for shape in _SHAPES:
        passes = contestants(shape, _KERNELS.value)
        forward = medians({name: each.forward for name, each in passes.items()}, rounds=ROUNDS.value)
        both = medians({name: each.backward for name, each in passes.items()}, rounds=ROUNDS.value)
        unit = both.pop("convolution"), forward.pop("convolution")
        ratios = [f"{both[name] / unit[0]:.2f} ({forward[name] / unit[1]:.2f})" for name in both]
        table.add_row(", ".join(map(str, shape)), f"{1e3 * unit[0]:.0f} ({1e3 * unit[1]:.0f})", *ratios)
    console.print(table)


if __name__ == "__main__":
    app.run(main)
