"""What a network's layers leave in the state of its aggregation, and what they read of it.

```python
records = jax.jit(analysis.record)(model, images)
states = jax.jit(analysis.offline_states)(model, records)  # of S6LA, by the associative scan
```

Every function returns a list with an entry for each stage. Networks are taken in evaluation mode and are not changed.
`record` is for any network of `Stack`s, the others are for those with S6LA.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ssm_jax.layers.aggregation import Aggregation, halved
from ssm_jax.layers.s6la import S6LAConv
from ssm_jax.layers.s6la_token import S6LAToken
from ssm_jax.layers.stack import Stack
from ssm_jax.ops.scan import linear_recurrence


class Record(NamedTuple):
    """What went through a stage, layer by layer."""

    outputs: tuple[Array, ...]
    """What each block returned, before its positions read the state."""
    branches: tuple[Array, ...] | None
    """What each block added to its shortcut, where the state takes in that (`state_source="branch_out"`)."""
    start: Any
    """The state at the stage's start; None without an aggregation."""
    states: tuple[Any, ...]
    """The state after each layer."""
    reads: tuple[Float[Array, "b *axes"], ...]
    """For each layer and position the size of what is read of the state, r / (r + s), between 0 and 1.

    Where a block's branch reads the state, r and s are what its first convolution makes of the state and of the map;
    where positions read, what they read and what they were. Both are norms over the channels.
    """


def record(model: nnx.Module, images: Float[Array, "b *axes c"], **arguments: Any) -> list[Record]:
    """Runs the network on `images`; `arguments` are others of the model, such as `rate`.

    Raises ValueError for a network without stacks of layers, such as `isotropic_*`.
    """
    model, stacks = _stacks(model)
    recorders = [_Recorder(stack) for stack in stacks]
    for stack, recorder in zip(stacks, recorders, strict=True):
        stack.aggregation = cast(Any, recorder)
    model(images, **arguments)  # pyright: ignore[reportCallIssue]
    return [recorder.record() for recorder in recorders]


def offline_states(model: nnx.Module, records: Sequence[Record]) -> list[Float[Array, "layers b *axes n"]]:
    """All states of each stage at once, from what its blocks returned.

    They are those that the network had, but only where it had read them could it return what is recorded: this is no
    way to run it. Each stage goes by itself, as the mean over 2 x 2 positions and the decay of each do not commute.

    Raises ValueError, as all below do, for a network that has a stage without S6LA.
    """
    return [linear_recurrence(a, b, axis=0, h0=start) for _, a, b, start in _recurrences(model, records)]


def deltas(model: nnx.Module, records: Sequence[Record]) -> list[Float[Array, "layers b *axes n"]]:
    """Delta at every element of the state: log a / A, in the token form equal for all n.

    Where a = exp(Delta A) is zero in float32, this is the largest Delta at which it is not.
    """

    def logarithm(a: Array) -> Array:
        return jnp.log(jnp.maximum(a, jnp.finfo(a.dtype).tiny))

    return [logarithm(a) / A for A, a, _, _ in _recurrences(model, records)]


def memories(model: nnx.Module, records: Sequence[Record]) -> list[Float[Array, "layers b *axes n"]]:
    """1 / (Delta |A|) at every element: after how many layers like this one a state has decayed to 1 / e."""
    return [1 / jnp.abs(jnp.log(a)) for _, a, _, _ in _recurrences(model, records)]


def contributions(model: nnx.Module, records: Sequence[Record]) -> list[Float[Array, "layers 1+layers"]]:
    """How much of the state after layer t (rows) came in at the stage's start (column 0) and at layer s (column s).

    By h_t = a_t ... a_1 h_0 + sum_{s <= t} a_t ... a_{s+1} b_s, elementwise: the absolute values of these terms, each
    averaged over all elements of the state and the images.
    """

    def rows(a: Array, b: Array, start: Array) -> Array:
        terms = jnp.abs(jnp.concatenate([start[None], b]))
        arrived, means = terms[:1], []
        for t in range(len(a)):
            arrived = jnp.concatenate([a[t][None] * arrived, terms[t + 1][None]])
            row = arrived.mean(tuple(range(1, arrived.ndim)))
            means.append(jnp.pad(row, (0, len(a) - 1 - t)))
        return jnp.stack(means)

    return [rows(a, b, start) for _, a, b, start in _recurrences(model, records)]


def _stacks(model: nnx.Module) -> tuple[nnx.Module, list[Stack]]:
    """The network in evaluation mode, layer by layer, and its stacks."""
    plain = {"scan": False, "remat": "none"}
    model = nnx.view(model, raise_if_not_found=False, deterministic=True, use_running_average=True, **plain)
    stacks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]
    if not stacks:
        raise ValueError(f"model must have its layers in stacks, and {type(model).__name__} has none.")
    return model, stacks


def _recurrences(model: nnx.Module, records: Sequence[Record]) -> list[tuple[Array, Array, Array, Array]]:
    """A, a and b of h' = a h + b, (layers, b, ..., n), and the h before the first layer, for each stage."""
    found = []
    for stage, (stack, record) in enumerate(zip(_stacks(model)[1], records, strict=True)):
        method = stack.aggregation
        if not isinstance(method, S6LAConv | S6LAToken):
            has = "no aggregation" if method is None else type(method).__name__
            raise ValueError(f"model must have S6LA in all stages; stage {stage} has {has}.")
        taken = record.outputs if record.branches is None else record.branches
        pairs = [method.coefficients(cell, x) for cell, x in zip(method.cells, taken, strict=True)]
        a, b = (jnp.stack(part) for part in zip(*pairs, strict=True))
        dynamics = [method.dynamics or cell.dynamics for cell in method.cells]
        A = jnp.stack([jnp.broadcast_to(one.decay.A, a.shape[1:]) for one in dynamics])
        start = halved(record.start, b.shape[2:4]) if isinstance(method, S6LAConv) else record.start
        found.append((A, a, b, start))
    return found


class _Recorder:
    """Stands in for the aggregation of a stack and notes what goes through it."""

    def __init__(self, stack: Stack):
        self.aggregation: Aggregation | None = stack.aggregation
        self.cells = [None] * len(stack.blocks) if self.aggregation is None else self.aggregation.cells
        self.first: Any = None
        self.layers: list[tuple[Any, ...]] = []

    def start(self, x: Array, h: Any) -> Any:
        self.first = None if self.aggregation is None else self.aggregation.start(x, h)
        return self.first

    def __call__(
        self, block: Any, cell: Any, x: Array, h: Any, drop_path: Any, *, size: Any = None, **arguments: Any
    ) -> tuple[Array, Any]:
        heard = _Heard(block)
        if self.aggregation is None:
            y = heard(x, drop_path, **arguments)
        else:
            of_sequences = {} if size is None else {"size": size}
            y, h = self.aggregation(heard, cell, x, h, drop_path, **of_sequences, **arguments)
        own, read = heard.first or (heard.output, y - heard.output)
        own, read = (jnp.linalg.norm(part.astype(jnp.float32), axis=-1) for part in (own, read))
        share = read / jnp.maximum(own + read, jnp.finfo(jnp.float32).tiny)
        if size is not None:
            rows, columns = size
            share = share[:, -rows * columns :].reshape(-1, rows, columns)
        self.layers.append((heard.output, heard.branch, h, share))
        return y, h

    def readout(self, x: Array, h: Any) -> Array:
        return x if self.aggregation is None else self.aggregation.readout(x, h)

    def record(self) -> Record:
        outputs, branches, states, reads = zip(*self.layers, strict=True)
        of_branches = getattr(self.aggregation, "state_source", None) == "branch_out"
        return Record(outputs, branches if of_branches else None, self.first, states, reads)


class _Heard:
    """A block that keeps what it returned, and what its first convolution made of the map and of the state."""

    def __init__(self, block: Any):
        self.block = block
        self.output: Any = None
        self.branch: Any = None
        self.first: tuple[Array, Array] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def __call__(self, x: Array, *arguments: Any, **named: Any) -> Array:
        self.output = self.block(x, *arguments, **named)
        self.branch = self.output - x if self.output.shape == x.shape else None
        return self.output

    def residual(self, x: Array, *arguments: Any, first: Callable[[Array], Array], **named: Any) -> tuple[Array, Array]:
        own = self.block.conv1(x)
        self.first = own, first(x) - own
        self.output, self.branch = self.block.residual(x, *arguments, first=first, **named)
        return self.output, self.branch
