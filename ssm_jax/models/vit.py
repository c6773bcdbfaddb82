"""Vision transformers, with attention or S4ND (ViT, arXiv:2010.11929; DeiT, arXiv:2012.12877; S4ND, section 4.1).

    images -> patches, linearly -> class token first, + positions -> blocks -> LN -> class token -> classifier

S4ND knows positions by itself and needs no token to gather at: its network has neither, and classifies the mean.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, Stage, aggregate
from ssm_jax.layers.attention import Attention
from ssm_jax.layers.drop_path import DropPath, drop_path_rates
from ssm_jax.layers.images import check_images
from ssm_jax.layers.linear import normal_init, normal_linear, uniform_init
from ssm_jax.layers.mlp import MLP
from ssm_jax.layers.norm import LayerNorm
from ssm_jax.layers.position import resample_positions
from ssm_jax.layers.s4nd import S4ND
from ssm_jax.layers.stack import Stack


class Block(nnx.Module):
    """x + drop_path(mixer(LN(x))), and of that, x + drop_path(MLP(LN(x)))."""

    def __init__(
        self,
        d_model: int,
        *,
        mixer: Callable[..., nnx.Module],
        mlp_ratio: float,
        norm: Callable[..., nnx.Module],
        channel_attention: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds the block; `mixer(d_model, rngs=..., **dtypes)` makes its mixer, `channel_attention` what ends it."""
        self.norm1 = norm(d_model, **dtypes, rngs=rngs)
        self.mixer = mixer(d_model, **dtypes, rngs=rngs)
        self.norm2 = norm(d_model, **dtypes, rngs=rngs)
        self.mlp = MLP(d_model, int(mlp_ratio * d_model), **dtypes, rngs=rngs)
        self.se = None if channel_attention is None else channel_attention(d_model, **dtypes, rngs=rngs)
        self.drop_path = DropPath()

    def __call__(
        self, x: Float[Array, "b n d"], drop_path: float | Array, *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b n d"]:
        """Applies it, with each branch dropped at the rate `drop_path`."""
        x = x + self.drop_path(self.mixer(self.norm1(x), rate=rate, rngs=rngs), drop_path, rngs=rngs)
        y = self.mlp(self.norm2(x), rngs=rngs)
        if self.se is not None:
            y = self.se(y)
        return x + self.drop_path(y, drop_path, rngs=rngs)


class VisionTransformer(nnx.Module):
    """Patches as a sequence of tokens, equal residual blocks, classifier."""

    def __init__(
        self,
        num_classes: int,
        *,
        mixer: Callable[..., nnx.Module],
        img_size: int = 224,
        patch_size: int = 16,
        d_model: int = 768,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        distilled: bool = False,
        positions: bool = True,
        norm: Callable[..., nnx.Module] = LayerNorm,
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
        """Builds the network. Its defaults are ViT-B/16.

        Args:
            num_classes: number of logits.
            mixer: makes the mixer of a block, called as `mixer(d_model, dtype=..., param_dtype=..., rngs=...)`.
            img_size: height and width of the images that the positions are for; for others they are resampled.
            patch_size: height and width of a patch.
            d_model: width.
            depth: number of blocks.
            mlp_ratio: width within the blocks' MLPs / `d_model`.
            class_token: classify a token of its own, the first one, instead of the mean over all tokens.
            distilled: also a distillation token, the second, with a classifier for what a teacher says (DeiT).
            positions: add learned embeddings of positions.
            norm: makes the normalisations, called as the mixer.
            channel_attention: makes a module at the end of each MLP's branch, called as the mixer, such as
                `SqueezeExcite`.
            aggregation: makes what aggregates the layers, called as `aggregation(stage, ...)`, such as `S6LAToken`;
                None: each block sees the one before it alone.
            in_channels: channels of the images.
            drop_path: rate of stochastic depth at the last block, see `drop_path_rates`.
            remat: see `Stack`.
            scan: see `Stack`.
            dtype: dtype of matrix products and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.

        Raises:
            ValueError: for an impossible value, naming the argument.
        """
        for argument, value in [
            ("num_classes", num_classes),
            ("d_model", d_model),
            ("depth", depth),
            ("in_channels", in_channels),
        ]:
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}.")
        if mlp_ratio * d_model < 1:
            raise ValueError(f"mlp_ratio must leave a width of at least 1, got {mlp_ratio} times d_model={d_model}.")
        if distilled and not class_token:
            raise ValueError("distilled must be False without a class_token.")
        side = _side(img_size, patch_size)
        self.patch_size = patch_size
        self.grid = (side, side)
        (rates,) = drop_path_rates(drop_path, (depth,))
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}

        # Of the class token too, as in DeiT's own code (timm's starts it at 1e-6).
        def parameter(n: int) -> nnx.Param:
            return nnx.Param(normal_init(rngs.params(), (1, n, d_model), param_dtype))

        init = uniform_init(in_channels * patch_size**2)
        patch = (patch_size, patch_size)
        self.patch_embed = nnx.Conv(
            in_channels, d_model, patch, strides=patch, kernel_init=init, bias_init=init, **dtypes, rngs=rngs
        )
        self.cls_token = parameter(1) if class_token else None
        self.dist_token = parameter(1) if distilled else None
        n_tokens = class_token + distilled + side**2
        self.pos_embed = parameter(n_tokens) if positions else None
        block = functools.partial(
            Block,
            d_model,
            mixer=mixer,
            mlp_ratio=mlp_ratio,
            norm=norm,
            channel_attention=channel_attention,
            **dtypes,
            rngs=rngs,
        )
        blocks = [block() for _ in range(depth)]
        told = Stage(blocks, d_model, prefix=class_token + distilled)
        aggregates = aggregate(aggregation, told, **dtypes, rngs=rngs)
        self.blocks = Stack(blocks, drop_path=rates, aggregation=aggregates, remat=remat, scan=scan)
        self.norm = norm(d_model, **dtypes, rngs=rngs)
        width = d_model + self.blocks.head_channels
        self.head = normal_linear(width, num_classes, **dtypes, rngs=rngs)
        self.head_dist = normal_linear(width, num_classes, **dtypes, rngs=rngs) if distilled else None

    def _encode(self, images: Array, rate: float, rngs: nnx.Rngs | None) -> tuple[Array, Any, tuple[int, int]]:
        """The last block's tokens, the last state of the aggregation, and the numbers of patches (height, width)."""
        check_images(images, self.patch_embed.in_features, multiple=self.patch_size)
        x = self.patch_embed(images)
        b, h, w, d = x.shape
        prefix = [token[...] for token in (self.cls_token, self.dist_token) if token is not None]
        tokens = [jnp.broadcast_to(token.astype(x.dtype), (b, 1, d)) for token in prefix]
        x = jnp.concatenate([*tokens, x.reshape(b, h * w, d)], axis=1)
        if self.pos_embed is not None:
            x = x + resample_positions(self.pos_embed[...], self.grid, (h, w)).astype(x.dtype)
        size = {} if self.blocks.aggregation is None else {"size": (h, w)}
        return *self.blocks(x, rate=rate**2, **size, rngs=rngs), (h, w)

    def features(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b h2 w2 d"]]:
        """Returns the last block's map at 1 / `patch_size`, not normalised, without the tokens that are no patches."""
        x, _, (h, w) = self._encode(images, rate, rngs)
        return (x[:, -h * w :].reshape(-1, h, w, x.shape[-1]),)

    def heads(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b num_classes"], ...]:
        """Returns the logits of the classifier, and in a distilled network those of the distillation token's too."""
        x, h, _ = self._encode(images, rate, rngs)
        if self.cls_token is None:
            return (self.head(self.blocks.readout(self.norm(x).mean(axis=1), h)),)
        heads = (self.head,) if self.head_dist is None else (self.head, self.head_dist)
        x = self.norm(x[:, : len(heads)])
        return tuple(head(self.blocks.readout(x[:, i], h)) for i, head in enumerate(heads))

    def __call__(
        self, images: Float[Array, "b h w c"], *, rate: float = 1.0, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b num_classes"]:
        """Returns logits, in a distilled network the mean of its classifiers', see `heads`.

        `rate` = base resolution / resolution of these images. The mixers see a sequence, which is rate^2 times as
        short as at base resolution, and get rate^2 as theirs: then each row of patches starts at the same time of the
        sequence as its part of the image did at base resolution, and the sequences last equally long. Within a row,
        though, patches lie `rate` apart, not rate^2: no rate is right for both, so that this network is not
        independent of resolution as those of S4ND over two axes are. (The original never changes the rate.)
        """
        logits = self.heads(images, rate=rate, rngs=rngs)
        return sum(logits[1:], start=logits[0]) / len(logits)


def _side(img_size: int, patch_size: int) -> int:
    """Patches along one side of the images."""
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}.")
    if img_size < 1 or img_size % patch_size:
        raise ValueError(f"img_size must be a positive multiple of patch_size={patch_size}, got {img_size}.")
    return img_size // patch_size


def vit(num_classes: int, *, num_heads: int = 12, qkv_bias: bool = False, **network: Any) -> VisionTransformer:
    """ViT-B/16 as S4ND's baseline; `network` holds arguments of `VisionTransformer`."""
    attention = functools.partial(Attention, num_heads=num_heads, qkv_bias=qkv_bias)
    return VisionTransformer(num_classes, mixer=attention, **network)


def deit(num_classes: int, **network: Any) -> VisionTransformer:
    """DeiT, of the base size: ViT with biases of queries, keys and values; `network` holds arguments of `vit`."""
    return vit(num_classes, **{"qkv_bias": True, "norm": functools.partial(LayerNorm, epsilon=1e-6), **network})


def vit_s4nd(
    num_classes: int,
    *,
    mixer: Mapping[str, Any] | None = None,
    img_size: int = 224,
    patch_size: int = 16,
    **network: Any,
) -> VisionTransformer:
    """ViT-S4ND: S4ND over the sequence of patches, row by row.

    Args:
        num_classes: number of logits.
        mixer: arguments of `S4ND` other than these defaults: two low-rank kernels per feature from LegS, in both
            directions, as long as the sequence at `img_size`, N = 64, dt from 0.001 to 0.1.
        img_size: base resolution.
        patch_size: height and width of a patch.
        **network: arguments of `VisionTransformer`.
    """
    sequence = {"mode": "dplr", "channels": 2, "dt_min": 0.001, "dt_max": 0.1}
    sequence["l_max"] = _side(img_size, patch_size) ** 2
    return VisionTransformer(
        num_classes,
        mixer=functools.partial(_s4nd, **{**sequence, **(mixer or {})}),
        img_size=img_size,
        patch_size=patch_size,
        **{"class_token": False, "positions": False, **network},
    )


def _s4nd(d_model: int, *, rngs: nnx.Rngs, dtype: DTypeLike | None, param_dtype: DTypeLike, **options: Any) -> S4ND:
    """An S4ND layer whose output map starts as all linear maps of a transformer do."""
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    layer = S4ND(d_model, dims=1, **dtypes, rngs=rngs, **options)
    if layer.output is not None:
        layer.output = normal_linear(*layer.output.kernel.shape, **dtypes, rngs=rngs)
    return layer
