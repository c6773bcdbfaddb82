"""N-dimensional convolution with kernels that are outer products over axes (S4ND, section 3).

Such a convolution is one 1-D convolution after the other, one along each axis. Each of them is a product with a
Toeplitz matrix or a product of spectra; which is fastest depends on its length and on the hardware, see `choose`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ssm_jax.ops.batch_local import batch_local
from ssm_jax.ops.dtypes import at_least_float32

_HIGHEST = jax.lax.Precision.HIGHEST


def conv(
    u: Float[Array, "batch *axes heads"],
    kernels: Sequence[Float[Array, "directions rank channels heads _"]],
    *,
    method: str = "auto",
) -> Float[Array, "batch *axes channels heads"]:
    """Convolves each head with its N-D kernels, zero-padded, without wrap-around.

        y[b, t_1 .. t_D, c, h] = mean_r sum_s u[b, s_1 .. s_D, h] prod_a kappa_a[r, c, h, t_a - s_a]

    There is one entry of `kernels` per axis. Its first direction holds lags 0, 1, 2, ...; the second, if present,
    lags -1, -2, -3, ..., so that the two do not meet in lag 0. Lags that no pair of positions has are left out.

    `method` is one of

    * `toeplitz`: a product with the matrix kappa[t - s] along each axis, in the dtype of `u` with float32 sums
    * `dft`: a product of spectra along each axis, the Fourier transforms being products with matrices
    * `fft`: the same with fast Fourier transforms
    * `fft_nd`: one fast Fourier transform over all axes, each padded to twice its length: the reference
    * `auto`: what `choose` says, axis by axis

    Spectra are float32, or float64 for float64 input. FFTs run on each device's own rows of the batch
    (`batch_local`); the matrix products need no such care. Raises ValueError for an unknown method or another number
    of kernels than axes.
    """
    lengths = u.shape[1:-1]
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if len(kernels) != len(lengths):
        raise ValueError(f"kernels must have one entry per axis: got {len(kernels)} for u of shape {u.shape}.")
    kernels = [kernel[..., :length] for kernel, length in zip(kernels, lengths, strict=True)]
    if method == "fft_nd":
        return batch_local(_fft_nd)(u, *kernels)
    methods = [choose(length) if method == "auto" else method for length in lengths]

    def separable(u: Array, *kernels: Array) -> Array:
        return _separable(u, kernels, [_ALONG_AXIS[name] for name in methods])

    return batch_local(separable)(u, *kernels) if "fft" in methods else separable(u, *kernels)


_FASTEST = {
    "cpu": [("toeplitz", 128)],  # measured: 1.3 times as fast as fft at 128, 6 times slower at 196
    "tpu": [("toeplitz", 64), ("dft", 768)],  # XLA's compile-time estimates for v5e, not a measurement
    "gpu": [("toeplitz", 128)],  # not measured
}
"""For each backend, methods with the longest axis that they are fastest for; beyond the last of them comes `fft`."""


def choose(length: int, backend: str | None = None) -> str:
    """The fastest method for an axis of `length` on `backend` (default: the one in use), from a table.

    `python -m benchmarks.conv` measures it on the device at hand.
    """
    table = _FASTEST.get(backend or jax.default_backend(), _FASTEST["gpu"])
    return next((method for method, longest in table if length <= longest), "fft")


def _separable(u: Array, kernels: Sequence[Array], along_axis: Sequence[Callable[[Array, Array], Array]]) -> Array:
    """Applies the kernels axis by axis to matrices (groups, positions, rest), groups = rank x channels x heads."""
    rank, channels, heads = kernels[0].shape[1:4]
    y = jnp.moveaxis(u, -1, 0)
    # From the first axis on, every rank and channel has a kernel of its own.
    y = jnp.broadcast_to(y, (rank * channels, *y.shape)).reshape(-1, *y.shape[1:])
    for axis, (kernel, apply) in enumerate(zip(kernels, along_axis, strict=True), start=2):
        moved = jnp.moveaxis(y, axis, 1)
        result = apply(moved.reshape(*moved.shape[:2], -1), kernel.reshape(kernel.shape[0], -1, kernel.shape[-1]))
        y = jnp.moveaxis(result.reshape(moved.shape), 1, axis)
    y = y.reshape(rank, channels, heads, *y.shape[1:]).mean(0)
    return jnp.moveaxis(y, (0, 1), (-2, -1))


def _toeplitz(y: Array, kernel: Array) -> Array:
    """Multiplies (groups, length, rest) by kappa[t - s], with kernel (directions, groups, lags)."""
    groups, length, _ = y.shape
    # Lags length-1 .. -length, the first row of the matrix turned round. Row t is that shifted by t: laid out again
    # and again and cut into rows one element shorter, each row starts one earlier. No gather is needed.
    circle = jnp.flip(jnp.roll(_circular(kernel, 2 * length), length, -1), -1)
    rows = jnp.tile(circle, (1, length))[:, : length * (2 * length - 1)].reshape(groups, length, 2 * length - 1)
    matrix = rows[:, :, length - 1 :].astype(y.dtype)
    product = jax.lax.dot_general(
        matrix, y, (((2,), (1,)), ((0,), (0,))), precision=_HIGHEST, preferred_element_type=at_least_float32(y.dtype)
    )
    return product.astype(y.dtype)


def _dft(y: Array, kernel: Array) -> Array:
    """Like `_toeplitz`, by spectra: the transforms are matrix products shared by all groups, in real arithmetic."""
    dtype, length = at_least_float32(y.dtype), y.shape[1]
    size = length + kernel.shape[-1]
    angle = 2 * np.pi / size * (np.outer(np.arange(size // 2 + 1), np.arange(size)) % size)
    cos, sin = np.cos(angle), np.sin(angle)
    # irfft as a product: all frequencies but 0 and size / 2 stand for themselves and their conjugates.
    weight = np.where((np.arange(size // 2 + 1) == 0) | (2 * np.arange(size // 2 + 1) == size), 1, 2) / size
    forward = jnp.asarray(np.stack([cos, -sin]), dtype)
    inverse = jnp.asarray(np.stack([cos, -sin]) * weight[:, None], dtype)[:, :, :length]
    y_re, y_im = jnp.einsum("pfs,gsr->pgfr", forward[:, :, :length], y.astype(dtype), precision=_HIGHEST)
    k_re, k_im = jnp.einsum("pfs,gs->pgf", forward, _circular(kernel, size), precision=_HIGHEST)[..., None]
    product = jnp.stack([y_re * k_re - y_im * k_im, y_re * k_im + y_im * k_re])
    return jnp.einsum("pft,pgfr->gtr", inverse, product, precision=_HIGHEST).astype(y.dtype)


def _fft(y: Array, kernel: Array) -> Array:
    """Like `_toeplitz`, by spectra."""
    length = y.shape[1]
    size = length + kernel.shape[-1]
    x = jnp.swapaxes(y, 1, 2).astype(at_least_float32(y.dtype))
    product = jnp.fft.rfft(x, size) * jnp.fft.rfft(_circular(kernel, size))[:, None]
    return jnp.swapaxes(jnp.fft.irfft(product, size)[..., :length], 1, 2).astype(y.dtype)


_ALONG_AXIS = {"toeplitz": _toeplitz, "dft": _dft, "fft": _fft}
METHODS = ("auto", *_ALONG_AXIS, "fft_nd")
"""What `conv` accepts as `method`."""


def _fft_nd(u: Array, *kernels: Array) -> Array:
    """All axes at once; the kernel's spectrum is the outer product of its factors'."""
    lengths = u.shape[1:-1]
    sizes = [length + kernel.shape[-1] for length, kernel in zip(lengths, kernels, strict=True)]
    axes = range(-len(sizes), 0)
    factors = []
    for axis, kernel, size in zip(axes, kernels, sizes, strict=True):
        fft = jnp.fft.rfft if axis == -1 else jnp.fft.fft
        factors.append(jnp.expand_dims(fft(_circular(kernel, size)), [a for a in axes if a != axis]))
    spectrum = math.prod(factors[1:], start=factors[0]).mean(0)
    x = jnp.moveaxis(u, -1, 1).astype(at_least_float32(u.dtype))
    product = jnp.fft.rfftn(x, sizes, axes)[:, None] * spectrum[None]
    y = jnp.fft.irfftn(product, sizes, axes)
    y = jax.lax.slice(y, [0] * y.ndim, [*y.shape[:3], *lengths])
    return jnp.moveaxis(y, (1, 2), (-2, -1)).astype(u.dtype)


def _circular(kernel: Array, size: int) -> Array:
    """Lays a kernel (directions, ..., lags) out on a circle of `size` samples: lag l at position l mod size."""
    pad = [(0, 0)] * (kernel.ndim - 2)
    free = size - kernel.shape[-1]
    forward = jnp.pad(kernel[0], [*pad, (0, free)])
    if kernel.shape[0] == 1:
        return forward
    return forward + jnp.pad(jnp.flip(kernel[1], -1), [*pad, (free, 0)])
