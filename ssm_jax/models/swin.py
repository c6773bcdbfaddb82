"""Swin Transformer: attention within windows that shift from block to block (Liu et al., 2021, arXiv:2103.14030).

    images -> patches, 1/4 -> blocks -> merging, 1/8 -> blocks -> merging, 1/16 -> blocks -> merging, 1/32 -> blocks
           -> LN -> mean over positions -> classifier

1/4 is the height of a map over the images'. Attention costs the same per position on maps of any size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, Stage, aggregate
from ssm_jax.layers.drop_path import DropPath, drop_path_rates
from ssm_jax.layers.images import check_images
from ssm_jax.layers.linear import normal_init, normal_linear, uniform_init
from ssm_jax.layers.mlp import MLP
from ssm_jax.layers.norm import LayerNorm
from ssm_jax.layers.stack import Stack
from ssm_jax.ops.batch_local import batch_local
from ssm_jax.ops.dtypes import at_least_float32

Size = tuple[int, int]
"""Height and width, in positions of a map."""


def relative_position_index(window: Size) -> np.ndarray:
    """For each pair of positions of a window, the row of the bias table that belongs to their difference."""
    rows, columns = np.indices(window).reshape(2, -1)
    height, width = window
    down, right = rows[:, None] - rows, columns[:, None] - columns
    return (down + height - 1) * (2 * width - 1) + right + width - 1


def shift_mask(size: Size, window: Size, shift: Size) -> np.ndarray:
    """0 for each pair of positions that may see each other, -100 for the others: (windows, positions, positions).

    After a map of this `size`, a multiple of the window, is rolled up and left by `shift`, what left at one side is
    beside what was at the other; the two are neighbours in a window, but not in the image.
    """
    down, right = (np.arange(n) >= n - by for n, by in zip(size, shift, strict=True))
    region = 2 * down[:, None] + right
    region = _windows(region[None, :, :, None], window)[0, :, :, 0]
    return np.where(region[:, :, None] == region[:, None, :], 0.0, -100.0).astype(np.float32)


def resample_relative_positions(table: Array | np.ndarray, window: int | Size) -> np.ndarray:
    """A bias table ((2w-1)^2, heads) of square windows as one for another `window`, as in the authors' code.

    The differences of positions are points of a plane, interpolated by cubics (Keys, 1981, with a = -0.75) from one
    extent to the other. Raises ValueError for a table of another shape, or an empty window.
    """
    window = _pair("window", window)
    old = np.asarray(table)
    side = round(len(old) ** 0.5)
    if old.ndim != 2 or side**2 != len(old) or side % 2 == 0:
        raise ValueError(f"table must have shape ((2w-1)^2, heads), got {old.shape}.")
    down, right = (_cubic(side, 2 * n - 1) for n in window)
    new = np.einsum("ih,jw,hwc->ijc", down, right, old.reshape(side, side, -1))
    return new.reshape(-1, old.shape[1]).astype(old.dtype)


def _cubic(n: int, m: int, a: float = -0.75) -> np.ndarray:
    """The matrix (m, n) that interpolates n values at the centres of m equal cells; beyond the ends, values repeat."""
    position = (np.arange(m)[:, None] + 0.5) * n / m - 0.5
    taps = np.floor(position).astype(int) + np.arange(-1, 3)
    x = np.abs(position - taps)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    matrix = np.zeros((m, n))
    np.add.at(matrix, (np.arange(m)[:, None], taps.clip(0, n - 1)), np.where(x <= 1, near, far))
    return matrix


def _windows(x: Any, window: Size) -> Any:
    """A map (b, h, w, c) as windows (b, windows, positions, c)."""
    b, h, w, c = x.shape
    height, width = window
    x = x.reshape(b, h // height, height, w // width, width, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, -1, height * width, c)


def _map(x: Array, window: Size, size: Size) -> Array:
    """Windows as a map of this `size`: the inverse of `_windows`."""
    b, _, _, c = x.shape
    (h, w), (height, width) = size, window
    x = x.reshape(b, h // height, w // width, height, width, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h, w, c)


class WindowAttention(nnx.Module):
    """Attention among the positions of each window, with a learned bias for each difference of positions (eq. 4)."""

    def __init__(self, d_model: int, *, num_heads: int, window: Size, rngs: nnx.Rngs, **dtypes: Any):
        """Builds the linear maps and the table of biases."""
        self.num_heads = num_heads
        self.window = window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        table = normal_init(rngs.params(), (rows, num_heads), dtypes["param_dtype"])
        self.relative_position_bias_table = nnx.Param(table)
        self.qkv = normal_linear(d_model, 3 * d_model, **dtypes, rngs=rngs)
        self.proj = normal_linear(d_model, d_model, **dtypes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b windows positions c"], mask: np.ndarray | None = None
    ) -> Float[Array, "b windows positions c"]:
        """Attends; `mask` (windows, positions, positions), if given, is added to the logits of all heads."""
        # On each device by itself: what devices sum is then the gradient of the table, not that of the biases of all
        # windows, which are many times as large.
        attend = batch_local(functools.partial(self._attend, mask=mask))
        return self.proj(attend(self.qkv(x), self.relative_position_bias_table[...]))

    def _attend(self, qkv: Array, table: Array, mask: np.ndarray | None) -> Array:
        q, k, v = jnp.unstack(qkv.reshape(*qkv.shape[:-1], 3, self.num_heads, -1), axis=3)
        bias = jnp.moveaxis(table[relative_position_index(self.window)], -1, 0)[None]
        bias = bias.astype(at_least_float32(q.dtype))  # as the logits
        if mask is not None:
            bias = bias + jnp.asarray(mask[:, None], bias.dtype)
        # Over the batch by vmap: the bias of all windows is then shared by all images.
        attended = jax.vmap(functools.partial(jax.nn.dot_product_attention, bias=bias))(q, k, v)
        return attended.reshape(*attended.shape[:3], -1)


class Block(nnx.Module):
    """x + drop_path(attention(LN(x))), then the same with an MLP (eq. 3)."""

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        window: Size,
        shift: Size,
        mlp_ratio: float | int,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds the block; its windows are moved by `shift` against a grid that begins in the upper left corner."""
        self.norm1 = LayerNorm(d_model, **dtypes, rngs=rngs)
        self.attn = WindowAttention(d_model, num_heads=num_heads, window=window, **dtypes, rngs=rngs)
        self.norm2 = LayerNorm(d_model, **dtypes, rngs=rngs)
        self.mlp = MLP(d_model, int(d_model * mlp_ratio), **dtypes, rngs=rngs)
        self.drop_path = DropPath()
        self.window = window
        self.shift = shift

    def __call__(
        self, x: Float[Array, "b h w c"], drop_path: float | Array, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b h w c"]:
        """Applies it, with each branch dropped at the rate `drop_path`."""
        x = x + self.drop_path(self._attention(self.norm1(x)), drop_path, rngs=rngs)
        return x + self.drop_path(self.mlp(self.norm2(x)), drop_path, rngs=rngs)

    def _attention(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """In windows of the shifted map, which ends in zeros where it is no multiple of the window."""
        h, w = x.shape[1:3]
        down, right = (-n % step for n, step in zip((h, w), self.window, strict=True))
        size = h + down, w + right
        shifted = any(self.shift)
        if shifted:
            x = jnp.roll(x, (-self.shift[0], -self.shift[1]), axis=(1, 2))
        x = jnp.pad(x, [(0, 0), (0, down), (0, right), (0, 0)])
        mask = shift_mask(size, self.window, self.shift) if shifted else None
        x = _map(self.attn(_windows(x, self.window), mask), self.window, size)[:, :h, :w]
        return jnp.roll(x, self.shift, axis=(1, 2)) if shifted else x


class PatchEmbedding(nnx.Module):
    """Patches, linearly, and LN."""

    def __init__(self, in_channels: int, d_model: int, *, patch_size: int, rngs: nnx.Rngs, **dtypes: Any):
        """Builds the convolution, which starts as PyTorch's do."""
        patch = (patch_size, patch_size)
        init = uniform_init(in_channels * patch_size**2)
        self.proj = nnx.Conv(
            in_channels, d_model, patch, patch, padding="VALID", kernel_init=init, bias_init=init, **dtypes, rngs=rngs
        )
        self.norm = LayerNorm(d_model, **dtypes, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Applies it."""
        return self.norm(self.proj(images))


class PatchMerging(nnx.Module):
    """Each 2 x 2 positions as one of twice the channels."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs, **dtypes: Any):
        """Builds the norm and the linear map."""
        self.norm = LayerNorm(4 * d_model, **dtypes, rngs=rngs)
        self.reduction = normal_linear(4 * d_model, 2 * d_model, use_bias=False, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Applies it; a map of odd height or width ends in zeros."""
        x = jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)])
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 4, 2, 5)  # within four: down first, then right
        return self.reduction(self.norm(x.reshape(b, h // 2, w // 2, 4 * c)))


class SwinTransformer(nnx.Module):
    """Stages of blocks with plain and shifted windows in turn; widths double and maps halve from stage to stage."""

    def __init__(
        self,
        num_classes: int,
        *,
        depths: Sequence[int],
        num_heads: Sequence[int],
        d_model: int = 96,
        img_size: int | Size = 224,
        patch_size: int = 4,
        window_size: int = 7,
        mlp_ratio: float | int = 4.0,
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
            depths: blocks of each stage.
            num_heads: heads of each stage's attention.
            d_model: width of the first stage.
            img_size: height and width, or both, of the images that the windows are made for. Where a stage's map of
                them is not larger than a window, its window is the map and does not shift. Images of any other size
                go through the same windows.
            patch_size: height and width of a patch.
            window_size: height and width of a window.
            mlp_ratio: hidden width of an MLP / width.
            aggregation: makes what aggregates the layers of a stage, called as `aggregation(stage, ...)`, such as
                `S6LAToken`; None: each block sees the one before it alone.
            in_channels: channels of the images.
            drop_path: rate of stochastic depth at the last block. The paper has .2 (T), .3 (S) and .5 (B).
            remat: what the backward pass keeps, see `Stack`.
            scan: run pairs of blocks as loops, see `Stack`.
            dtype: dtype of matrix products and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for an impossible value.
        """
        depths, num_heads = tuple(depths), tuple(num_heads)
        img_size = _pair("img_size", img_size)
        numbers = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "d_model": d_model,
            "patch_size": patch_size,
            "window_size": window_size,
        }
        for argument, value in numbers.items():
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        if not depths or min(depths) < 1:
            raise ValueError(f"depths must be at least 1 for each stage, got {depths}.")
        widths = [d_model * 2**stage for stage in range(len(depths))]
        if len(num_heads) != len(depths) or any(n < 1 or d % n for n, d in zip(num_heads, widths, strict=True)):
            raise ValueError(f"num_heads must divide the stages' widths {tuple(widths)}, got {num_heads}.")
        if any(n % patch_size for n in img_size):
            raise ValueError(f"img_size must be a multiple of patch_size={patch_size}, got {img_size}.")
        if int(d_model * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must be at least 1 / d_model = 1 / {d_model}, got {mlp_ratio}.")
        rates_of_stages = drop_path_rates(drop_path, depths)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.patch_embed = PatchEmbedding(in_channels, d_model, patch_size=patch_size, **dtypes, rngs=rngs)
        self.downsamples = nnx.List(PatchMerging(width, **dtypes, rngs=rngs) for width in widths[:-1])
        self.stages = nnx.List()
        for stage, rates in enumerate(rates_of_stages):
            h, w = (-(-n // (patch_size * 2**stage)) for n in img_size)  # merging rounds up
            window = (min(window_size, h), min(window_size, w))
            shift = (window_size // 2 if h > window_size else 0, window_size // 2 if w > window_size else 0)
            block = functools.partial(
                Block,
                widths[stage],
                num_heads=num_heads[stage],
                window=window,
                mlp_ratio=mlp_ratio,
                **dtypes,
                rngs=rngs,
            )
            blocks = [block(shift=shift if number % 2 else (0, 0)) for number in range(depths[stage])]
            previous = widths[stage - 1] if stage else None
            told = Stage(blocks, widths[stage], previous=previous, last=stage == len(depths) - 1)
            aggregates = aggregate(aggregation, told, **dtypes, rngs=rngs)
            self.stages.append(Stack(blocks, drop_path=rates, aggregation=aggregates, remat=remat, scan=scan))
        self.norm = LayerNorm(widths[-1], **dtypes, rngs=rngs)
        self.head = normal_linear(widths[-1] + self.stages[-1].head_channels, num_classes, **dtypes, rngs=rngs)

    def _encode(self, images: Array, rngs: nnx.Rngs | None) -> tuple[list[Array], Any]:
        """The maps after the stages, and the last state of the aggregation."""
        check_images(images, self.in_channels, multiple=self.patch_size)
        x, h = self.stages[0](self.patch_embed(images), rngs=rngs)
        maps = [x]
        for downsample, stage in zip(self.downsamples, self.stages[1:], strict=True):
            x, h = stage(downsample(x), h, rngs=rngs)
            maps.append(x)
        return maps, h

    def features(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 d"], ...]:
        """The map after each stage: the first has 1/`patch_size` of the images' height and width, each next one half.

        Windows have a fixed number of positions, so `rate` changes nothing.
        """
        del rate
        return tuple(self._encode(images, rngs)[0])

    def __call__(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b num_classes"]:
        """Returns logits; `rngs` gives the `dropout` stream of stochastic depth."""
        del rate
        maps, h = self._encode(images, rngs)
        return self.head(self.stages[-1].readout(self.norm(maps[-1]).mean(axis=(1, 2)), h))


def _pair(argument: str, value: int | Size) -> Size:
    """Height and width; raises ValueError where one of them is less than 1."""
    height, width = (value, value) if isinstance(value, int) else value
    if min(height, width) < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}.")
    return height, width
