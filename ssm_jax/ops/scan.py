"""Linear recurrences in logarithmic depth."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from ssm_jax.ops.dtypes import at_least_float32


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
