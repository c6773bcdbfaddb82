"""From pixels to the first map of a ConvNeXt, and from map to smaller map: by convolutions or by S4ND (S4ND, 4.2).

For images, (height, width), and for video, (time, height, width). Every module is called as `module(x, rate=...)`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ssm_jax.layers.linear import linear, normal_init
from ssm_jax.layers.norm import LayerNorm

Rate = float | int | Sequence[float | int]
"""Base resolution / resolution of the images, for all axes or for each."""

KERNEL = {2: (7, 7), 3: (3, 7, 7)}  # of a block's convolution
PATCH = {2: (4, 4), 3: (2, 4, 4)}  # of the stem
POOL = {2: (2, 2), 3: (1, 2, 2)}  # of a downsampling

Conv = functools.partial(nnx.Conv, kernel_init=normal_init)
Norm = functools.partial(LayerNorm, epsilon=1e-6)


class FactorizedConv(nnx.Module):
    """S3D's convolution over video: a 2-D kernel times one short filter over time for all of its channels."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: Sequence[int] = (1, 1, 1),
        padding: Sequence[tuple[int, int]],
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Builds both; the arguments are those of `nnx.Conv`, with (time, height, width) each."""
        taps = kernel_size[0]
        self.stride, self.padding = strides[0], padding[0]
        self.space = Conv(
            in_features, out_features, kernel_size[1:], strides=strides[1:], padding=padding[1:], rngs=rngs, **options
        )
        self.time = nnx.Param(jnp.full((taps,), 1 / taps, options.get("param_dtype", jnp.float32)))

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h2 w2 d"]:
        """A weighted sum of neighbouring frames, then the 2-D convolution of every frame."""
        x = jnp.pad(x, [(0, 0), self.padding, (0, 0), (0, 0), (0, 0)])
        taps = self.time.shape[0]
        frames = (x.shape[1] - taps) // self.stride + 1
        time = self.time[...].astype(x.dtype)
        shifted = (x[:, k : k + (frames - 1) * self.stride + 1 : self.stride] * time[k] for k in range(taps))
        return self.space(functools.reduce(jnp.add, shifted))


class Convolution(nnx.Module):
    """A convolution as a mixer: it keeps the size of the map, and the number of taps at every rate."""

    def __init__(
        self,
        features: int,
        *,
        lengths: Sequence[int],
        kernel_size: Sequence[int] | None = None,
        out_features: int | None = None,
        conv: Callable[..., nnx.Module] = Conv,
        **options: Any,
    ):
        """Builds it with `conv`, by default depthwise and of ConvNeXt's size for as many axes as `lengths`."""
        size = kernel_size or KERNEL[len(lengths)]
        groups = features if out_features is None else 1
        padding = [((taps - 1) // 2, taps // 2) for taps in size]  # PyTorch's "same"
        self.conv = conv(
            features, out_features or features, size, padding=padding, feature_group_count=groups, **options
        )

    def __call__(self, x: Float[Array, "b *axes c"], *, rate: Rate = 1.0) -> Float[Array, "b *axes d"]:
        """Convolves."""
        del rate
        return self.conv(x)


class Pooled(nnx.Module):
    """A mixer at full resolution, the mean over patches, and a gated linear unit: what S4ND strides with."""

    def __init__(
        self,
        mixer: nnx.Module,
        features: int,
        d_out: int,
        *,
        window: Sequence[int],
        activation: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Puts it around a `mixer` with so many output `features`."""
        self.mixer = mixer
        self.fc = linear(features, 2 * d_out, **dtypes, rngs=rngs)
        self.window = tuple(window)
        self.activation = activation

    def __call__(self, x: Float[Array, "b *axes c"], *, rate: Rate = 1.0) -> Float[Array, "b *smaller d"]:
        """Applies it."""
        x = self.mixer(x, rate=rate)
        if self.activation is not None:
            x = self.activation(x)
        window = (1, *self.window, 1)
        x = jax.lax.reduce_window(x, np.zeros((), x.dtype), jax.lax.add, window, window, "VALID")
        value, gate = jnp.split(self.fc(x / math.prod(window)), 2, axis=-1)
        return value * nnx.sigmoid(gate)


class PatchStem(nnx.Module):
    """Patches, linearly, and LN (`patch`)."""

    def __init__(self, in_channels: int, d_model: int, *, lengths: Sequence[int], conv=Conv, rngs: nnx.Rngs, **dtypes):
        """Builds the convolution with `conv`."""
        patch = PATCH[len(lengths)]
        padding = [(0, 0)] * len(patch)
        self.conv = conv(in_channels, d_model, patch, strides=patch, padding=padding, **dtypes, rngs=rngs)
        self.norm = Norm(d_model, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b *axes c"], *, rate: Rate = 1.0) -> Float[Array, "b *smaller d"]:
        """Applies it, at any `rate` the same."""
        del rate
        return self.norm(self.conv(x))


class PooledStem(nnx.Module):
    """A mixer over the pixels, `Pooled` by patches, and LN; a linear map of each pixel may come first."""

    def __init__(
        self,
        in_channels: int,
        d_model: int,
        *,
        lengths: Sequence[int],
        mixer: Callable[..., nnx.Module],
        project: bool,
        stem_channels: int = 32,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds it; `mixer(features, lengths=...)` gives `stem_channels`, and gets so many if `project`."""
        one = (1,) * len(lengths)
        self.project = Conv(in_channels, stem_channels, one, **dtypes, rngs=rngs) if project else None
        inner = mixer(stem_channels if project else in_channels, lengths=lengths, **dtypes, rngs=rngs)
        self.pooled = Pooled(inner, stem_channels, d_model, window=PATCH[len(lengths)], **dtypes, rngs=rngs)
        self.norm = Norm(d_model, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b *axes c"], *, rate: Rate = 1.0) -> Float[Array, "b *smaller d"]:
        """Applies it."""
        x = x if self.project is None else self.project(x)
        return self.norm(self.pooled(x, rate=rate))


class HalvingStem(nnx.Module):
    """Halves the images in steps of its own, then downsamples as between stages (`s4nd`, `default`)."""

    def __init__(
        self,
        in_channels: int,
        d_model: int,
        *,
        lengths: Sequence[int],
        mixer: Callable[..., nnx.Module] | None,
        downsample: Callable[..., nnx.Module],
        stem_channels: int = 32,
        width: int = 64,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds it: a linear map of each pixel, LN, GELU, a `Pooled` mixer; if that is None, convolutions instead."""
        axes = len(lengths)
        halves = [length // 2 for length in lengths]
        if mixer is None:
            size = (3,) * axes
            options = {"strides": (2,) * axes, "padding": ((1, 1),) * axes, **dtypes}
            self.project = Conv(in_channels, stem_channels, size, **options, rngs=rngs)
            self.body = Convolution(
                stem_channels, lengths=halves, kernel_size=size, out_features=width, **dtypes, rngs=rngs
            )
        else:
            self.project = Conv(in_channels, stem_channels, (1,) * axes, **dtypes, rngs=rngs)
            inner = mixer(stem_channels, lengths=lengths, **dtypes, rngs=rngs)
            self.body = Pooled(inner, stem_channels, width, window=(2,) * axes, **dtypes, rngs=rngs)
        self.norm = Norm(stem_channels, **dtypes, rngs=rngs)
        self.downsample = downsample(width, d_model, lengths=halves, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b *axes c"], *, rate: Rate = 1.0) -> Float[Array, "b *smaller d"]:
        """Applies it."""
        x = nnx.gelu(self.norm(self.project(x)), approximate=False)
        return self.downsample(self.body(x, rate=rate), rate=rate)


class Downsample(nnx.Module):
    """LN and a convolution that takes two pixels to one on each spatial axis."""

    def __init__(self, d_in: int, d_out: int, *, lengths: Sequence[int], conv=Conv, rngs: nnx.Rngs, **dtypes: Any):
        """Builds the convolution with `conv`."""
        pool = POOL[len(lengths)]
        self.norm = Norm(d_in, **dtypes, rngs=rngs)
        self.conv = conv(d_in, d_out, pool, strides=pool, padding=[(0, 0)] * len(pool), **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b *axes c"], *, rate: Rate = 1.0) -> Float[Array, "b *smaller d"]:
        """Applies it, at any `rate` the same."""
        del rate
        return self.conv(self.norm(x))


class PooledDownsample(nnx.Module):
    """LN and a `Pooled` mixer."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        lengths: Sequence[int],
        mixer: Callable[..., nnx.Module],
        activation: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds it; `activation` comes between the mixer and the mean."""
        self.norm = Norm(d_in, **dtypes, rngs=rngs)
        inner = mixer(d_in, lengths=lengths, **dtypes, rngs=rngs)
        self.pooled = Pooled(inner, d_in, d_out, window=POOL[len(lengths)], activation=activation, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b *axes c"], *, rate: Rate = 1.0) -> Float[Array, "b *smaller d"]:
        """Applies it."""
        return self.pooled(self.norm(x), rate=rate)
