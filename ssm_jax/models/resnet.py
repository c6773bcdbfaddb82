"""Residual networks (He et al., 2016, arXiv:1512.03385), as timm and torchvision have them ("v1.5").

    images -> stem, 1/2 -> max pooling, 1/4 -> blocks -> blocks, 1/8 -> blocks, 1/16 -> blocks, 1/32
           -> mean over positions -> classifier

The first block of a stage halves the map, in its 3 x 3 convolution.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, Stage, aggregate
from ssm_jax.layers.conv import block_means, conv
from ssm_jax.layers.drop_path import DropPath, drop_path_rates
from ssm_jax.layers.images import check_images
from ssm_jax.layers.linear import linear
from ssm_jax.layers.norm import BatchNorm
from ssm_jax.layers.stack import Stack

stem_7x7 = functools.partial(conv, kernel_size=7, stride=2)
"""The stem of ImageNet networks."""

stem_3x3 = functools.partial(conv, kernel_size=3)
"""The stem of CIFAR networks."""


def stem_deep(in_channels: int, out_channels: int, *, rngs: nnx.Rngs, **dtypes: Any) -> nnx.Module:
    """ResNet-C's and -D's stem: three 3 x 3 convolutions instead of one of 7 x 7 (arXiv:1812.01187, section 4)."""
    if out_channels < 2:
        raise ValueError(f"stem_width must be at least 2 for a deep stem, got {out_channels}.")
    width = out_channels // 2
    return nnx.Sequential(
        conv(in_channels, width, 3, stride=2, **dtypes, rngs=rngs),
        BatchNorm(width, **dtypes, rngs=rngs),
        nnx.relu,
        conv(width, width, 3, **dtypes, rngs=rngs),
        BatchNorm(width, **dtypes, rngs=rngs),
        nnx.relu,
        conv(width, out_channels, 3, **dtypes, rngs=rngs),
    )


def projection(in_channels: int, out_channels: int, *, stride: int, rngs: nnx.Rngs, **dtypes: Any) -> nnx.Module:
    """The shortcut of a block that changes the shape: a 1 x 1 convolution with the block's stride."""
    return nnx.Sequential(
        conv(in_channels, out_channels, 1, stride=stride, **dtypes, rngs=rngs),
        BatchNorm(out_channels, **dtypes, rngs=rngs),
    )


def pooled_projection(in_channels: int, out_channels: int, *, stride: int, rngs: nnx.Rngs, **dtypes: Any) -> nnx.Module:
    """ResNet-D's shortcut: averages, where a 1 x 1 convolution with a stride leaves out three of four positions."""
    return nnx.Sequential(
        AveragePool(stride),
        conv(in_channels, out_channels, 1, **dtypes, rngs=rngs),
        BatchNorm(out_channels, **dtypes, rngs=rngs),
    )


class AveragePool(nnx.Module):
    """Means of stride x stride windows, stride 1 or 2; those at an odd end have only the positions there are."""

    def __init__(self, stride: int):
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Pools."""
        return block_means(x, self.stride)


class Residual(nnx.Module):
    """A block: ReLU(shortcut(x) + branch(x)). Its kinds, below, have the branch, which begins with `conv1`."""

    conv1: nnx.Conv

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        channel_attention: Callable[..., nnx.Module] | None = None,
        shortcut: Callable[..., nnx.Module] = projection,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds all but the branch.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output.
            stride: of the block.
            channel_attention: makes a module at the end of the branch, called as `channel_attention(out_channels,
                ...)`, such as `SqueezeExcite`.
            shortcut: makes the shortcut of a block that changes the shape, called as `shortcut(in_channels,
                out_channels, stride=..., ...)`: `projection` or `pooled_projection`.
            rngs: source of the `params` stream.
            dtypes: `dtype` of convolutions and activations, `param_dtype` of the parameters.
        """
        self.out_channels = out_channels
        self.se = None if channel_attention is None else channel_attention(out_channels, **dtypes, rngs=rngs)
        same = stride == 1 and in_channels == out_channels
        self.downsample = None if same else shortcut(in_channels, out_channels, stride=stride, **dtypes, rngs=rngs)
        self.drop_path = DropPath()

    def branch(self, x: Float[Array, "b h w c"], first: Callable[[Array], Array]) -> Float[Array, "b h2 w2 d"]:
        """What is added to the shortcut, with `first` as the first convolution."""
        raise NotImplementedError

    def residual(
        self,
        x: Float[Array, "b h w c"],
        drop_path: float | Float[Array, ""] = 0.0,
        *,
        first: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "b h2 w2 d"], Float[Array, "b h2 w2 d"]]:
        """The block's output and its branch's; `first` computes the branch's first convolution from x."""
        y = self.branch(x, first or self.conv1)
        if self.se is not None:
            y = self.se(y)
        identity = x if self.downsample is None else self.downsample(x)
        return nnx.relu(identity + self.drop_path(y, drop_path, rngs=rngs)), y

    def __call__(
        self, x: Float[Array, "b h w c"], drop_path: float | Float[Array, ""] = 0.0, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b h2 w2 d"]:
        """Applies the block; `drop_path` is the rate at which the branch is dropped."""
        return self.residual(x, drop_path, rngs=rngs)[0]


def _dtypes(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("dtype", "param_dtype") if name in options}


class BasicBlock(Residual):
    """Two 3 x 3 convolutions (ResNet-18 and 34)."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Builds the block; the output has `width` channels, all else is as in `Residual`."""
        super().__init__(in_channels, width, stride=stride, **options, rngs=rngs)
        dtypes = _dtypes(options)
        self.conv1 = conv(in_channels, width, 3, stride=stride, **dtypes, rngs=rngs)
        self.bn1 = BatchNorm(width, **dtypes, rngs=rngs)
        self.conv2 = conv(width, width, 3, **dtypes, rngs=rngs)
        self.bn2 = BatchNorm(width, scale_init=nnx.initializers.zeros, **dtypes, rngs=rngs)

    def branch(self, x: Float[Array, "b h w c"], first: Callable[[Array], Array]) -> Float[Array, "b h2 w2 d"]:
        """What is added to the shortcut, with `first` as the first convolution."""
        x = nnx.relu(self.bn1(first(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(Residual):
    """1 x 1 convolution to fewer channels, 3 x 3 convolution, 1 x 1 convolution to more channels."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        groups: int = 1,
        base_width: int = 64,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        """Builds the block; the output has 4 `width` channels.

        Args:
            in_channels: channels of the input.
            width: channels of the 3 x 3 convolution of a ResNet.
            stride: of the block, taken by the 3 x 3 convolution.
            groups: of that convolution, more than one in a ResNeXt (arXiv:1611.05431, where it is the cardinality).
            base_width: channels of a group where `width` is 64.
            rngs: source of the `params` stream.
            options: the others of `Residual`.

        Raises:
            ValueError: for fewer than one group, or none of a channel.
        """
        out_channels, inner = 4 * width, width * base_width // 64 * groups
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}.")
        if inner < 1:
            raise ValueError(f"base_width must be at least {-(-64 // width)} for width={width}, got {base_width}.")
        super().__init__(in_channels, out_channels, stride=stride, **options, rngs=rngs)
        dtypes = _dtypes(options)
        self.conv1 = conv(in_channels, inner, 1, **dtypes, rngs=rngs)
        self.bn1 = BatchNorm(inner, **dtypes, rngs=rngs)
        self.conv2 = conv(inner, inner, 3, stride=stride, groups=groups, **dtypes, rngs=rngs)
        self.bn2 = BatchNorm(inner, **dtypes, rngs=rngs)
        self.conv3 = conv(inner, out_channels, 1, **dtypes, rngs=rngs)
        self.bn3 = BatchNorm(out_channels, scale_init=nnx.initializers.zeros, **dtypes, rngs=rngs)

    def branch(self, x: Float[Array, "b h w c"], first: Callable[[Array], Array]) -> Float[Array, "b h2 w2 d"]:
        """What is added to the shortcut, with `first` as the first convolution."""
        x = nnx.relu(self.bn1(first(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ResNet(nnx.Module):
    """Stem, stages of residual blocks, mean over positions, classifier."""

    def __init__(
        self,
        num_classes: int,
        *,
        depths: Sequence[int],
        dims: Sequence[int] = (64, 128, 256, 512),
        block: Callable[..., nnx.Module] = Bottleneck,
        stem: Callable[..., nnx.Module] = stem_7x7,
        stem_width: int = 64,
        max_pool: bool = True,
        channel_attention: Callable[..., nnx.Module] | None = None,
        aggregation: Callable[..., Aggregation] | None = None,
        in_channels: int = 3,
        drop_path: float = 0.0,
        remat: str = "none",
        scan: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the network.

        Args:
            num_classes: number of logits.
            depths: number of blocks in each stage.
            dims: width of each stage's blocks.
            block: makes a block, called as `block(in_channels, width, stride=..., ...)`; it says its `out_channels`.
            stem: makes the first convolution, called as `stem(in_channels, stem_width, ...)`.
            stem_width: channels after the stem.
            max_pool: whether maxima of 3 x 3 windows at stride 2 come after the stem.
            channel_attention: see `Residual`.
            aggregation: makes what aggregates the layers of a stage, called as `aggregation(stage, ...)`, such as
                `S6LAConv`; None: each block sees the one before it alone.
            in_channels: channels of the images.
            drop_path: rate of stochastic depth at the last block; it grows from 0 at the first.
            remat: what the backward pass keeps of a block, see `Stack`.
            scan: run equal blocks as one loop, see `Stack`.
            dtype: dtype of convolutions and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for a number below 1, `depths` and `dims` of different lengths, or a rate outside [0, 1).
        """
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "stem_width": stem_width}
        for argument, value in sizes.items():
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        for argument, values in {"depths": depths, "dims": dims}.items():
            if not values or min(values) < 1:
                raise ValueError(f"{argument} must be numbers of at least 1, got {tuple(values)}.")
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims must be of the same stages, got {tuple(depths)} and {tuple(dims)}.")
        rates = drop_path_rates(drop_path, tuple(depths))
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.in_channels, self.max_pool = in_channels, max_pool
        self.conv1 = stem(in_channels, stem_width, **dtypes, rngs=rngs)
        self.bn1 = BatchNorm(stem_width, **dtypes, rngs=rngs)
        self.stages = nnx.List()
        if channel_attention is not None:
            block = functools.partial(block, channel_attention=channel_attention)
        channels, previous = stem_width, None
        for stage, (depth, width) in enumerate(zip(depths, dims, strict=True)):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(channels, width, stride=stride, **dtypes, rngs=rngs))
                channels = blocks[-1].out_channels
            told = Stage(blocks, channels, previous=previous, last=stage == len(depths) - 1)
            aggregates = aggregate(aggregation, told, **dtypes, rngs=rngs)
            self.stages.append(Stack(blocks, drop_path=rates[stage], aggregation=aggregates, remat=remat, scan=scan))
            previous = channels
        self.head = linear(channels + self.stages[-1].head_channels, num_classes, **dtypes, rngs=rngs)

    def stem(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 stem_width"]:
        """The map before max pooling."""
        check_images(images, self.in_channels)
        return nnx.relu(self.bn1(self.conv1(images)))

    def _encode(self, images: Array, rngs: nnx.Rngs | None) -> tuple[list[Array], Any]:
        """The maps after the stages, and the last state of the aggregation."""
        x = self.stem(images)
        if self.max_pool:
            x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore
        maps, h = [], None
        for stage in self.stages:
            x, h = stage(x, h, rngs=rngs)
            maps.append(x)
        return maps, h

    def features(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Returns the map after each stage. Convolutions have a fixed number of taps: `rate` changes nothing."""
        del rate
        return tuple(self._encode(images, rngs)[0])

    def __call__(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b num_classes"]:
        """Returns logits."""
        del rate
        maps, h = self._encode(images, rngs)
        return self.head(self.stages[-1].readout(maps[-1].mean((1, 2)), h))


def resnet_cifar(num_classes: int, *, depth: int = 56, **network: Any) -> ResNet:
    """The paper's network for 32 x 32 images (section 4.2), with bottlenecks: three stages and no pooling before them.

    `depth` counts the layers: 9 for each block of every stage and 2 for stem and classifier, hence 20, 56, 110 and so
    on; another number raises ValueError. `network` holds arguments of `ResNet`.
    """
    blocks = (depth - 2) // 9
    if blocks < 1 or depth != 9 * blocks + 2:
        near = sorted({9 * max(n, 1) + 2 for n in (blocks, blocks + 1)})
        raise ValueError(f"depth must be 9 n + 2, such as {' or '.join(map(str, near))}, got {depth}.")
    defaults = {"dims": (16, 32, 64), "stem": stem_3x3, "stem_width": 16, "max_pool": False}
    return ResNet(num_classes, depths=(blocks,) * 3, **defaults | network)
