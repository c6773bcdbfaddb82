"""PVTv2: a pyramid of transformers whose keys and values are few (Wang et al., 2022, arXiv:2106.13797).

    images -> patches, 1/4 -> blocks -> LN -> patches, 1/8 -> blocks -> LN -> patches, 1/16 -> ... 1/32 -> blocks -> LN
           -> mean over positions -> classifier

1/4 is the height of a map over the images'. Nothing marks positions: the convolutions see them by the padding.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, Stage, aggregate
from ssm_jax.layers.conv import Depthwise
from ssm_jax.layers.drop_path import DropPath, drop_path_rates
from ssm_jax.layers.images import check_images
from ssm_jax.layers.linear import normal_linear
from ssm_jax.layers.norm import LayerNorm
from ssm_jax.layers.stack import Stack

POOLED = 7  # height and width of the map of keys and values of linear attention

Norm = functools.partial(LayerNorm, epsilon=1e-6)  # between the blocks; patches and keys are normalised with 1e-5


def conv(in_features: int, out_features: int, size: int, **options: Any) -> nnx.Conv:
    """A `size` x `size` convolution that starts as the original's: weights N(0, 2 / fan_out), biases 0."""
    init = jax.nn.initializers.normal(math.sqrt(2 / (size**2 * out_features)))
    return nnx.Conv(in_features, out_features, (size, size), kernel_init=init, **options)


def adaptive_mean(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b h2 w2 c"]:
    """Means over a grid of `size` cells that cover the map, also one that has fewer positions than cells.

    As in PyTorch, each cell reaches outwards to whole positions: cells overlap where `size` does not divide the map's.
    """
    down, right = (_mean_matrix(n, m) for n, m in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("ih,jw,bhwc->bijc", jnp.asarray(down, x.dtype), jnp.asarray(right, x.dtype), x)


def _mean_matrix(n: int, m: int) -> np.ndarray:
    """Rows that average n values over each of m cells, [floor(i n / m), ceil((i + 1) n / m)): (m, n)."""
    cell, position = np.arange(m)[:, None], np.arange(n)
    inside = (position >= cell * n // m) & (position < -(-(cell + 1) * n // m))
    return inside / inside.sum(axis=1, keepdims=True)


class Attention(nnx.Module):
    """Attention of all positions to the summaries of patches (section 3.2; `linear`: section 3.3)."""

    def __init__(self, d_model: int, *, num_heads: int, sr_ratio: int, linear: bool, rngs: nnx.Rngs, **dtypes: Any):
        """Builds it; keys and values are those of `sr_ratio` x `sr_ratio` positions each, or of 7 x 7 if `linear`."""
        self.num_heads = num_heads
        self.linear = linear
        self.q = normal_linear(d_model, d_model, **dtypes, rngs=rngs)
        self.kv = normal_linear(d_model, 2 * d_model, **dtypes, rngs=rngs)
        self.proj = normal_linear(d_model, d_model, **dtypes, rngs=rngs)
        self.reduced = linear or sr_ratio > 1
        if self.reduced:
            step = 1 if linear else sr_ratio
            self.sr = conv(d_model, d_model, step, strides=step, padding="VALID", **dtypes, rngs=rngs)
            self.norm = LayerNorm(d_model, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Attends."""
        b, _, _, c = x.shape
        kv = self.kv(self._summaries(x)).reshape(b, -1, 2, self.num_heads, c // self.num_heads)
        q = self.q(x).reshape(b, -1, *kv.shape[3:])
        y = jax.nn.dot_product_attention(q, kv[:, :, 0], kv[:, :, 1])
        return self.proj(y.reshape(x.shape))

    def _summaries(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """What the keys and values are computed from."""
        if not self.reduced:
            return x
        if self.linear:
            return nnx.gelu(self.norm(self.sr(adaptive_mean(x, (POOLED, POOLED)))), approximate=False)
        return self.norm(self.sr(x))


class ConvMLP(nnx.Module):
    """An MLP with a depthwise 3 x 3 convolution before its activation: where positions are known from (section 3.2)."""

    def __init__(self, d_model: int, hidden: int, *, linear: bool, rngs: nnx.Rngs, **dtypes: Any):
        """Builds it; with `linear` attention, there is a ReLU before the convolution."""
        self.fc1 = normal_linear(d_model, hidden, **dtypes, rngs=rngs)
        init = jax.nn.initializers.normal(math.sqrt(2 / 9))  # as `conv`'s, of fan_out 9
        self.dwconv = Depthwise(hidden, 3, kernel_init=init, **dtypes, rngs=rngs)
        self.fc2 = normal_linear(hidden, d_model, **dtypes, rngs=rngs)
        self.linear = linear

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies it."""
        x = self.fc1(x)
        x = nnx.relu(x) if self.linear else x
        return self.fc2(nnx.gelu(self.dwconv(x), approximate=False))


class Block(nnx.Module):
    """x + drop_path(attention(LN(x))), then the same with an MLP."""

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        sr_ratio: int,
        mlp_ratio: float | int,
        linear: bool,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds the block."""
        self.norm1 = Norm(d_model, **dtypes, rngs=rngs)
        self.attn = Attention(d_model, num_heads=num_heads, sr_ratio=sr_ratio, linear=linear, **dtypes, rngs=rngs)
        self.norm2 = Norm(d_model, **dtypes, rngs=rngs)
        self.mlp = ConvMLP(d_model, int(d_model * mlp_ratio), linear=linear, **dtypes, rngs=rngs)
        self.drop_path = DropPath()

    def __call__(
        self, x: Float[Array, "b h w c"], drop_path: float | Array, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b h w c"]:
        """Applies it, with each branch dropped at the rate `drop_path`."""
        x = x + self.drop_path(self.attn(self.norm1(x)), drop_path, rngs=rngs)
        return x + self.drop_path(self.mlp(self.norm2(x)), drop_path, rngs=rngs)


class PatchEmbedding(nnx.Module):
    """Overlapping patches, linearly, and LN: 7 x 7 every 4 pixels, 3 x 3 every 2 positions of a map."""

    def __init__(self, in_channels: int, d_model: int, *, patch_size: int, rngs: nnx.Rngs, **dtypes: Any):
        """Builds the convolution, which moves by half a patch."""
        step, margin = (patch_size + 1) // 2, (patch_size // 2, patch_size // 2)
        padding = (margin, margin)
        self.proj = conv(in_channels, d_model, patch_size, strides=step, padding=padding, **dtypes, rngs=rngs)
        self.norm = LayerNorm(d_model, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Applies it."""
        return self.norm(self.proj(x))


class PVTv2(nnx.Module):
    """Stages of blocks on overlapping patches of the stage before."""

    def __init__(
        self,
        num_classes: int,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float | int] = (8.0, 8.0, 4.0, 4.0),
        linear: bool = False,
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
            dims: width of each stage.
            depths: blocks of each stage.
            num_heads: heads of each stage's attention. The defaults of it and the ratios are those of all variants,
                but for the MLPs of B5.
            sr_ratios: height and width of the patches that share a key and a value, for each stage.
            mlp_ratios: hidden width of an MLP / width, for each stage.
            linear: keys and values of 7 x 7 averages instead (PVTv2-Li), whatever `sr_ratios` says: attention then
                costs as much per position on maps of any size.
            aggregation: makes what aggregates the layers of a stage, called as `aggregation(stage, ...)`, such as
                `S6LAToken`; None: each block sees the one before it alone.
            in_channels: channels of the images.
            drop_path: rate of stochastic depth at the last block.
            remat: what the backward pass keeps, see `Stack`.
            scan: run equal blocks as loops, see `Stack`.
            dtype: dtype of matrix products and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for an impossible value.
        """
        dims, depths, num_heads, sr_ratios = tuple(dims), tuple(depths), tuple(num_heads), tuple(sr_ratios)
        mlp_ratios = tuple(mlp_ratios)
        for argument, value in [("num_classes", num_classes), ("in_channels", in_channels)]:
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        by_stage = {"dims": dims, "depths": depths, "num_heads": num_heads, "sr_ratios": sr_ratios}
        for argument, values in by_stage.items():
            if len(values) != len(dims) or not values or min(values) < 1:
                raise ValueError(f"{argument} must be at least 1 for each of {len(dims)} stages, got {values}.")
        if any(d % n for d, n in zip(dims, num_heads, strict=True)):
            raise ValueError(f"num_heads must divide dims={dims}, got {num_heads}.")
        if len(mlp_ratios) != len(dims) or any(int(d * r) < 1 for d, r in zip(dims, mlp_ratios, strict=True)):
            raise ValueError(f"mlp_ratios must be at least 1 / width for each of dims={dims}, got {mlp_ratios}.")
        rates_of_stages = drop_path_rates(drop_path, depths)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.in_channels = in_channels
        # A map of the stage, images / (4 * 2^stage) rounded up, has at least one patch.
        self.smallest = 1 if linear else max(4 * 2**stage * (ratio - 1) + 1 for stage, ratio in enumerate(sr_ratios))
        self.downsamples, self.stages, self.norms = nnx.List(), nnx.List(), nnx.List()
        for stage, d_model in enumerate(dims):
            d_in, patch_size = (dims[stage - 1], 3) if stage else (in_channels, 7)
            self.downsamples.append(PatchEmbedding(d_in, d_model, patch_size=patch_size, **dtypes, rngs=rngs))
            block = functools.partial(
                Block,
                d_model,
                num_heads=num_heads[stage],
                sr_ratio=sr_ratios[stage],
                mlp_ratio=mlp_ratios[stage],
                linear=linear,
                **dtypes,
                rngs=rngs,
            )
            blocks = [block() for _ in range(depths[stage])]
            told = Stage(blocks, d_model, previous=dims[stage - 1] if stage else None, last=stage == len(depths) - 1)
            aggregates = aggregate(aggregation, told, **dtypes, rngs=rngs)
            rates = rates_of_stages[stage]
            self.stages.append(Stack(blocks, drop_path=rates, aggregation=aggregates, remat=remat, scan=scan))
            self.norms.append(Norm(d_model, **dtypes, rngs=rngs))
        self.head = normal_linear(dims[-1] + self.stages[-1].head_channels, num_classes, **dtypes, rngs=rngs)

    def _encode(self, images: Array, rngs: nnx.Rngs | None) -> tuple[list[Array], Any]:
        """The maps after the stages' norms, and the last state of the aggregation."""
        check_images(images, self.in_channels, least=self.smallest)
        x, h, maps = images, None, []
        for downsample, stage, norm in zip(self.downsamples, self.stages, self.norms, strict=True):
            x, h = stage(downsample(x), h, rngs=rngs)
            x = norm(x)
            maps.append(x)
        return maps, h

    def features(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 d"], ...]:
        """The map after each stage's norm: 1/4 of the images' height and width, 1/8, 1/16, ..., rounded up.

        Patches have a fixed number of positions, so `rate` changes nothing.
        """
        del rate
        return tuple(self._encode(images, rngs)[0])

    def __call__(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b num_classes"]:
        """Returns logits; `rngs` gives the `dropout` stream of stochastic depth."""
        del rate
        maps, h = self._encode(images, rngs)
        return self.head(self.stages[-1].readout(maps[-1].mean(axis=(1, 2)), h))
