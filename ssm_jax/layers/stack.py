"""Residual blocks one after another: as they are, rematerialised, or as one loop over equal blocks."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


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
    """The blocks of one stage, called as `block(x, drop_path, rngs=..., **arguments)`; `x` may be a tree of arrays.

    `nnx.view(model, remat=..., scan=...)` is the same network, with the same parameters, run in another way.
    """

    def __init__(
        self, blocks: Iterable[nnx.Module], *, drop_path: Sequence[float], remat: str = "none", scan: bool = False
    ):
        """Puts blocks together.

        Args:
            blocks: the blocks.
            drop_path: a rate for each, see `DropPath`.
            remat: what the backward pass keeps of a block, a name in `REMAT`.
            scan: run equal blocks, or equal pairs where two kinds take turns, as one `jax.lax.scan`, also after a
                first block that is different. XLA then compiles one of them instead of all, which takes less time for
                many blocks and more for two or three: see docs/benchmarks.md.

        Raises:
            ValueError: for an unknown `remat`.
        """
        self.blocks = nnx.List(blocks)
        self.drop_path = tuple(drop_path)
        self.set_view(remat=remat, scan=scan)

    def set_view(self, remat: str | None = None, scan: bool | None = None) -> None:
        """See `__init__`; None leaves a choice as it is."""
        if remat is not None:
            if remat not in REMAT:
                raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {remat!r}.")
            self.remat = remat
        if scan is not None:
            self.scan = scan

    def __call__(self, x: Any, *, rngs: nnx.Rngs | None = None, **arguments: Any) -> Any:
        """Applies all blocks. Each has a `dropout` stream of its own, the same in every way of running them."""
        n = len(self.blocks)
        keys = [None] * n if rngs is None else list(jax.random.split(rngs.dropout(), n))
        looped = self._looped() if self.scan else []
        for i in range(n - sum(map(len, looped))):
            x = self._each(self.blocks[i], x, self.drop_path[i], keys[i], arguments)
        return self._loop(looped, x, keys, arguments) if looped else x

    def _each(self, block: nnx.Module, x: Any, drop_path: float, key: Any, arguments: Mapping[str, Any]) -> Any:
        """One block, in place."""
        if self.remat == "none":
            return block(x, drop_path, rngs=_rngs(key), **arguments)
        graphdef, values = _split(block)
        f = functools.partial(_apply, graphdef, drop_path=drop_path, arguments=arguments)
        x, changed = jax.checkpoint(f, policy=REMAT[self.remat])(values, x, key)
        nnx.update(block, changed)
        return x

    def _loop(self, groups: list[list[int]], x: Any, keys: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
        """Groups of blocks, given by their numbers, that differ only in values."""
        graphdefs = [nnx.graphdef(self.blocks[i]) for i in groups[0]]

        def stacked(of_block: Callable[[int], Any]) -> Any:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[[of_block(i) for i in group] for group in groups])

        def body(x: Any, inputs: Any) -> tuple[Any, Any]:
            changed = []
            for graphdef, values, drop_path, key in zip(graphdefs, *inputs, strict=True):
                # A rate of 0 is no drop path, and needs no key.
                f = functools.partial(_apply, graphdef, drop_path=drop_path if dropping else 0.0, arguments=arguments)
                if self.remat != "none":
                    f = jax.checkpoint(f, policy=REMAT[self.remat], prevent_cse=False)  # a loop prevents it already
                x, new = f(values, x, key)
                changed.append(new)
            return x, changed

        dropping = any(self.drop_path)
        values = stacked(lambda i: _split(self.blocks[i])[1])
        rates = stacked(lambda i: jnp.asarray(self.drop_path[i], jnp.float32))
        x, changed = jax.lax.scan(body, x, (values, rates, stacked(lambda i: keys[i])))
        for number, group in enumerate(groups):
            for new, i in zip(changed, group, strict=True):
                nnx.update(self.blocks[i], jax.tree.map(lambda leaf, number=number: leaf[number], new))
        return x

    def _looped(self) -> list[list[int]]:
        """The numbers of the last blocks, in groups of one or two that are equal but for values, or no groups."""
        kinds = [
            (graphdef, jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), values))
            for graphdef, values in map(_split, self.blocks)
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


def _split(block: nnx.Module) -> tuple[nnx.GraphDef, Any]:
    """What a block is, and its values."""
    graphdef, state = nnx.split(block)
    return graphdef, nnx.to_pure_dict(state)


def _rngs(key: Any) -> nnx.Rngs | None:
    return None if key is None else nnx.Rngs(dropout=key)


def _apply(
    graphdef: nnx.GraphDef, values: Any, x: Any, key: Any, *, drop_path: Any, arguments: Mapping[str, Any]
) -> tuple[Any, Any]:
    """A block as a function of its values: its output, and those that it changed, such as batch statistics."""
    block = nnx.merge(graphdef, values, copy=True)
    before = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(block))}
    x = block(x, drop_path, rngs=_rngs(key), **arguments)
    after = nnx.to_flat_state(nnx.state(block))
    changed = [(path, variable) for path, variable in after if variable.get_value() is not before[path]]
    return x, nnx.to_pure_dict(nnx.from_flat_state(changed))
