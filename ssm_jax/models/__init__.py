"""Networks by name."""

import difflib
import fnmatch
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ssm_jax.layers.mrla import MRLABase, MRLALight
from ssm_jax.layers.rla import RLA
from ssm_jax.layers.s6la import S6LAConv
from ssm_jax.layers.s6la_token import S6LAToken
from ssm_jax.models.aggregated import aggregated
from ssm_jax.models.convnext import ConvNeXt as ConvNeXt
from ssm_jax.models.convnext import convnext_3d_s4nd, convnext_s3d, convnext_s4nd
from ssm_jax.models.isotropic import Isotropic as Isotropic
from ssm_jax.models.isotropic import isotropic_conv2d, isotropic_s4nd
from ssm_jax.models.pvt_v2 import PVTv2 as PVTv2
from ssm_jax.models.resnet import BasicBlock, resnet_cifar
from ssm_jax.models.resnet import ResNet as ResNet
from ssm_jax.models.swin import SwinTransformer as SwinTransformer
from ssm_jax.models.vit import VisionTransformer as VisionTransformer
from ssm_jax.models.vit import deit, vit, vit_s4nd

_SMALL, _LARGE = (3, 3, 9, 3), (3, 3, 27, 3)  # depths of ConvNeXt
_PVT = (64, 128, 320, 512)  # widths but for B0
_MICRO = {"depths": (3, 3, 3, 3), "dims": (64, 128, 256, 512), "img_size": 160}

_MODELS: dict[str, tuple[Callable[..., nnx.Module], dict[str, Any]]] = {
    "convnext_micro": (ConvNeXt, _MICRO),
    "convnext_tiny": (ConvNeXt, {"depths": _SMALL, "dims": (96, 192, 384, 768)}),
    "convnext_small": (ConvNeXt, {"depths": _LARGE, "dims": (96, 192, 384, 768)}),
    "convnext_base": (ConvNeXt, {"depths": _LARGE, "dims": (128, 256, 512, 1024)}),
    "convnext_micro_s4nd": (convnext_s4nd, _MICRO | {"stem": "s4nd_patch", "downsample": "s4nd"}),
    "convnext_tiny_s4nd": (convnext_s4nd, {}),
    "convnext_tiny_i3d": (ConvNeXt, {"img_size": (30, 224, 224)}),
    "convnext_tiny_s3d": (convnext_s3d, {"img_size": (30, 224, 224)}),
    "convnext_tiny_3d_s4nd": (convnext_3d_s4nd, {}),
    "deit_tiny": (deit, {"d_model": 192, "num_heads": 3}),
    "deit_small": (deit, {"d_model": 384, "num_heads": 6}),
    "deit_base": (deit, {}),
    "deit_tiny_distilled": (deit, {"d_model": 192, "num_heads": 3, "distilled": True}),
    "deit_small_distilled": (deit, {"d_model": 384, "num_heads": 6, "distilled": True}),
    "deit_base_distilled": (deit, {"distilled": True}),
    "isotropic_conv2d": (isotropic_conv2d, {}),
    "isotropic_s4nd": (isotropic_s4nd, {}),
    "pvt_v2_b0": (PVTv2, {"depths": (2, 2, 2, 2), "dims": (32, 64, 160, 256)}),
    "pvt_v2_b1": (PVTv2, {"depths": (2, 2, 2, 2), "dims": _PVT}),
    "pvt_v2_b2": (PVTv2, {"depths": (3, 4, 6, 3), "dims": _PVT}),
    "pvt_v2_b2_li": (PVTv2, {"depths": (3, 4, 6, 3), "dims": _PVT, "linear": True}),
    "pvt_v2_b3": (PVTv2, {"depths": (3, 4, 18, 3), "dims": _PVT}),
    "pvt_v2_b4": (PVTv2, {"depths": (3, 8, 27, 3), "dims": _PVT}),
    "pvt_v2_b5": (PVTv2, {"depths": (3, 6, 40, 3), "dims": _PVT, "mlp_ratios": (4.0, 4.0, 4.0, 4.0)}),
    "resnet18": (ResNet, {"depths": (2, 2, 2, 2), "block": BasicBlock}),
    "resnet34": (ResNet, {"depths": (3, 4, 6, 3), "block": BasicBlock}),
    "resnet50": (ResNet, {"depths": (3, 4, 6, 3)}),
    "resnet101": (ResNet, {"depths": (3, 4, 23, 3)}),
    "resnet152": (ResNet, {"depths": (3, 8, 36, 3)}),
    "resnet_cifar": (resnet_cifar, {}),
    "swin_tiny": (SwinTransformer, {"depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}),
    "swin_small": (SwinTransformer, {"depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}),
    "swin_base": (SwinTransformer, {"d_model": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}),
    "vit_base": (vit, {}),
    "vit_base_s4nd": (vit_s4nd, {}),
}
"""What makes each network, and its arguments."""

_S6LA: dict[str, dict[str, Any]] = {"s6la": {"method": S6LAToken}}
_MRLA: dict[str, dict[str, Any]] = {"mrla_base": {"method": MRLABase}, "mrla_light": {"method": MRLALight}}
_GATES: dict[str, dict[str, Any]] = {name: {"channel_attention": name} for name in ("se", "eca")}

_METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet*": _GATES
    | _MRLA
    | {"cbam": {"channel_attention": "cbam"}, "rla": {"method": RLA}, "s6la": {"method": S6LAConv}},
    "deit_*": _GATES | _MRLA | _S6LA,
    "vit_*": _GATES | _MRLA | _S6LA,
    "swin_*": _MRLA | _S6LA,
    "pvt_v2_*": _MRLA | _S6LA,
    "convnext_*": _S6LA,
    "convnext_*[!d]": _MRLA,  # without those of videos
    "convnext_*[!d]_s4nd": _MRLA,
}
"""Arguments of `aggregated` that give a network's name another end, for the networks that match a pattern."""

_MODELS |= {
    f"{name}_{end}": (aggregated, {"backbone": make, **arguments, **method})
    for pattern, methods in _METHODS.items()
    for name, (make, arguments) in _MODELS.items()
    if fnmatch.fnmatch(name, pattern)
    for end, method in methods.items()
}


class _Stream(nnx.RngStream):
    """A stream of keys that counts them in Python.

    Flax counts in an array, which takes time that grows with the square of a network when it is built under a trace, as
    `nnx.eval_shape` and `jax.jit` do.
    """

    def __init__(self, key: jax.Array):
        super().__init__(key, tag="params")
        self.drawn = 0

    def __call__(self) -> jax.Array:
        self.drawn += 1
        return jax.random.fold_in(self.key[...], self.drawn)


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows and that match a shell pattern, such as `*s4nd*`."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def create_model(name: str, *, num_classes: int, rngs: nnx.Rngs, **overrides: Any) -> nnx.Module:
    """Builds a network by name; `overrides` are arguments of its constructor.

    Every network is called as `model(images, rate=..., rngs=...)`, channels last, and has `model.features(images)`, the
    maps after its stages.

    Raises ValueError for an unknown name (suggesting near ones), an unknown argument, or an impossible value.
    """
    if name not in _MODELS:
        shorter = [known for known in _MODELS if str(name).startswith(known)]  # of timm's, which end with sizes
        near = difflib.get_close_matches(str(name), _MODELS, n=3) or shorter
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "ssm_jax.list_models() lists all."
        raise ValueError(f"unknown model {name!r}; {hint}")
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(f"rngs must be an nnx.Rngs, such as nnx.Rngs(0), got {rngs!r}.")
    if not isinstance(num_classes, int) or isinstance(num_classes, bool):
        raise ValueError(f"num_classes must be a whole number, got {num_classes!r}.")
    make, arguments = _MODELS[name]
    stream: Any = nnx.Rngs(0)
    stream.params = _Stream(rngs.params())
    try:
        return make(num_classes, **arguments | overrides, rngs=stream)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"model {name!r}: {error}") from error
