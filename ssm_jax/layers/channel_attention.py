"""Attention to channels: a gate for each, from the average of the map. Put at the end of a residual branch."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.conv import conv
from ssm_jax.layers.linear import uniform_init
from ssm_jax.layers.norm import BatchNorm


def _hidden(channels: int, reduction: int, divisor: int) -> int:
    """`channels` / `reduction`, rounded to a multiple of `divisor`, at least one of them."""
    for argument, value in [("channels", channels), ("reduction", reduction), ("divisor", divisor)]:
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}.")
    return max(int(channels / reduction + divisor / 2) // divisor, 1) * divisor


def _pooled(x: Float[Array, "b *axes c"]) -> Float[Array, "b c"]:
    """The mean over all axes but the first and the last."""
    return x.mean(tuple(range(1, x.ndim - 1)))


def _over(gates: Float[Array, "b c"], x: Float[Array, "b *axes c"]) -> Float[Array, "b *ones c"]:
    """`gates` with the axes of `x`."""
    return gates.reshape(gates.shape[0], *(1,) * (x.ndim - 2), -1)


def _maximum(x: Float[Array, "*_"], axis: int) -> Float[Array, "*_"]:
    """The maximum along an axis, which is kept; its gradient goes to the first position that has it.

    The gradient of `jnp.max` compares x with its maximum, and is 0 / 0 where XLA has computed x twice with different
    rounding, once for the maximum and once for the comparison.
    """
    position = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    first = jax.lax.argmax(x, axis, jnp.int32)
    return jnp.where(position == jnp.expand_dims(first, axis), x, jnp.zeros_like(x)).sum(axis, keepdims=True)


class SqueezeExcite(nnx.Module):
    """x sigmoid(W_2 ReLU(W_1 mean(x))) (Hu et al., 2018, arXiv:1709.01507)."""

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        divisor: int = 1,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds both maps.

        Args:
            channels: of the map.
            reduction: how many times fewer channels there are between the maps.
            divisor: of that number of channels.
            use_bias: whether the maps have biases. timm's have, with `divisor=8`.
            dtype: dtype of matrix products and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.
        """
        hidden = _hidden(channels, reduction, divisor)
        options = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype}
        self.fc1 = conv(channels, hidden, 1, bias_init=uniform_init(channels), **options, rngs=rngs)
        self.fc2 = conv(hidden, channels, 1, bias_init=uniform_init(hidden), **options, rngs=rngs)

    def __call__(self, x: Float[Array, "b *axes c"]) -> Float[Array, "b *axes c"]:
        """Scales the channels of a map or of tokens."""
        pooled = _pooled(x)[:, None, None]
        return x * _over(jax.nn.sigmoid(self.fc2(nnx.relu(self.fc1(pooled))))[:, 0, 0], x)


class ECA(nnx.Module):
    """x sigmoid(k * mean(x)), * a convolution along the channels (Wang et al., 2020, arXiv:1910.03151)."""

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the convolution.

        Args:
            channels: of the map.
            kernel_size: odd number of channels that decide on one; None: by the paper's equation 12, at least 3.
            dtype: dtype of the convolution.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for a `kernel_size` that is not odd, or without channels.
        """
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}.")
        if kernel_size is None:
            kernel_size = max(int((math.log2(channels) + 1) / 2) // 2 * 2 + 1, 3)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        self.conv = nnx.Conv(
            1,
            1,
            (kernel_size,),
            padding=((kernel_size // 2, kernel_size // 2),),
            use_bias=False,
            kernel_init=uniform_init(kernel_size),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b *axes c"]) -> Float[Array, "b *axes c"]:
        """Scales the channels of a map or of tokens."""
        return x * _over(jax.nn.sigmoid(self.conv(_pooled(x)[..., None]))[..., 0], x)


class CBAM(nnx.Module):
    """Attention to channels, then to positions (Woo et al., 2018, arXiv:1807.06521)."""

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        kernel_size: int = 7,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds both parts.

        Args:
            channels: of the map.
            reduction: how many times fewer channels there are between the maps of the channel attention.
            kernel_size: of the spatial attention's convolution.
            dtype: dtype of matrix products and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.
        """
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.channel = ChannelAttention(channels, reduction=reduction, **dtypes, rngs=rngs)
        self.spatial = SpatialAttention(kernel_size, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b *axes c"]) -> Float[Array, "b *axes c"]:
        """Scales the channels, then the positions. Raises ValueError for what is not a map."""
        if x.ndim != 4:
            raise ValueError(f"CBAM needs maps (batch, height, width, channels), got shape {x.shape}.")
        return self.spatial(self.channel(x))


class ChannelAttention(nnx.Module):
    """x sigmoid(MLP(mean(x)) + MLP(max(x))), mean and maximum over positions, one MLP without biases for both."""

    def __init__(
        self, channels: int, *, reduction: int, dtype: DTypeLike | None, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        """Builds the two maps of the MLP."""
        hidden = _hidden(channels, reduction, 1)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.fc1 = conv(channels, hidden, 1, **dtypes, rngs=rngs)
        self.fc2 = conv(hidden, channels, 1, **dtypes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Scales the channels."""
        positions = x.reshape(x.shape[0], 1, -1, x.shape[-1])
        pooled = [positions.mean(2, keepdims=True), _maximum(positions, 2)]
        mean, maximum = (self.fc2(nnx.relu(self.fc1(channels))) for channels in pooled)
        return x * jax.nn.sigmoid(mean + maximum)


class SpatialAttention(nnx.Module):
    """x sigmoid(BN(k * [mean(x), max(x)])), mean and maximum over channels."""

    def __init__(self, kernel_size: int, *, dtype: DTypeLike | None, param_dtype: DTypeLike, rngs: nnx.Rngs):
        """Builds the convolution from two channels to one."""
        self.conv = conv(2, 1, kernel_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.bn = BatchNorm(1, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Scales the positions."""
        pooled = jnp.concatenate([x.mean(-1, keepdims=True), _maximum(x, x.ndim - 1)], axis=-1)
        return x * jax.nn.sigmoid(self.bn(self.conv(pooled)))
