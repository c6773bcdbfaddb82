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
    """What a network's argument `aggregation` makes for a stage, if there is one."""
    return None if make is None else make(stage, **dtypes, rngs=rngs)


class Aggregation(nnx.Module):
    """Lets the blocks of a stage see more than the output of the block before: a state h goes from block to block.

    A network's argument `aggregation` makes one of these for each stage, as `aggregation(stage, dtype=..., ...)` with a
    `Stage`, and `Stack` calls it. The parameters of a stage are its own, those of a block in `cells`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    """Arguments of the constructor, by name."""
    cells: nnx.List
    head_channels: int = 0
    """What `readout` adds to the channels."""
    loops: bool = True
    """Whether the state keeps its shape within a stage, as the carry of a loop over its blocks has to."""

    def start(self, x: Float[Array, "b *axes c"], h: Any) -> Any:
        """The state before the stage's first block: from its input and the last state of the stage before, or None."""
        raise NotImplementedError

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
        """The block's output and the state after it; `cell` is the block's, the rest are arguments of the block.

        Networks whose x is a sequence also give `size`, the height and width of the map that its positions are.
        """
        raise NotImplementedError

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
