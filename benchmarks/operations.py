"""Parts of networks by XLA and by PyTorch: how much of a network's ratio is whose (see benchmarks/backbones.py)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.side_by_side import Passes, jax_passes


class Operation(NamedTuple):
    """One function by JAX and by PyTorch, and the shapes of its arguments, which are channels last."""

    by_jax: Callable[..., jax.Array]
    by_torch: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


def operations(batch: int) -> dict[str, Operation]:
    """What most of the networks' time goes into, at 224 x 224."""

    def gelu(x: Any) -> Any:
        from torch.nn.functional import gelu

        return gelu(x)

    product = functools.partial(Operation, jnp.matmul, lambda x, y: x @ y)
    return {
        "product, 1024 x 1024 x 1024": product(((1024, 1024),) * 2),
        "product, MLP of DeiT-S": product(((197 * batch, 384), (384, 1536))),
        "3 x 3, ResNet-50, stage 1": convolution((batch, 56, 56, 64), 3),
        "3 x 3, ResNet-50, stage 2": convolution((batch, 28, 28, 128), 3),
        "3 x 3, ResNet-50, stage 3": convolution((batch, 14, 14, 256), 3),
        "3 x 3, ResNet-50, stage 4": convolution((batch, 7, 7, 512), 3),
        "1 x 1, ResNet-50, stage 1": convolution((batch, 56, 56, 256), 1),
        "the same as a product": product(((batch * 56 * 56, 256), (256, 256))),
        "7 x 7 depthwise, ConvNeXt-T, stage 1": convolution((batch, 56, 56, 96), 7, groups=96),
        "7 x 7 depthwise, ConvNeXt-T, stage 3": convolution((batch, 14, 14, 384), 7, groups=384),
        "attention, DeiT-S": attention((batch, 197, 6, 64)),
        "LayerNorm, DeiT-S": layer_norm((batch, 197, 384)),
        "GELU, DeiT-S": Operation(functools.partial(nnx.gelu, approximate=False), gelu, ((batch, 197, 1536),)),
    }


def convolution(shape: tuple[int, ...], window: int, *, groups: int = 1) -> Operation:
    """That keeps the shape of its input."""

    def by_jax(x: jax.Array, kernel: jax.Array) -> jax.Array:
        options: Any = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)

    def by_torch(x: Any, kernel: Any) -> Any:
        from torch.nn.functional import conv2d

        x, kernel = x.movedim(-1, 1), kernel.movedim((-1, -2), (0, 1))
        return conv2d(x, kernel, padding=window // 2, groups=groups).movedim(1, -1)

    return Operation(by_jax, by_torch, (shape, (window, window, shape[-1] // groups, shape[-1])))


def attention(shape: tuple[int, ...]) -> Operation:
    """Of as many queries as keys, (batch, positions, heads, channels)."""

    def by_torch(*qkv: Any) -> Any:
        from torch.nn.functional import scaled_dot_product_attention

        return scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)

    return Operation(jax.nn.dot_product_attention, by_torch, (shape,) * 3)


def layer_norm(shape: tuple[int, ...]) -> Operation:
    """Over the channels, without parameters."""

    def by_jax(x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)

    def by_torch(x: Any) -> Any:
        from torch.nn.functional import layer_norm

        return layer_norm(x, x.shape[-1:])

    return Operation(by_jax, by_torch, (shape,))


def contestants(operation: Operation) -> dict[str, Passes]:
    """XLA and PyTorch, with the gradients of all arguments. Raises ValueError if their outputs differ."""
    import torch

    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in operation.shapes]
    device = torch_device()
    tensors = [torch.tensor(array, device=device, requires_grad=True) for array in arrays]

    def run(*, backward: bool) -> Any:
        with torch.set_grad_enabled(backward):
            y = operation.by_torch(*tensors)
            result = torch.autograd.grad(y.square().sum() / 2, tensors) if backward else y
        synchronize(device)
        return result

    ours = jax_passes(operation.by_jax, *map(jnp.asarray, arrays))
    y = np.asarray(ours.forward())
    error = np.abs(run(backward=False).cpu().numpy() - y).max() / np.abs(y).max()
    if not error < 1e-2:  # what TensorFloat-32 explains
        raise ValueError(f"PyTorch's is another function: outputs differ by {error:.1e} of the largest.")
    return {"XLA": ours, "PyTorch": Passes(lambda: run(backward=False), lambda: run(backward=True), lambda: 0)}


def torch_device() -> str:
    """Where PyTorch runs: on what JAX does."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def synchronize(device: str) -> None:
    """Waits for what PyTorch has begun on a device."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
