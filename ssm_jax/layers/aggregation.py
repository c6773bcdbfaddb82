"""What the methods that aggregate the layers of a network have in common."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from ssm_jax.layers.conv import block_means, conv


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a method is told of the blocks that it is for, by the network that has them."""

    blocks: Sequence[Any]
    channels: int
    """Of the blocks' outputs."""
    previous: int | None = None
    """Channels of the stage before."""
    prefix: int = 0
    """Tokens of the network's own, such as a class token, before those of the positions."""
    last: bool = True
    """Whether the classifier comes after it."""


def aggregate(
    make: Callable[..., "Aggregation"] | None, stage: Stage, *, rngs: nnx.Rngs, **dtypes: Any
) -> "Aggregation | None":
    """What a network's argument `aggregation` makes for a stage, if there is one.

    Raises ValueError for an argument that cannot be called.
    """
    if make is not None and not callable(make):
        raise ValueError(
            "aggregation must be a class or function such as functools.partial(S6LAConv, state_dim=16), got "
            f"{make!r}; by name, as in create_model('resnet50_s6la', aggregation={{...}}), it takes a dict."
        )
    return None if make is None else make(stage, **dtypes, rngs=rngs)


class Aggregation(nnx.Module):
    """Lets the blocks of a stage see more than the output of the block before: a state h goes from block to block.

    A network's argument `aggregation` makes one of these for each stage, as `aggregation(stage, dtype=...,
    param_dtype=..., rngs=...)` with a `Stage`, and `Stack` calls it for each block. Its constructor sets `cells`, an
    `nnx.List` with what each of `stage.blocks` has for itself (None is allowed); what they share is its own. Besides,
    `start` and `__call__` are to be written, and `readout`, with `head_channels`, where the classifier sees the state.
    docs/aggregation.md has an example.

    Attributes:
        cells: what each block has for itself.
        presets: arguments of the constructor, by name.
        head_channels: what `readout` adds to the channels.
        loops: whether the state keeps its shape within a stage, as the carry of a loop over its blocks has to.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    cells: nnx.List
    head_channels: int = 0
    loops: bool = True

    def start(self, x: Float[Array, "b *axes c"], h: Any) -> Any:
        """Returns the state before the stage's first block, whose input is `x`.

        `h` is the last state of the stage before, and None in the first stage.
        """
        raise NotImplementedError(f"{type(self).__name__} must define start.")

    def __call__(
        self,
        block: Any,
        cell: Any,
        x: Float[Array, "b *axes c"],
        h: Any,
        drop_path: float | Array,
        *,
        rngs: nnx.Rngs | None = None,
        **arguments: Any,
    ) -> tuple[Float[Array, "b *axes2 d"], Any]:
        """Returns what goes to the next block, and the state after this one.

        Args:
            block: to be called as `block(x, drop_path, rngs=rngs, **arguments)`. That of a ResNet also has `residual`,
                which takes another function for the first convolution of its branch.
            cell: what the block has for itself.
            x: the block's input.
            h: the state before it.
            drop_path: rate of the block's stochastic depth.
            rngs: `dropout` stream, in training.
            **arguments: those of the block; and from networks whose x is a sequence `size`, the height and width of the
                map that its positions are, which is not for the block.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__.")

    def readout(self, x: Float[Array, "b c"], h: Any) -> Float[Array, "b d"]:
        """What the classifier sees: the average (or token) x that it would see without a state, or more."""
        del h
        return x


def reader(block: Any, state_dim: int, *, rngs: nnx.Rngs, **dtypes: Any) -> nnx.Module:
    """What the first convolution of a residual block has for a state of `state_dim` channels beside its input."""
    first = block.conv1
    return conv(state_dim, first.out_features, first.kernel_size[0], stride=first.strides, **dtypes, rngs=rngs)


def beside(block: Any, read: Any, h: Float[Array, "b h w n"]) -> Callable[[Array], Array]:
    """The first convolution of a residual block as a function of x that is that of [x, h], which is not formed.

    Its kernel is cut in two: `block.conv1` for x and `read`, a `reader`, for h.
    """
    seen = read(h)
    return lambda x: block.conv1(x) + seen


def halved(h: Float[Array, "b h w n"], size: tuple[int, ...]) -> Float[Array, "b h2 w2 n"]:
    """`h` at the `size` of a map: itself, or its means over 2 x 2 positions."""
    if h.shape[1:3] == tuple(size):
        return h
    return block_means(h, 2)
