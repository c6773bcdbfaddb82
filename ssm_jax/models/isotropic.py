"""Isotropic networks: one resolution and width from end to end (S4ND, section 4.3, for CIFAR-10)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.conv import Depthwise
from ssm_jax.layers.images import check_images
from ssm_jax.layers.linear import linear, uniform_init
from ssm_jax.layers.norm import LayerNorm
from ssm_jax.layers.s4nd import S4ND


class ConvMixer2D(nnx.Module):
    """The baseline's mixer: depthwise k x k convolution, GELU, dropout, 1 x 1 convolution."""

    def __init__(
        self,
        d_model: int,
        *,
        kernel_size: int = 3,
        dropout: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds both convolutions; raises ValueError for an even `kernel_size`."""
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        init = uniform_init(kernel_size**2)
        self.conv = Depthwise(d_model, kernel_size, kernel_init=init, bias_init=init, **dtypes, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2))
        self.output = linear(d_model, d_model, **dtypes, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b h w c"]:
        """Applies the convolutions. They have a fixed number of taps, so `rate` changes nothing."""
        del rate
        return self.output(self.dropout(nnx.gelu(self.conv(x), approximate=False), rngs=rngs))


class Block(nnx.Module):
    """A pre-norm residual block without feed-forward part, as the mixer's output map mixes the channels."""

    def __init__(
        self, d_model: int, *, mixer: Callable[..., nnx.Module], dropout: float, rngs: nnx.Rngs, **dtypes: Any
    ):
        """Builds the block; `mixer(d_model, dropout=..., rngs=..., **dtypes)` makes its mixer."""
        self.norm = LayerNorm(d_model, **dtypes, rngs=rngs)
        self.mixer = mixer(d_model, dropout=dropout, **dtypes, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2))  # drops a channel as a whole

    def __call__(
        self, x: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b h w c"]:
        """Computes x + dropout(mixer(LN(x)))."""
        return x + self.dropout(self.mixer(self.norm(x), rate=rate, rngs=rngs), rngs=rngs)


class Isotropic(nnx.Module):
    """Pixel-wise encoder, equal residual blocks at full resolution, mean over positions, classifier."""

    def __init__(
        self,
        num_classes: int,
        *,
        mixer: Callable[..., nnx.Module],
        in_channels: int = 3,
        d_model: int = 512,
        n_layers: int = 8,
        dropout: float = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the network.

        Args:
            num_classes: number of logits.
            mixer: makes the mixer of a block, called as `mixer(d_model, dropout=..., dtype=..., ...)`.
            in_channels: channels of the images.
            d_model: width. The defaults of width, depth and dropout are those of the paper's CIFAR-10 network.
            n_layers: number of blocks.
            dropout: rate of dropout in and after each mixer.
            dtype: dtype of matrix products and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.
        """
        for argument, value in [("num_classes", num_classes), ("d_model", d_model), ("n_layers", n_layers)]:
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.encoder = linear(in_channels, d_model, **dtypes, rngs=rngs)
        self.blocks = nnx.List(
            Block(d_model, mixer=mixer, dropout=dropout, **dtypes, rngs=rngs) for _ in range(n_layers)
        )
        self.norm = LayerNorm(d_model, **dtypes, rngs=rngs)
        self.head = linear(d_model, num_classes, **dtypes, rngs=rngs)

    def features(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h w d"]]:
        """The map after all blocks, at the images' own resolution."""
        check_images(images, self.encoder.in_features)
        x = self.encoder(images)
        for block in self.blocks:
            x = block(x, rate=rate, rngs=rngs)
        return (x,)

    def __call__(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b num_classes"]:
        """Returns logits. `rate` = base resolution / resolution of these images goes to every mixer."""
        (x,) = self.features(images, rate=rate, rngs=rngs)
        return self.head(self.norm(x).mean(axis=(1, 2)))


def isotropic_s4nd(num_classes: int, *, mixer: Mapping[str, Any] | None = None, **network: Any) -> Isotropic:
    """S4ND-ISO; `mixer` holds arguments of `S4ND`, `network` those of `Isotropic`."""
    return Isotropic(num_classes, mixer=functools.partial(S4ND, dims=2, **(mixer or {})), **network)


def isotropic_conv2d(num_classes: int, *, mixer: Mapping[str, Any] | None = None, **network: Any) -> Isotropic:
    """Conv2D-ISO, the paper's baseline; `mixer` holds arguments of `ConvMixer2D`, `network` those of `Isotropic`."""
    return Isotropic(num_classes, mixer=functools.partial(ConvMixer2D, **(mixer or {})), **network)
