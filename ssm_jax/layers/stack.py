"""Residual blocks one after another: as they are, rematerialised, or as one loop over equal blocks."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation


def _real(policy: Callable[..., Any]) -> Callable[..., bool]:
    """A policy that keeps no complex numbers: JAX's own ones fail on them."""

    def saveable(primitive: Any, *avals: Any, **params: Any) -> bool:
        is_complex = any(jnp.issubdtype(aval.dtype, jnp.complexfloating) for aval in avals)
        return bool(policy(primitive, *avals, **params)) and not is_complex

    return saveable


REMAT = {
    "none": None,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": _real(jax.checkpoint_policies.dots_saveable),
    "dots_with_no_batch_dims_saveable": _real(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
"""What the backward pass keeps of each block instead of computing it again, by JAX's names; `none`: all it needs."""


class Stack(nnx.Module):
    """The blocks of one stage, called as `block(x, drop_path, rngs=..., **arguments)`, and what aggregates them.

    `nnx.view(model, remat=..., scan=...)` is the same network, with the same parameters, run in another way.
    """

    def __init__(
        self,
        blocks: Iterable[nnx.Module],
        *,
        drop_path: Sequence[float],
        aggregation: Aggregation | None = None,
        remat: str = "none",
        scan: bool = False,
    ):
        """Puts blocks together.

        Args:
            blocks: the blocks.
            drop_path: a rate for each, see `DropPath`.
            aggregation: calls the blocks instead.
            remat: what the backward pass keeps of a block, a name in `REMAT`.
            scan: run equal blocks, or equal pairs where two kinds take turns, as one `jax.lax.scan`, also after a
                first block that is different. XLA then compiles one of them instead of all, which takes less time for
                many blocks and more for two or three: see docs/benchmarks.md.

        Raises:
            ValueError: for an unknown `remat`, or `scan` with an aggregation whose state grows.
        """
        self.blocks = nnx.List(blocks)
        self.aggregation = aggregation
        self.drop_path = tuple(drop_path)
        self.set_view(remat=remat, scan=scan)

    def set_view(self, remat: str | None = None, scan: bool | None = None) -> None:
        """See `__init__`; None leaves a choice as it is."""
        if remat is not None:
            if remat not in REMAT:
                raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {remat!r}.")
            self.remat = remat
        if scan is not None:
            if scan and self.aggregation is not None and not self.aggregation.loops:
                kind = type(self.aggregation).__name__
                raise ValueError(f"scan must be False with {kind}, whose state grows from block to block, got {scan}.")
            self.scan = scan

    def __call__(self, x: Array, h: Any = None, *, rngs: nnx.Rngs | None = None, **arguments: Any) -> tuple[Array, Any]:
        """Applies all blocks, and returns the last one's output and the state of the aggregation, if there is one.

        `h` is that state after the stage before. Each block has a `dropout` stream of its own, the same in every way
        of running them.
        """
        n = len(self.blocks)
        keys = [None] * n if rngs is None else list(jax.random.split(rngs.dropout(), n))
        looped = self._looped() if self.scan else []
        carry = x, None if self.aggregation is None else self.aggregation.start(x, h)
        for i in range(n - sum(map(len, looped))):
            carry = self._each(i, carry, keys[i], arguments)
        return self._loop(looped, carry, keys, arguments) if looped else carry

    def readout(self, x: Float[Array, "b c"], h: Any) -> Float[Array, "b d"]:
        """See `Aggregation.readout`."""
        return x if self.aggregation is None else self.aggregation.readout(x, h)

    @property
    def head_channels(self) -> int:
        """See `Aggregation`."""
        return 0 if self.aggregation is None else self.aggregation.head_channels

    def _layer(self, i: int) -> Any:
        """A block, with what the aggregation has for it alone."""
        return (self.blocks[i], None if self.aggregation is None else self.aggregation.cells[i])

    def _run(self, layer: Any, carry: Any, drop_path: Any, key: Any, arguments: Mapping[str, Any]) -> Any:
        """A layer, in place."""
        (block, cell), (x, h), rngs = layer, carry, None if key is None else nnx.Rngs(dropout=key)
        if self.aggregation is None:
            return block(x, drop_path, rngs=rngs, **arguments), h
        return self.aggregation(block, cell, x, h, drop_path, rngs=rngs, **arguments)

    def _apply(
        self, graphdef: nnx.GraphDef, values: Any, carry: Any, key: Any, *, drop_path: Any, arguments: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """A layer as a function of its values: its output, and those that it changed, such as batch statistics."""
        layer = nnx.merge(graphdef, values, copy=True)
        before = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(layer))}
        carry = self._run(layer, carry, drop_path, key, arguments)
        after = nnx.to_flat_state(nnx.state(layer))
        changed = [(path, variable) for path, variable in after if variable.get_value() is not before[path]]
        return carry, nnx.to_pure_dict(nnx.from_flat_state(changed))

    def _each(self, i: int, carry: Any, key: Any, arguments: Mapping[str, Any]) -> Any:
        """One layer, in place."""
        layer, drop_path = self._layer(i), self.drop_path[i]
        if self.remat == "none":
            return self._run(layer, carry, drop_path, key, arguments)
        graphdef, values = _split(layer)
        f = functools.partial(self._apply, graphdef, drop_path=drop_path, arguments=arguments)
        carry, changed = jax.checkpoint(f, policy=REMAT[self.remat])(values, carry, key)
        nnx.update(layer, changed)
        return carry

    def _loop(self, groups: list[list[int]], carry: Any, keys: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
        """Groups of layers, given by their numbers, that differ only in values."""
        graphdefs = [nnx.graphdef(self._layer(i)) for i in groups[0]]

        def stacked(of_layer: Callable[[int], Any]) -> Any:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[[of_layer(i) for i in group] for group in groups])

        def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
            changed = []
            for graphdef, values, drop_path, key in zip(graphdefs, *inputs, strict=True):
                # A rate of 0 is no drop path, and needs no key.
                rate = drop_path if dropping else 0.0
                f = functools.partial(self._apply, graphdef, drop_path=rate, arguments=arguments)
                if self.remat != "none":
                    f = jax.checkpoint(f, policy=REMAT[self.remat], prevent_cse=False)  # a loop prevents it already
                carry, new = f(values, carry, key)
                changed.append(new)
            return carry, changed

        dropping = any(self.drop_path)
        values = stacked(lambda i: _split(self._layer(i))[1])
        rates = stacked(lambda i: jnp.asarray(self.drop_path[i], jnp.float32))
        carry, changed = jax.lax.scan(body, carry, (values, rates, stacked(lambda i: keys[i])))
        for number, group in enumerate(groups):
            for new, i in zip(changed, group, strict=True):
                nnx.update(self._layer(i), jax.tree.map(lambda leaf, number=number: leaf[number], new))
        return carry

    def _looped(self) -> list[list[int]]:
        """The numbers of the last layers, in groups of one or two that are equal but for values, or no groups."""
        kinds = [
            (graphdef, jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), values))
            for graphdef, values in (_split(self._layer(i)) for i in range(len(self.blocks)))
        ]
        for lead in (0, 1):
            for size in (1, 2):
                groups = [list(range(i, i + size)) for i in range(lead, len(kinds), size)]
                if (
                    len(groups) > 1
                    and len(groups) * size + lead == len(kinds)
                    and all(kinds[i] == kinds[lead + (i - lead) % size] for group in groups for i in group)
                ):
                    return groups
        return []


def _split(layer: Any) -> tuple[nnx.GraphDef, Any]:
    """What a layer is, and its values."""
    graphdef, state = nnx.split(layer)
    return graphdef, nnx.to_pure_dict(state)
