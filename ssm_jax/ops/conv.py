"""N-dimensional convolution with kernels that are outer products over axes (S4ND, section 3).

Such a convolution is one 1-D convolution after the other, one along each axis. Each of them is a product with a
Toeplitz matrix or a product of spectra; which is fastest depends on its length and on the hardware, see `choose`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ssm_jax.ops.backend import target_backend
from ssm_jax.ops.batch_local import batch_local
from ssm_jax.ops.dtypes import at_least_float32

_HIGHEST = jax.lax.Precision.HIGHEST


def conv(
    u: Float[Array, "batch *axes heads"],
    kernels: Sequence[Float[Array, "directions rank channels heads _"]],
    D: Float[Array, "channels heads"] | None = None,
    *,
    method: str = "auto",
) -> Float[Array, "batch *axes channels*heads"]:
    """Convolves each head with its N-D kernels, zero-padded, without wrap-around, and adds `D` times the input.

        y[b, t, (c h)] = mean_r sum_s u[b, s, h] prod_a kappa_a[r, c, h, t_a - s_a] + D[c, h] u[b, t, h], t = t_1 .. t_D

    There is one entry of `kernels` per axis. Its first direction holds lags 0, 1, 2, ...; the second, if present,
    lags -1, -2, -3, ..., so that the two do not meet in lag 0. Lags that no pair of positions has are left out.

    `method` is one of

    * `toeplitz`: a product with the matrix kappa[t - s] along each axis, in the dtype of `u`
    * `dft`: a product of spectra along each axis, the Fourier transforms being products with matrices
    * `fft`: the same with fast Fourier transforms
    * `fft_nd`: one fast Fourier transform over all axes, each padded to twice its length: the reference
    * `auto`: what `choose` says, axis by axis

    Spectra and D u are float32, or float64 for float64 input; the result has the dtype of `u`. Each device computes its
    own rows of the batch (`batch_local`). Raises ValueError for an unknown method or another number of kernels than
    axes.
    """
    lengths = u.shape[1:-1]
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if len(kernels) != len(lengths):
        raise ValueError(f"kernels must have one entry per axis: got {len(kernels)} for u of shape {u.shape}.")
    kernels = [kernel[..., :length] for kernel, length in zip(kernels, lengths, strict=True)]
    if method == "fft_nd":
        convolve = _fft_nd
    else:
        methods = [choose(length) if method == "auto" else method for length in lengths]
        convolve = functools.partial(_separable, [_ALONG_AXIS[name] for name in methods])
    y = batch_local(convolve)(u, kernels)
    # Channels and heads are one axis from here on: around an axis of one channel XLA on CPU computes what follows, and
    # its gradient, once for each of its users.
    y = y.reshape(*u.shape[:-1], -1)
    if D is not None:
        wide = at_least_float32(u.dtype)
        D = D.reshape(*[1] * (u.ndim - 1), -1).astype(wide)
        y = y.astype(wide) + D * jnp.tile(u, D.size // u.shape[-1]).astype(wide)
    return y.astype(u.dtype)


_FASTEST = {
    "cpu": [("toeplitz", 128)],  # measured: 1.3 times as fast as fft at 128, 3 times slower at 196
    "tpu": [("toeplitz", 64), ("dft", 768)],  # XLA's compile-time estimates for v5e, not a measurement
    "gpu": [("toeplitz", 128)],  # not measured
}
"""For each backend, methods with the longest axis that they are fastest for; beyond the last of them comes `fft`."""


def choose(length: int, backend: str | None = None) -> str:
    """The fastest method for an axis of `length` on `backend` (default: the one in use), from a table.

    `python -m benchmarks.conv` measures it on the device at hand.
    """
    table = _FASTEST.get(backend or target_backend(), _FASTEST["gpu"])
    return next((method for method, longest in table if length <= longest), "fft")


def _separable(along_axis: Sequence[Callable[..., Array]], u: Array, kernels: Sequence[Array]) -> Array:
    """Applies the kernels axis by axis to matrices, with two batch dimensions (rank x channels, heads).

    The first axis is the matrices' rows, which costs no transposition; each of the others becomes their columns, the
    last of them where it already is.
    """
    _, rank, channels, heads, _ = kernels[0].shape
    kernels = [kernel.reshape(kernel.shape[0], rank * channels, heads, -1) for kernel in kernels]
    y = jnp.moveaxis(u, (-1, 1), (0, 1))[None]  # (1, heads, L_1, batch, L_2 .. L_D)
    axes = y.shape[1:]
    for apply, kernel in zip(along_axis[1:], kernels[1:], strict=True):
        y = jnp.moveaxis(y, 4, -1)
        y = apply(y.reshape(*y.shape[:2], -1, y.shape[-1]), kernel, -1).reshape(-1, *y.shape[1:]).astype(u.dtype)
    y = along_axis[0](y.reshape(*y.shape[:3], -1), kernels[0], -2)
    y = y.reshape(rank, channels, *axes)
    return jnp.moveaxis(sum(y[1:], start=y[0]) / rank, (2, 0, 1), (1, -2, -1))


def _toeplitz(y: Array, kernel: Array, axis: int) -> Array:
    """Multiplies (k or 1, heads, rows, columns) by kappa[t - s] along `axis`, kernel (directions, k, heads, lags)."""
    length = y.shape[axis]
    # Lags length-1 .. -length, the first row of the matrix turned round. Row t is that shifted by t: laid out again
    # and again and cut into rows one element shorter, each row starts one earlier. No gather is needed.
    circle = jnp.flip(jnp.roll(_circular(kernel, 2 * length), length, -1), -1)
    rows = jnp.tile(circle, length)[..., : length * (2 * length - 1)].reshape(*circle.shape[:2], length, -1)
    return _product(rows[..., length - 1 :].astype(y.dtype), y, axis)


def _dft(y: Array, kernel: Array, axis: int) -> Array:
    """Like `_toeplitz`, by spectra: the transforms are matrix products shared by all heads, in real arithmetic."""
    dtype, length = at_least_float32(y.dtype), y.shape[axis]
    size = length + kernel.shape[-1]
    angle = 2 * np.pi / size * (np.outer(np.arange(size // 2 + 1), np.arange(size)) % size)
    # irfft as a product: all frequencies but 0 and size / 2 stand for themselves and their conjugates.
    weight = np.where((np.arange(size // 2 + 1) == 0) | (2 * np.arange(size // 2 + 1) == size), 1, 2) / size
    cos, sin = jnp.asarray(np.cos(angle), dtype), jnp.asarray(-np.sin(angle), dtype)
    y_re, y_im = (_product(part[:, :length], y.astype(dtype), axis) for part in (cos, sin))
    circle = _circular(kernel, size)
    k_re, k_im = (jnp.expand_dims(_product(part, circle, -1), -3 - axis) for part in (cos, sin))
    back = [(part * jnp.asarray(weight, dtype)[:, None])[:, :length].T for part in (cos, sin)]
    re, im = y_re * k_re - y_im * k_im, y_re * k_im + y_im * k_re
    return _product(back[0], re, axis) + _product(back[1], im, axis)


def _fft(y: Array, kernel: Array, axis: int) -> Array:
    """Like `_toeplitz`, by spectra."""
    length = y.shape[axis]
    size = length + kernel.shape[-1]
    spectrum = jnp.expand_dims(jnp.fft.rfft(_circular(kernel, size)), -3 - axis)
    product = jnp.fft.rfft(y.astype(at_least_float32(y.dtype)), size, axis) * spectrum
    return jax.lax.slice_in_dim(jnp.fft.irfft(product, size, axis), 0, length, axis=axis)


def _product(matrix: Array, y: Array, axis: int) -> Array:
    """Multiplies along an axis of `y`, rows (-2) or columns (-1)."""
    factors = (matrix, y) if axis == -2 else (y, jnp.swapaxes(matrix, -1, -2))
    return jnp.matmul(*factors, precision=_HIGHEST)


_ALONG_AXIS = {"toeplitz": _toeplitz, "dft": _dft, "fft": _fft}
METHODS = ("auto", *_ALONG_AXIS, "fft_nd")
"""What `conv` accepts as `method`."""


def _fft_nd(u: Array, kernels: Sequence[Array]) -> Array:
    """All axes at once; the kernel's spectrum is the outer product of its factors'."""
    lengths = u.shape[1:-1]
    sizes = [length + kernel.shape[-1] for length, kernel in zip(lengths, kernels, strict=True)]
    axes = range(-len(sizes), 0)
    factors = []
    for axis, kernel, size in zip(axes, kernels, sizes, strict=True):
        fft = jnp.fft.rfft if axis == -1 else jnp.fft.fft
        factors.append(jnp.expand_dims(fft(_circular(kernel, size)), [a for a in axes if a != axis]))
    spectrum = math.prod(factors[1:], start=factors[0]).mean(0)
    x = jnp.moveaxis(u, -1, 0)[None]  # (1, heads, batch, L_1 .. L_D)
    product = jnp.fft.rfftn(x.astype(at_least_float32(u.dtype)), sizes, axes) * jnp.expand_dims(spectrum, 2)
    y = jnp.fft.irfftn(product, sizes, axes)
    y = jax.lax.slice(y, [0] * y.ndim, [*y.shape[:3], *lengths])
    return jnp.moveaxis(y, (0, 1), (-2, -1))


def _circular(kernel: Array, size: int) -> Array:
    """Lays a kernel (directions, ..., lags) out on a circle of `size` samples: lag l at position l mod size."""
    pad = [(0, 0)] * (kernel.ndim - 2)
    free = size - kernel.shape[-1]
    forward = jnp.pad(kernel[0], [*pad, (0, free)])
    if kernel.shape[0] == 1:
        return forward
    return forward + jnp.pad(jnp.flip(kernel[1], -1), [*pad, (free, 0)])
