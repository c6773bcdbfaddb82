"""Feature pyramids (Lin et al., 2017, arXiv:1612.03144): maps of one width, the fine ones told what coarse ones see."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from ssm_jax.layers.conv import Pointwise

uniform = jax.nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
"""Caffe2's Xavier, which pyramids start with."""

Pyramid = tuple[Float[Array, "b _ _ c"], ...]


class ConvNorm(nnx.Module):
    """A k x k convolution of stride 1 that keeps the map's size, and what normalises it, which has the bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        norm: Callable[..., nnx.Module] | None = None,
        kernel_init: jax.nn.initializers.Initializer = uniform,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds both; `norm` is called as `norm(out_channels, ...)`, None: the convolution has the bias."""
        kind = Pointwise if kernel_size == 1 else nnx.Conv
        self.conv = kind(
            in_channels,
            out_channels,
            (kernel_size, kernel_size),
            use_bias=norm is None,
            kernel_init=kernel_init,
            **dtypes,
            rngs=rngs,
        )
        self.norm = None if norm is None else norm(out_channels, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], where: Bool[Array, " b"] | None = None) -> Float[Array, "b h w d"]:
        """Applies both; a batch norm takes the statistics of the rows in `where`, by default all."""
        x = self.conv(x)
        return x if self.norm is None else self.norm(x) if where is None else self.norm(x, where=where)


class Pool(nnx.Module):
    """One map more: every second position of the last one (Faster R-CNN)."""

    def __init__(self, in_channels: int, channels: int, **options: Any):
        """Builds nothing."""

    def __call__(self, c: Float[Array, "b h w _"], p: Float[Array, "b h w c"]) -> Pyramid:
        """The map."""
        return (p[:, ::2, ::2],)


class FPN(nnx.Module):
    """A map of `out_channels` for each map of a network, and coarser ones.

        y_l = layer(x_l), x_l = inner(C_l) + x_{l+1}, enlarged

    `inner` are 1 x 1 convolutions and `layer` 3 x 3 ones, each map's own.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        extra: Callable[..., nnx.Module] = Pool,
        norm: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds the convolutions.

        Args:
            in_channels: of the network's maps.
            out_channels: of the pyramid's maps.
            extra: makes what adds coarser maps, called as `extra(channels of the network's last map, out_channels,
                ...)`: `Pool`, `P6P7` or `P6P7FromNetwork`.
            norm: makes what follows each convolution, called as `norm(out_channels, ...)`, if anything does.
            rngs: source of the `params` stream.
            **dtypes: `dtype` and `param_dtype`.
        """
        options: dict[str, Any] = {"norm": norm, **dtypes, "rngs": rngs}
        self.channels = out_channels
        self.inner = nnx.List(ConvNorm(channels, out_channels, 1, **options) for channels in in_channels)
        self.layers = nnx.List(ConvNorm(out_channels, out_channels, 3, **options) for _ in in_channels)
        self.extra = extra(in_channels[-1], out_channels, **dtypes, rngs=rngs)

    def __call__(self, maps: Sequence[Float[Array, "b _ _ _"]]) -> Pyramid:
        """The pyramid, fine maps first."""
        pyramid, x = [], None
        for c, inner, layer in reversed(list(zip(maps, self.inner, self.layers, strict=True))):
            x = inner(c) if x is None else inner(c) + enlarge(x, map_size(c))
            pyramid.insert(0, layer(x))
        return (*pyramid, *self.extra(maps[-1], pyramid[-1]))


class P6P7FromNetwork(nnx.Module):
    """Two maps more: P6 by a convolution of stride 2 of the network's last map, P7 by one of ReLU(P6)."""

    def __init__(self, in_channels: int, channels: int, *, rngs: nnx.Rngs, **dtypes: Any):
        """Builds the convolutions."""
        options: dict[str, Any] = {"strides": 2, "padding": ((1, 1), (1, 1)), "kernel_init": uniform, **dtypes}
        self.p6 = nnx.Conv(in_channels, channels, (3, 3), **options, rngs=rngs)
        self.p7 = nnx.Conv(channels, channels, (3, 3), **options, rngs=rngs)

    def __call__(self, c: Float[Array, "b h w d"], p: Float[Array, "b h w c"]) -> Pyramid:
        """Both maps."""
        p6 = self.p6(c)
        return p6, self.p7(nnx.relu(p6))


class P6P7(P6P7FromNetwork):
    """These of the pyramid's last map (RetinaNet, arXiv:1708.02002, as it was published later)."""

    def __init__(self, in_channels: int, channels: int, **options: Any):
        """Builds the convolutions."""
        super().__init__(channels, channels, **options)

    def __call__(self, c: Float[Array, "b h w d"], p: Float[Array, "b h w c"]) -> Pyramid:
        """Both maps."""
        return super().__call__(p, p)


def map_size(x: Float[Array, "b h w c"]) -> tuple[int, int]:
    """Height and width."""
    return x.shape[1], x.shape[2]


def enlarge(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """A map on a finer grid of `size` cells, each with the value of the one that its upper left corner is in."""
    for axis, n in zip((1, 2), size, strict=True):
        old = x.shape[axis]
        x = jnp.repeat(x, n // old, axis) if n % old == 0 else jnp.take(x, np.arange(n) * old // n, axis)
    return x
