"""N-dimensional convolution with kernels that are outer products over axes (S4ND, section 3)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ssm_jax.ops.batch_local import batch_local


def fft_conv(
    u: Float[Array, "batch *axes heads"], kernels: Sequence[Float[Array, "directions channels heads _"]]
) -> Float[Array, "batch *axes channels heads"]:
    """Convolves each head with the outer product of its 1-D kernels, by zero-padded N-D FFT.

        y[b, t_1 .. t_D, c, h] = sum_s u[b, s_1 .. s_D, h] prod_a kappa_a[c, h, t_a - s_a]

    There is one entry of `kernels` per axis, of any length up to the axis'. Its first direction holds lags 0, 1, 2,
    ...; the second, if present, lags -1, -2, -3, ... (so the two do not meet in lag 0). There is no wrap-around.

    Float32 or float64; the batch is split over the devices of the mesh in context.
    """
    lengths = u.shape[1:-1]
    if len(kernels) != len(lengths):
        raise ValueError(f"kernels must have one entry per axis: got {len(kernels)} for u of shape {u.shape}.")
    return batch_local(_fft_conv)(u, *kernels)


def _fft_conv(u: Array, *kernels: Array) -> Array:
    lengths = u.shape[1:-1]
    sizes = [length + kernel.shape[-1] for length, kernel in zip(lengths, kernels, strict=True)]
    axes = range(-len(sizes), 0)
    u_f = jnp.fft.rfftn(jnp.moveaxis(u, -1, 1), s=sizes, axes=axes)
    product = u_f[:, None]
    for axis, kernel, size in zip(axes, kernels, sizes, strict=True):
        fft = jnp.fft.rfft if axis == -1 else jnp.fft.fft
        kernel_f = fft(_circular(kernel, size))
        other_axes = [a for a in axes if a != axis]
        product = product * jnp.expand_dims(kernel_f, [0, *other_axes])
    y = jnp.fft.irfftn(product, s=sizes, axes=axes)
    y = jax.lax.slice(y, [0] * y.ndim, [*y.shape[:3], *lengths])
    return jnp.moveaxis(y, (1, 2), (-2, -1))


def _circular(kernel: Array, size: int) -> Array:
    """Lays a kernel out on a circle of `size` samples: lag l at position l mod size."""
    pad = size - kernel.shape[-1]
    forward = jnp.pad(kernel[0], ((0, 0), (0, 0), (0, pad)))
    if kernel.shape[0] == 1:
        return forward
    return forward + jnp.pad(jnp.flip(kernel[1], -1), ((0, 0), (0, 0), (pad, 0)))
