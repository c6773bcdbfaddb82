"""ConvNeXt over images and video, with convolutions or S4ND (Liu et al., arXiv:2201.03545; S4ND, sections 4.1, 4.2).

    images > stem, 1/4 > blocks > downsample, 1/8 > blocks > downsample, 1/16 > blocks > downsample, 1/32 > blocks
           > mean over positions > LN > classifier

Everything is written once for any number of axes: two for images, (height, width), and three for video,
(time, height, width), of which only the stem halves the time.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, Stage, aggregate
from ssm_jax.layers.drop_path import DropPath, drop_path_rates
from ssm_jax.layers.images import check_images
from ssm_jax.layers.linear import normal_linear
from ssm_jax.layers.mlp import MLP
from ssm_jax.layers.s4nd import S4ND
from ssm_jax.layers.stack import Stack
from ssm_jax.layers.stems import (
    PATCH,
    POOL,
    Convolution,
    Downsample,
    FactorizedConv,
    HalvingStem,
    Norm,
    PatchStem,
    PooledDownsample,
    PooledStem,
    Rate,
)


def s4nd(d_model: int, *, lengths: Sequence[int], **options: Any) -> S4ND:
    """The mixer of S4ND-ConvNeXt: its kernels reach over the whole map at base resolution."""
    return S4ND(d_model, dims=len(lengths), l_max=tuple(lengths), linear_output=True, **options)


class Block(nnx.Module):
    """x + drop_path(gamma * MLP(LN(mixer(x))))."""

    def __init__(
        self,
        d_model: int,
        *,
        mixer: Callable[..., nnx.Module],
        layer_scale: float,
        dropout: float,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds the block; `mixer(d_model, rngs=..., **dtypes)` makes its mixer."""
        self.mixer = mixer(d_model, **dtypes, rngs=rngs)
        self.norm = Norm(d_model, **dtypes, rngs=rngs)
        self.mlp = MLP(d_model, 4 * d_model, dropout=dropout, **dtypes, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((d_model,), layer_scale, dtypes["param_dtype"]))
        self.drop_path = DropPath()

    def __call__(
        self,
        x: Float[Array, "b *axes d"],
        drop_path: float | Array,
        *,
        rate: Rate = 1.0,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b *axes d"]:
        """Applies it, with its branch dropped at the rate `drop_path`."""
        y = self.mlp(self.norm(self.mixer(x, rate=rate)), rngs=rngs)
        gamma = self.gamma[...].astype(y.dtype)[(None,) * (y.ndim - 1)]
        return x + self.drop_path(gamma * y, drop_path, rngs=rngs)


class ConvNeXt(nnx.Module):
    """Stem, four stages of blocks at 1/4 to 1/32 of the images' size, mean, classifier."""

    def __init__(
        self,
        num_classes: int,
        *,
        mixer: Callable[..., nnx.Module] = Convolution,
        stem: Callable[..., nnx.Module] = PatchStem,
        downsample: Callable[..., nnx.Module] = Downsample,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        img_size: int | Sequence[int] = 224,
        aggregation: Callable[..., Aggregation] | None = None,
        in_channels: int = 3,
        layer_scale: float = 1e-6,
        dropout: float = 0.0,
        head_dropout: float = 0.0,
        drop_path: float = 0.0,
        remat: str = "none",
        scan: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the network. The defaults are ConvNeXt-T's.

        Args:
            num_classes: number of logits.
            mixer: makes the mixer of a block, as `mixer(d_model, lengths=..., ...)`; `lengths` is the size of its map
                at base resolution.
            stem: makes the stem, as `stem(in_channels, d_model, lengths=..., ...)`.
            downsample: makes what is between stages, as `downsample(d_in, d_out, lengths=..., ...)`, with the size of
                the larger map.
            depths: number of blocks of each stage.
            dims: width of each stage.
            img_size: base resolution: one number for square images, (height, width), or (time, height, width).
            aggregation: makes what aggregates the layers of a stage, called as `aggregation(stage, ...)`, such as
                `S6LAToken`; None: each block sees the one before it alone.
            in_channels: channels of the images.
            layer_scale: initial value of gamma.
            dropout: rate after both maps of each MLP.
            head_dropout: rate before the classifier.
            drop_path: stochastic depth of the last block; it grows linearly from 0.
            remat: what the backward pass keeps of a block, a name in `ssm_jax.layers.stack.REMAT`.
            scan: run the equal blocks of a stage as one loop, see `Stack`.
            dtype: dtype of matrix products and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for an impossible value, naming the argument.
        """
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(size) not in PATCH:
            raise ValueError(f"img_size must be one, two or three numbers, got {img_size}.")
        reduction = [patch * POOL[len(size)][axis] ** 3 for axis, patch in enumerate(PATCH[len(size)])]
        if any(length < least for length, least in zip(size, reduction, strict=True)):
            raise ValueError(f"img_size must be at least {tuple(reduction)}, got {img_size}.")
        for argument, value in [("num_classes", num_classes), ("in_channels", in_channels)]:
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        for argument, values in [("depths", depths), ("dims", dims)]:
            if len(values) != 4 or min(values) < 1:
                raise ValueError(f"{argument} must be four numbers of at least 1, got {tuple(values)}.")
        for argument, value in [("dropout", dropout), ("head_dropout", head_dropout)]:
            if not 0 <= value < 1:
                raise ValueError(f"{argument} must be in [0, 1), got {value}.")
        self.in_channels = in_channels
        self.reduction = tuple(reduction)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.stem = stem(in_channels, dims[0], lengths=size, **dtypes, rngs=rngs)
        size = tuple(length // patch for length, patch in zip(size, PATCH[len(size)], strict=True))
        downsamples, stages = [], []
        rates = drop_path_rates(drop_path, tuple(depths))
        for i, (depth, d_model) in enumerate(zip(depths, dims, strict=True)):
            if i > 0:
                downsamples.append(downsample(dims[i - 1], d_model, lengths=size, **dtypes, rngs=rngs))
                size = tuple(length // pool for length, pool in zip(size, POOL[len(size)], strict=True))
            block = functools.partial(
                Block, mixer=functools.partial(mixer, lengths=size), layer_scale=layer_scale, dropout=dropout, **dtypes
            )
            blocks = [block(d_model, rngs=rngs) for _ in range(depth)]
            told = Stage(blocks, d_model, previous=dims[i - 1] if i else None, last=i == len(depths) - 1)
            aggregates = aggregate(aggregation, told, **dtypes, rngs=rngs)
            stages.append(Stack(blocks, drop_path=rates[i], aggregation=aggregates, remat=remat, scan=scan))
        self.downsamples = nnx.List(downsamples)
        self.stages = nnx.List(stages)
        self.norm = Norm(dims[-1], **dtypes, rngs=rngs)
        self.dropout = nnx.Dropout(head_dropout)
        self.head = normal_linear(dims[-1] + stages[-1].head_channels, num_classes, **dtypes, rngs=rngs)

    def _encode(self, images: Array, rate: Rate, rngs: nnx.Rngs | None) -> tuple[list[Array], Any]:
        """The maps after the stages, and the last state of the aggregation."""
        check_images(images, self.in_channels, axes=len(self.reduction), least=self.reduction)
        maps, h = [], None
        x = self.stem(images, rate=rate)
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.downsamples[i - 1](x, rate=rate)
            x, h = stage(x, h, rate=rate, rngs=rngs)
            maps.append(x)
        return maps, h

    def features(
        self, images: Float[Array, "b *axes c"], *, rate: Rate = 1.0, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b ..."], ...]:
        """The maps after the four stages, at 1/4, 1/8, 1/16 and 1/32 of the images' size."""
        return tuple(self._encode(images, rate, rngs)[0])

    def __call__(
        self, images: Float[Array, "b *axes c"], *, rate: Rate = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b num_classes"]:
        """Returns logits. `rate` = base resolution / resolution of these images goes to every S4ND."""
        (*_, x), h = self._encode(images, rate, rngs)
        x = self.norm(x.mean(axis=tuple(range(1, x.ndim - 1))))
        return self.head(self.dropout(self.stages[-1].readout(x, h), rngs=rngs))


def convnext_s4nd(
    num_classes: int,
    *,
    mixer: Mapping[str, Any] | None = None,
    stem: str = "new_s4nd_patch",
    downsample: str = "conv",
    stem_channels: int = 32,
    stem_l_max: int = 16,
    **network: Any,
) -> ConvNeXt:
    """S4ND-ConvNeXt, 2-D or 3-D by `img_size`.

    Args:
        num_classes: number of logits.
        mixer: arguments of `S4ND` other than these defaults: low-rank kernels from Fourier's matrices, N = 64, dt from
            0.1 to 1.
        stem: by the release's name. With S4ND: `new_s4nd_patch` (dense, from the pixels to `stem_channels`, with
            kernels of `stem_l_max` pixels: the paper's 30.0 M), `s4nd_patch` (over `stem_channels` maps of the pixels,
            with kernels as long as the images: the "global" stem), `s4nd` (likewise, but of stride 2). Without:
            `patch` (ConvNeXt's), `depthwise_patch`, `new_patch`, `default`.
        downsample: `conv` (ConvNeXt's), `s4nd` (what the release's config has), or `s4nd_gelu`.
        stem_channels: width within the stem.
        stem_l_max: length of the kernels of the dense stem.
        **network: arguments of `ConvNeXt`.
    """
    options = {"mode": "dplr", "init": "fourier", "dt_min": 0.1, "dt_max": 1.0, **(mixer or {})}
    layer = functools.partial(s4nd, **options)
    gelu = functools.partial(nnx.gelu, approximate=False)
    downsamples: dict[str, Callable[..., nnx.Module]] = {
        "conv": Downsample,
        "s4nd": functools.partial(PooledDownsample, mixer=layer),
        "s4nd_gelu": functools.partial(PooledDownsample, mixer=layer, activation=gelu),
    }
    if downsample not in downsamples:
        raise ValueError(f"downsample must be one of {', '.join(downsamples)}, got {downsample!r}.")

    def dense_s4nd(features: int, *, lengths: Sequence[int], **rest: Any) -> S4ND:
        return s4nd(features, lengths=(stem_l_max,) * len(lengths), out_channels=stem_channels, **options | rest)

    def convolution(features: int, *, lengths: Sequence[int], **rest: Any) -> Convolution:
        return Convolution(features, lengths=lengths, kernel_size=PATCH[len(lengths)], **rest)

    dense_convolution = functools.partial(convolution, out_features=stem_channels)
    pooled = functools.partial(PooledStem, stem_channels=stem_channels)
    halving = functools.partial(HalvingStem, stem_channels=stem_channels, downsample=downsamples[downsample])
    stems: dict[str, Callable[..., nnx.Module]] = {
        "patch": PatchStem,
        "depthwise_patch": functools.partial(pooled, project=True, mixer=convolution),
        "new_patch": functools.partial(pooled, project=False, mixer=dense_convolution),
        "new_s4nd_patch": functools.partial(pooled, project=False, mixer=dense_s4nd),
        "s4nd_patch": functools.partial(pooled, project=True, mixer=layer),
        "s4nd": functools.partial(halving, mixer=layer),
        "default": functools.partial(halving, mixer=None),
    }
    if stem not in stems:
        raise ValueError(f"stem must be one of {', '.join(stems)}, got {stem!r}.")
    return ConvNeXt(num_classes, mixer=layer, stem=stems[stem], downsample=downsamples[downsample], **network)


def convnext_3d_s4nd(num_classes: int, *, mixer: Mapping[str, Any] | None = None, **network: Any) -> ConvNeXt:
    """S4ND-ConvNeXt-3D: as `convnext_s4nd`, but for a patch stem, and the kernels over time.

    These start as the release has them after inflation: LegS for half of the channels and Fourier for the others, each
    with dynamics of its own, reading out the first coordinate of the state, with dt = e^2.
    """
    temporal = {"init": "hippo", "n_ssm": None, "deterministic": True, "dt_min": math.exp(2), "dt_max": math.exp(2)}
    network = {"stem": "patch", "img_size": (30, 224, 224), **network}
    return convnext_s4nd(num_classes, mixer={"per_axis": (temporal, {}, {}), **(mixer or {})}, **network)


def convnext_s3d(num_classes: int, **network: Any) -> ConvNeXt:
    """ConvNeXt over video with factorised convolutions (S3D); `network` holds arguments of `ConvNeXt`."""
    parts = {"mixer": Convolution, "stem": PatchStem, "downsample": Downsample}
    factorised = {name: functools.partial(part, conv=FactorizedConv) for name, part in parts.items()}
    return ConvNeXt(num_classes, **factorised, **network)
