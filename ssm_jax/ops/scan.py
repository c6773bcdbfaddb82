"""Linear recurrences, elementwise, with coefficients that depend on the position.

`linear_recurrence` takes any coefficients. The selective ones are computed from the input, as in S6 (Mamba,
arXiv:2312.00752, section 3); positions are tokens there, and the layers of a network in S6LA (arXiv:2502.10463).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, PyTree

from ssm_jax.ops.backend import target_backend
from ssm_jax.ops.batch_local import batch_local
from ssm_jax.ops.dtypes import at_least_float32

CHUNK = 16
"""1.14 times as fast as 8, by XLA's estimates for TPUs; 32 gains little, compiles longer and is slow on CPUs."""


def linear_recurrence(
    a: Inexact[Array, "*shape"],
    b: Inexact[Array, "*shape"],
    *,
    axis: int,
    h0: Inexact[Array, "*state"] | None = None,
    reverse: bool = False,
) -> Inexact[Array, "*shape"]:
    """All states of `h_t = a_t h_{t-1} + b_t` along `axis`, elementwise, by `jax.lax.associative_scan`.

    Composing two steps, first (a, b) then (a', b'), gives the step (a' a, a' b + b'): an associative operator
    (Blelloch 1990). `h0` is the state before the first step (zero if None), of the shape without `axis`. With
    `reverse`, time runs from the end: `h_t = a_t h_{t+1} + b_t`.

    float16 and bfloat16 are computed and returned in float32: a state sums many small terms.
    """
    with jax.numpy_dtype_promotion("standard"):
        dtype = at_least_float32(jnp.result_type(a, b))
    a, b = a.astype(dtype), b.astype(dtype)
    axis = range(b.ndim)[axis]  # associative_scan(reverse=True) takes no negative axis
    if h0 is not None:
        first = -1 if reverse else 0
        where = [slice(None)] * b.ndim
        where[axis] = slice(-1, None) if reverse else slice(0, 1)
        b = b.at[tuple(where)].add(jnp.take(a, jnp.array([first]), axis) * jnp.expand_dims(h0.astype(dtype), axis))

    def compose(earlier, later):
        (a_1, b_1), (a_2, b_2) = earlier, later
        return a_2 * a_1, a_2 * b_1 + b_2

    _, h = jax.lax.associative_scan(compose, (a, b), axis=axis, reverse=reverse)
    return h


def selective_discretize(
    delta: Float[Array, "..."], A: Float[Array, "..."], discretization: str = "euler"
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`a` and `gain` of a step `h <- a h + gain B u` of h' = A h + B u over a time `delta`, elementwise.

    a = exp(delta A), and `gain` is

    * `euler`: `delta` itself, Mamba's shortcut
    * `zoh`: (exp(delta A) - 1) / A, exact for an input that is held over the step, also where A is 0

    The arguments broadcast. They should be float32: in bfloat16, exp(-1/1000) is 1. Raises ValueError for another
    `discretization`.
    """
    z = delta * A
    a = jnp.exp(z)
    if discretization == "euler":
        return a, delta
    if discretization == "zoh":
        # Near 0, (exp(z) - 1) / z = 1 + z/2 (1 + z/3 (1 + ..., which loses no digits there, nor does its derivative.
        # What is not chosen must be finite, or its derivative would be 0 times infinity.
        near = jnp.abs(z) < 0.5
        small, large = jnp.where(near, z, 0), jnp.where(near, 1, z)
        terms = 16 if jnp.finfo(z.dtype).bits == 64 else 9
        series = functools.reduce(lambda rest, k: 1 + small / k * rest, range(terms, 1, -1), jnp.ones_like(z))
        return a, delta * jnp.where(near, series, (a - 1) / large)
    raise ValueError(f"discretization must be 'euler' or 'zoh', got {discretization!r}.")


def selective_step(
    h: Float[Array, "*batch d n"],
    u: Float[Array, "*batch d"],
    delta: Float[Array, "*batch d"],
    A: Float[Array, "d n"],
    B: Float[Array, "*batch n"],
    *,
    discretization: str = "euler",
) -> Float[Array, "*batch d n"]:
    """The state after one more position of `selective_scan`, whose output there is `h @ C + D * u`.

    It has the dtype of `h`, or float32 if that is half precision. Raises ValueError as `selective_scan` does.
    """
    _check_shapes(u.shape[:-1], u, delta, A, B, h=h)
    h = _turned(h.astype(at_least_float32(h.dtype)))
    h, _ = _step(h, (_inner(A, h), None), (u, delta, B, None), discretization=discretization, states=False)
    return _turned(h)


def selective_scan(
    u: Float[Array, "*batch length d"],
    delta: Float[Array, "*batch length d"],
    A: Float[Array, "d n"],
    B: Float[Array, "*batch length n"],
    C: Float[Array, "*batch length n"] | None = None,
    D: Float[Array, " d"] | None = None,
    *,
    h0: Float[Array, "*batch d n"] | None = None,
    discretization: str = "euler",
    reverse: bool = False,
    method: str = "auto",
    chunk: int = CHUNK,
) -> tuple[Float[Array, "*batch d n"], Float[Array, "*batch length d"] | None]:
    """The state after the last position and the outputs at all of them, none without `C`, of S6 along an axis.

        h_t[d, n] = exp(delta_t[d] A[d, n]) h_{t-1}[d, n] + gain_t[d, n] B_t[n] u_t[d]
        y_t[d] = sum_n C_t[n] h_t[d, n] + D[d] u_t[d]

    with A < 0 < delta. The gain is delta_t[d] (`euler`), or (exp(delta_t[d] A[d, n]) - 1) / A[d, n] (`zoh`), see
    `selective_discretize`. `h0` is the state before the first position (zero if None). With `reverse`, time runs from
    the end.

    `method` is one of

    * `associative`: `linear_recurrence`, of logarithmic depth, with several arrays of all states in memory; the only
      one with derivatives in forward mode
    * `sequential`: position by position, which keeps all states for the backward pass
    * `chunked`: up to `chunk` positions at a time, written out; only the states before them are kept, and the backward
      pass computes the others once more
    * `auto`: what `choose` says

    None of them divides by a decay, and no delta A is too large for them. States are float32, or float64 for float64
    input; outputs have the dtype of `u`. Raises ValueError for an unknown method or discretization, a length or `chunk`
    below 1, and shapes that do not go together.
    """
    return _scan((u, delta, B, C), A, D, h0, discretization, False, reverse, method, chunk)


def selective_states(
    u: Float[Array, "*batch length d"],
    delta: Float[Array, "*batch length d"],
    A: Float[Array, "d n"],
    B: Float[Array, "*batch length n"],
    *,
    h0: Float[Array, "*batch d n"] | None = None,
    discretization: str = "euler",
    reverse: bool = False,
    method: str = "auto",
    chunk: int = CHUNK,
) -> Float[Array, "*batch length d n"]:
    """The states of `selective_scan` after each position, `n` times as large as its outputs."""
    _, h = _scan((u, delta, B, None), A, None, h0, discretization, True, reverse, method, chunk)
    return jnp.swapaxes(h, -1, -2)


METHODS = ("auto", "associative", "sequential", "chunked")
"""What `selective_scan` accepts as `method`."""

_FASTEST = {
    "cpu": [("sequential", 256)],  # measured: 1 to 1.25 times as fast as chunked; longer ones are even, and larger
    "tpu": [],  # XLA's compile-time estimates for v5e, not a measurement
    "gpu": [],  # not measured
}
"""For each backend, methods with the longest axis that they are fastest for; beyond them comes `chunked`."""


def choose(length: int, backend: str | None = None) -> str:
    """The fastest method for `length` positions on `backend` (default: the one in use), from a table.

    `python -m benchmarks.scan` measures it on the device at hand.
    """
    table = _FASTEST.get(backend or target_backend(), _FASTEST["gpu"])
    return next((method for method, longest in table if length <= longest), "chunked")


# In here states are (n, d): d is the longer axis, and vector units work along the last. The weights are A and D, the
# inputs of a step u, delta, B and C; D and C may be None.
_Weights = tuple[Array, Array | None]
_Inputs = tuple[Array, Array, Array, Array | None]


def _scan(
    inputs: _Inputs,
    A: Array,
    D: Array | None,
    h: Array | None,
    discretization: str,
    states: bool,
    reverse: bool,
    method: str,
    chunk: int,
) -> tuple[Array, PyTree[Array]]:
    """The last state, and the outputs or all states."""
    u, delta, B, C = inputs
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if u.ndim < 2 or u.shape[-2] < 1 or chunk < 1:
        raise ValueError(f"length and chunk must be at least 1: got u (..., length, d) of {u.shape} and {chunk}.")
    if D is not None and C is None:
        raise ValueError("D needs C: without it there are no outputs.")
    *batch, length, d = u.shape
    _check_shapes(batch, u, delta, A, B, C=C, D=D, h0=h)
    with jax.numpy_dtype_promotion("standard"):
        dtype = at_least_float32(jnp.result_type(u, delta, A, B))
    h = jnp.zeros((*batch, A.shape[1], d), dtype) if h is None else _turned(h).astype(dtype)
    method = choose(length) if method == "auto" else method
    if method == "associative":
        h = h[..., None, :, :]
        weights = _inner(A, h), D if D is None else _inner(D, h)
        a, b = _coefficients(weights, inputs, discretization)
        h = linear_recurrence(a, b, axis=-3, h0=h[..., 0, :, :], reverse=reverse)
        return _turned(h[..., 0 if reverse else -1, :, :]), h if states else _read(h, weights, inputs)
    # The largest size that leaves the least to fill up with zeros: where delta is 0, the state stays as it is.
    chunk = 1 if method == "sequential" else min(chunk, length)
    chunk = min(range(chunk, chunk // 2, -1), key=lambda size: -length % size)
    axis, missing = len(batch), -length % chunk
    weights = _inner(A, h), D if D is None else _inner(D, h)
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)]), inputs)
    step = functools.partial(_step, discretization=discretization, states=states)

    def scan(rows: PyTree[Array], weights: _Weights) -> tuple[Array, PyTree[Array]]:
        h, inputs = rows
        return _chunked(step, h, weights, inputs, axis=axis, chunk=chunk, reverse=reverse)

    h, y = (batch_local(scan) if batch else scan)((h, padded), weights)
    return _turned(h), jax.tree.map(lambda y: jax.lax.slice_in_dim(y, 0, length, axis=axis), y)


def _step(
    h: Array, weights: _Weights, inputs: _Inputs, *, discretization: str, states: bool
) -> tuple[Array, Array | None]:
    """The next state, and its output or itself."""
    a, b = _coefficients(weights, inputs, discretization)
    h = a * h + b
    return h, h if states else _read(h, weights, inputs)


def _coefficients(weights: _Weights, inputs: _Inputs, discretization: str) -> tuple[Array, Array]:
    A, _ = weights
    u, delta, B = (x.astype(A.dtype) for x in inputs[:3])
    a, gain = selective_discretize(delta[..., None, :], A, discretization)
    return a, gain * u[..., None, :] * B[..., None]


def _read(h: Array, weights: _Weights, inputs: _Inputs) -> Array | None:
    (_, D), (u, _, _, C) = weights, inputs
    if C is None:
        return None
    y = jnp.sum(h * C[..., None].astype(h.dtype), -2)
    if D is not None:
        y = y + D * u.astype(h.dtype)
    return y.astype(u.dtype)


def _chunked(
    step: Callable[[Array, PyTree[Array], PyTree[Array]], tuple[Array, PyTree[Array]]],
    h: Array,
    weights: PyTree[Array],
    inputs: PyTree[Array],
    *,
    axis: int,
    chunk: int,
    reverse: bool,
) -> tuple[Array, PyTree[Array]]:
    """Scans `h, y = step(h, weights, x)` over slices x of the inputs along `axis`, of a length divisible by `chunk`.

    Returns the last h and all y. XLA fuses the steps of a chunk with each other, which it cannot do to turns of a loop.
    """
    counter = np.arange(jax.tree.leaves(inputs)[0].shape[axis] // chunk)
    order = range(chunk)[::-1] if reverse else range(chunk)

    def forward(h, weights, inputs):
        def body(h, i):
            before, xs, ys = h, _slices(inputs, i, chunk, axis), {}
            for t in order:
                h, ys[t] = step(h, weights, xs[t])
            return h, (before, _stack(ys, axis))

        h, (before, y) = jax.lax.scan(body, h, counter, reverse=reverse)
        return (h, _merge(y, axis)), (weights, inputs, before)

    def backward(residuals, cotangents):
        weights, inputs, before = residuals
        dh, dy = cotangents

        def body(carry, i_and_h):
            (dh, d_weights), (i, h) = carry, i_and_h
            xs, dys, states, dxs = _slices(inputs, i, chunk, axis), _slices(dy, i, chunk, axis), {}, {}
            for t in order:
                states[t] = h
                h, _ = step(h, weights, xs[t])
            for t in reversed(order):
                _, pull_back = jax.vjp(step, states[t], weights, xs[t])
                dh, more, dxs[t] = pull_back((dh, dys[t]))
                d_weights = jax.tree.map(jnp.add, d_weights, more)
            return (dh, d_weights), _stack(dxs, axis)

        carry = dh, jax.tree.map(jnp.zeros_like, weights)
        (dh, d_weights), dx = jax.lax.scan(body, carry, (counter, before), reverse=not reverse)
        return dh, d_weights, _merge(dx, axis)

    scan = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    scan.defvjp(forward, backward)
    return scan(h, weights, inputs)


def _slices(tree: PyTree[Array], i: Array, chunk: int, axis: int) -> list[PyTree[Array]]:
    """The positions of chunk `i`."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis) for x in leaves]
    index = functools.partial(jax.lax.index_in_dim, axis=axis, keepdims=False)
    return [structure.unflatten([index(x, t) for x in leaves]) for t in range(chunk)]


def _stack(parts: dict[int, PyTree[Array]], axis: int) -> PyTree[Array]:
    """As `jnp.stack` does, but as a sum of padded parts: XLA for TPUs writes a stack part by part, and this at once."""

    def stack(*leaves: Array) -> Array:
        padded = []
        for t, leaf in enumerate(leaves):
            widths = [(0, 0)] * leaf.ndim
            widths.insert(axis, (t, len(leaves) - 1 - t))
            padded.append(jnp.pad(jnp.expand_dims(leaf, axis), widths))
        return sum(padded[1:], start=padded[0])

    return jax.tree.map(stack, *(parts[t] for t in range(len(parts))))


def _merge(tree: PyTree[Array], axis: int) -> PyTree[Array]:
    """Makes one axis of the chunks, in front, and the positions in them."""

    def merge(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return jax.tree.map(merge, tree)


def _turned(h: Array) -> Array:
    """From (d, n) to (n, d), and back."""
    return jnp.swapaxes(h, -1, -2)


def _inner(weight: Array, h: Array) -> Array:
    """A (d, n) as the states `h` are, or D (d,) as outputs are, which have an axis less."""
    weight = weight.T.astype(h.dtype)
    return jnp.expand_dims(weight, range(h.ndim - 2))


def _check_shapes(batch: Sequence[Any], u: Array, delta: Array, A: Array, B: Array, **others: Array | None) -> None:
    """Of what goes with `u` and the number of modes of `A`; states are (*batch, d, n). Sizes may be symbolic."""
    *rows, d = u.shape
    n = A.shape[-1]
    state = (*batch, d, n)
    shapes = {"delta": (*rows, d), "A": (d, n), "B": (*rows, n), "C": (*rows, n), "D": (d,), "h": state, "h0": state}
    for name, value in {"delta": delta, "A": A, "B": B, **others}.items():
        if value is not None and value.shape != shapes[name]:
            raise ValueError(
                f"{name} must have shape {shapes[name]} beside u of shape {u.shape} and {n} modes in A, "
                f"got {value.shape}."
            )
