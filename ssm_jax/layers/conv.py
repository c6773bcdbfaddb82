"""Convolutions and averages of residual networks."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ssm_jax.ops.backend import target_backend


class Pointwise(nnx.Conv):
    """A 1 x 1 convolution; on CPUs as the product that it is, for whose gradient XLA does not transpose maps.

    `python -m benchmarks.backbones` has both. By XLA's estimate, ResNet-50 as products is slower on a TPU.
    """

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Multiplies what the stride leaves of `x`."""
        if target_backend() != "cpu":
            return super().__call__(x)
        rows, columns = np.broadcast_to(np.asarray(self.strides), 2).tolist()
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x[:, ::rows, ::columns], self.kernel[0, 0], bias), dtype=self.dtype)
        y = x @ kernel
        return y if bias is None else y + bias[None, None, None]


PRODUCTS = "shifted_products"
"""The scope of multiplications that are a convolution's, for `ssm_jax.summary`, which counts them."""


class Depthwise(nnx.Conv):
    """A depthwise k x k convolution of stride 1, same size; on CPUs as a sum of shifted products, which XLA fuses.

    XLA's grouped convolution takes 15 times as long there, and 2 to 33 times with gradients: `python -m
    benchmarks.depthwise`.
    """

    def __init__(self, features: int, kernel_size: int, **options: Any):
        """Builds it; `options` are those of `nnx.Conv`. Raises ValueError for an even `kernel_size`."""
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        super().__init__(features, features, (kernel_size, kernel_size), feature_group_count=features, **options)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Convolves."""
        if target_backend() != "cpu":
            return super().__call__(x)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        (h, w), size = x.shape[1:3], len(kernel)
        padded = jnp.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
        places = itertools.product(range(size), repeat=2)
        with jax.named_scope(PRODUCTS):
            taps = [padded[:, i : i + h, j : j + w] * kernel[i, j, None, None] for i, j in places]
        y = functools.reduce(jnp.add, taps)
        return y if bias is None else y + bias[None, None, None]


kaiming_normal = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""Keeps the size of gradients through convolution and ReLU (He et al., 2015, arXiv:1502.01852, section 2.2)."""


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    rngs: nnx.Rngs,
    **options: Any,
) -> nnx.Conv:
    """A k x k convolution, padded by k // 2 on all sides as in PyTorch: at stride 1 the map keeps its size.

    `options` are those of `nnx.Conv`, such as `dtype` and `bias_init`. Raises ValueError for an even `kernel_size`.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
    kind = Pointwise if kernel_size == groups == 1 else nnx.Conv
    # Not "SAME", which pads a strided convolution less at the start than at the end.
    return kind(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding=((kernel_size // 2, kernel_size // 2),) * 2,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kaiming_normal,
        rngs=rngs,
        **options,
    )


def block_means(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b h2 w2 c"]:
    """Means over blocks of side x side positions, 1 or 2; those at an odd end have only the positions there are."""
    down, right = -x.shape[1] % side, -x.shape[2] % side
    if down or right:  # the gradient of padding by nothing takes memory too
        x = jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0)), mode="edge")  # the mean of a row and its copy is it
    b, h, w, c = x.shape
    return x.reshape(b, h // side, side, w // side, side, c).mean((2, 4))
