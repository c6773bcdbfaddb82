"""Region proposals of Faster R-CNN (Ren et al., 2015, arXiv:1506.01497, section 3), as torchvision has them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray

from ssm_jax.detection.anchors import pyramid_anchors
from ssm_jax.detection.boxes import clip, decode, encode
from ssm_jax.detection.fpn import ConvNorm, Pyramid, map_size
from ssm_jax.detection.losses import smooth_l1
from ssm_jax.detection.matching import BELOW, check_options, match, sample
from ssm_jax.detection.nms import nms
from ssm_jax.detection.selection import best_of_maps, of_maps

SMALLEST = 1e-3
"""Width and height of a proposal in pixels, at least."""

_normal = jax.nn.initializers.normal(0.01)


class RPN(nnx.Module):
    """Says of every anchor whether there is an object, of whatever class, and the way to its box."""

    def __init__(
        self,
        channels: int,
        *,
        depth: int = 1,
        anchor_sizes: Sequence[Sequence[float | int]] = ((32,), (64,), (128,), (256,), (512,)),
        aspect_ratios: Sequence[float | int] = (0.5, 1.0, 2.0),
        match_iou: float = 0.7,
        ignore_iou: float = 0.3,
        samples: int = 256,
        positive_share: float = 0.5,
        nms_iou: float = 0.7,
        score_threshold: float = 0.0,
        candidates: int = 1000,
        proposals: int = 1000,
        train_candidates: int = 2000,
        train_proposals: int = 2000,
        rngs: nnx.Rngs,
        **dtypes: Any,
    ):
        """Builds the head; the defaults are torchvision's.

        Args:
            channels: of the pyramid's maps.
            depth: number of 3 x 3 convolutions before the outputs.
            anchor_sizes: roots of areas of the anchors, in pixels, for each map of the pyramid.
            aspect_ratios: height / width of the anchors.
            match_iou: IoU of an anchor from which on it is to find the object.
            ignore_iou: from which on it is not told that it is background.
            samples: anchors of an image that the losses are taken of.
            positive_share: how many of these at most are to find an object.
            nms_iou: what the IoUs of proposals of a map are at most.
            score_threshold: what the probabilities of proposals are at least.
            candidates: anchors that each map brings.
            proposals: number of proposals for an image.
            train_candidates: `candidates` in training.
            train_proposals: `proposals` in training.
            rngs: source of the `params` stream.
            **dtypes: `dtype` and `param_dtype`.

        Raises:
            ValueError: for options that cannot be.
        """
        numbers = {"candidates": candidates, "proposals": proposals}
        numbers |= {"train_candidates": train_candidates, "train_proposals": train_proposals}
        check_options(match_iou=match_iou, ignore_iou=ignore_iou, samples=samples, share=positive_share, **numbers)
        options: dict[str, Any] = {"kernel_init": _normal, **dtypes, "rngs": rngs}
        num_anchors = len(anchor_sizes[0]) * len(aspect_ratios)
        self.convs = nnx.List(ConvNorm(channels, channels, **options) for _ in range(depth))
        self.objectness = nnx.Conv(channels, num_anchors, (1, 1), **options)
        self.deltas = nnx.Conv(channels, 4 * num_anchors, (1, 1), **options)
        self.anchor_sizes = tuple(tuple(map(float, sides)) for sides in anchor_sizes)
        self.aspect_ratios = tuple(map(float, aspect_ratios))
        self.match_iou, self.ignore_iou = match_iou, ignore_iou
        self.samples, self.positive_share = samples, positive_share
        self.nms_iou, self.score_threshold = nms_iou, score_threshold
        self.evaluation = candidates, proposals
        self.training = train_candidates, train_proposals

    def __call__(self, pyramid: Pyramid) -> tuple[Float[Array, "b n"], Float[Array, "b n 4"]]:
        """Logits and deltas in float32 for all anchors, map after map, in the order (y, x, anchor)."""
        return of_maps(RPN._outputs, self, pyramid)

    def _outputs(self, pyramid: Pyramid) -> tuple[Float[Array, "b n"], Float[Array, "b n 4"]]:
        logits, deltas = [], []
        for x in pyramid:
            for conv in self.convs:
                x = nnx.relu(conv(x))
            logits.append(self.objectness(x).astype(jnp.float32).reshape(x.shape[0], -1))
            deltas.append(self.deltas(x).astype(jnp.float32).reshape(x.shape[0], -1, 4))
        return jnp.concatenate(logits, axis=1), jnp.concatenate(deltas, axis=1)

    def anchors(self, pyramid: Pyramid, image_shape: tuple[int, int]) -> tuple[Float[Array, "_ 4"], ...]:
        """Those of each map."""
        return pyramid_anchors(self.anchor_sizes, self.aspect_ratios, [map_size(x) for x in pyramid], image_shape)

    def propose(
        self,
        logits: Float[Array, " n"],
        deltas: Float[Array, "n 4"],
        size: Num[Array, "2"],
        anchors: Sequence[Float[Array, "_ 4"]],
        *,
        training: bool,
    ) -> tuple[Float[Array, "p 4"], Bool[Array, " p"]]:
        """Proposals for one image of this `size`, best first, and which of them there are. There is no gradient."""
        candidates, proposals = self.training if training else self.evaluation
        logits, deltas = jax.lax.stop_gradient((logits, deltas))
        counts = [len(a) for a in anchors]
        index, there = best_of_maps(logits, counts, min(candidates, max(counts)))
        boxes = clip(decode(deltas[index], jnp.concatenate(anchors)[index]), size)
        scores = jax.nn.sigmoid(logits[index])
        sides = boxes[..., 2:] - boxes[..., :2]
        valid = there & (sides >= SMALLEST).all(-1) & (scores >= self.score_threshold)

        def of_map(boxes: Array, scores: Array, valid: Array) -> tuple[Array, Array]:
            chosen, kept = nms(boxes, scores, threshold=self.nms_iou, valid=valid, max_kept=min(proposals, scores.size))
            return boxes[chosen], jnp.where(kept, scores[chosen], -1)

        boxes, scores = jax.vmap(of_map)(boxes, scores, valid)
        scores, best = jax.lax.top_k(scores.ravel(), min(proposals, scores.size))
        return boxes.reshape(-1, 4)[best], scores >= 0

    def loss_sums(
        self,
        key: PRNGKeyArray,
        logits: Float[Array, " n"],
        deltas: Float[Array, "n 4"],
        boxes: Float[Array, "m 4"],
        valid: Bool[Array, " m"],
        anchors: Float[Array, "n 4"],
    ) -> dict[str, Float[Array, ""]]:
        """For one image and its objects, `loss_objectness` and `loss_rpn_box_reg` times `count`, the anchors chosen."""
        matched = match(anchors, boxes, valid, high=self.match_iou, low=self.ignore_iou, keep_best=True)
        labels = jnp.where(matched >= 0, 1, jnp.where(matched == BELOW, 0, -1))
        index, chosen = sample(key, labels, self.samples, self.positive_share)
        positive = chosen & (labels[index] == 1)
        entropy = optax.sigmoid_binary_cross_entropy(logits[index], positive.astype(jnp.float32))
        targets = jnp.where(positive[:, None], encode(boxes[matched[index]], anchors[index]), 0)
        distance = smooth_l1(deltas[index], targets, beta=1 / 9).sum(-1)
        return {
            "loss_objectness": jnp.where(chosen, entropy, 0).sum(),
            "loss_rpn_box_reg": jnp.where(positive, distance, 0).sum(),
            "count": chosen.sum().astype(jnp.float32),
        }
