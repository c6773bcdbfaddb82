"""The branch for masks of Mask R-CNN (He et al., 2017, arXiv:1703.06870), as torchvision has it.

    box -> RoIAlign, 14 x 14 -> 3 x 3 convolutions -> twice as fine -> for each cell, the logit of being in the object

There is a mask for every class, of which only that of the object's class is computed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ssm_jax.detection.faster_rcnn import Samples
from ssm_jax.detection.fpn import ConvNorm
from ssm_jax.detection.masks import mask_targets
from ssm_jax.detection.selection import of_images
from ssm_jax.detection.structures import Objects
from ssm_jax.layers.conv import kaiming_normal


class Doubled(nnx.Module):
    """A transposed 2 x 2 convolution of stride 2: each position becomes 2 x 2 ones, by a linear map each."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        """Builds the four maps, and their bias."""
        self.kernel = nnx.Param(kaiming_normal(rngs.params(), (2, 2, in_channels, out_channels), param_dtype))
        self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 d"]:
        """Applies them."""
        n, h, w, _ = x.shape
        x = x.astype(self.dtype or x.dtype)
        y = jnp.einsum("nhwc,uvcd->nhuwvd", x, self.kernel[...].astype(x.dtype))
        y = y + self.bias[...].astype(x.dtype)[(None,) * 5]
        return y.reshape(n, 2 * h, 2 * w, -1)


class MaskBranch(nnx.Module):
    """Finds the mask in a box whose class is known."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        size: int = 14,
        widths: Sequence[int] = (256, 256, 256, 256),
        width: int = 256,
        norm: Callable[..., nnx.Module] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the head; the defaults are torchvision's.

        Args:
            channels: of the pyramid's maps.
            num_classes: number of classes of objects.
            size: positions of a box's map in height and width; its mask has twice as many.
            widths: channels after each of the convolutions.
            width: channels of the finer map.
            norm: makes batch norms after the convolutions, called as `norm(width, ...)`, if there are some.
            dtype: dtype of convolutions and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.
        """
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.convs = nnx.List(
            ConvNorm(c, d, norm=norm, kernel_init=kaiming_normal, **options)
            for c, d in zip((channels, *widths), widths, strict=False)
        )
        self.doubled = Doubled(widths[-1], width, **options)
        self.output = nnx.Conv(width, num_classes + 1, (1, 1), kernel_init=kaiming_normal, **options)
        self.size = size

    def logits(
        self, features: Float[Array, "b n s s c"], classes: Int[Array, "b n"], where: Bool[Array, "b n"]
    ) -> Float[Array, "b n s2 s2"]:
        """Of the mask of one of the `classes` in each box, in float32; `where` says which count for statistics."""
        b, n = where.shape
        where = (where | ~where.any()).ravel()  # there are no statistics of none
        x = features.reshape(b * n, *features.shape[2:])
        for conv in self.convs:
            x = nnx.relu(conv(x, where))
        x = nnx.relu(self.doubled(x))
        x = x.reshape(b, n, *x.shape[1:])
        kernel, bias = self.output.kernel[0, 0], self.output.bias
        assert bias is not None
        return of_images(_of_classes, (x, classes + 1), kernel, bias[...])

    def loss(self, features: Float[Array, "b n s s c"], samples: Samples, objects: Objects) -> Float[Array, ""]:
        """Binary cross-entropy of the masks of all samples with an object, their mean.

        Raises ValueError for objects without masks.
        """
        if objects.masks is None or objects.mask_boxes is None:
            raise ValueError("objects must have masks and mask_boxes to train a mask branch, got None.")
        logits = self.logits(features, jnp.maximum(samples.labels - 1, 0), samples.positive)
        targets = of_images(
            lambda *image: mask_targets(*image, size=2 * self.size),
            (objects.masks, objects.mask_boxes, samples.boxes, samples.matched),
        )
        entropy = optax.sigmoid_binary_cross_entropy(logits, targets).mean((2, 3))
        count = jnp.maximum(samples.positive.sum(), 1).astype(jnp.float32)
        return jnp.where(samples.positive, entropy, 0).sum() / count

    def probabilities(
        self, features: Float[Array, "b n s s c"], classes: Int[Array, "b n"], there: Bool[Array, "b n"]
    ) -> Float[Array, "b n s2 s2"]:
        """That each cell of a grid over the box belongs to the object of this class."""
        return jax.nn.sigmoid(self.logits(features, classes, there))


def _of_classes(
    x: Float[Array, "n h w c"], classes: Int[Array, " n"], kernel: Float[Array, "c k"], bias: Float[Array, " k"]
) -> Float[Array, "n h w"]:
    """The linear map to one of the k outputs for each map of an image, in float32."""
    y = jnp.einsum("nhwc,cn->nhw", x, kernel[:, classes].astype(x.dtype), preferred_element_type=jnp.float32)
    return y + bias[classes].astype(jnp.float32)[:, None, None]
