r"""Which way of convolving is fastest, by the length of an axis: the table behind `ssm_jax.ops.conv.choose`.

    python -m benchmarks.conv [--channels=128] [--elements=1000000] [--rounds=7]

For each length it times the forward and backward pass of every method on one axis, interleaved, on the device that JAX
finds, and prints medians as ratios to the fastest. On a shared machine read the ratios, not the times.
"""

import jax
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import ROUNDS, jax_passes, medians
from ssm_jax.ops.conv import METHODS, choose, conv

_CHANNELS = flags.DEFINE_integer("channels", 128, "Channels of the input.")
_ELEMENTS = flags.DEFINE_integer("elements", 1_000_000, "Size of the input.")
_LENGTHS = flags.DEFINE_list("lengths", "7,14,28,56,96,128,196,256,512,1024", "Lengths of the axis.")
_ALONG_AXIS = [method for method in METHODS if method not in ("auto", "fft_nd")]


def measure(length: int) -> dict[str, float]:
    """Median seconds by method."""
    channels = _CHANNELS.value
    batch = max(1, _ELEMENTS.value // (length * channels))
    u = jax.random.normal(jax.random.key(0), (batch, length, channels))
    kernel = jax.random.normal(jax.random.key(1), (2, 1, 1, channels, length)) / length
    passes = {
        method: jax_passes(lambda u, kernel, method=method: conv(u, [kernel], method=method), u, kernel)
        for method in _ALONG_AXIS
    }
    return medians({method: each.backward for method, each in passes.items()}, rounds=ROUNDS.value)


def main(_: list[str]) -> None:
    """Prints the table."""
    device = jax.devices()[0]
    table = Table(title=f"forward and backward along one axis, relative to the fastest, on {device.device_kind}")
    for column in ["length", *_ALONG_AXIS, "fastest, ms", "choose"]:
        table.add_column(column, justify="right")
    for length in map(int, _LENGTHS.value):
        seconds = measure(length)
        fastest = min(seconds.values())
        ratios = [f"{seconds[method] / fastest:.2f}" for method in _ALONG_AXIS]
        table.add_row(str(length), *ratios, f"{1e3 * fastest:.2f}", choose(length))
    Console().print(table)


if __name__ == "__main__":
    app.run(main)
