"""Maps from unconstrained parameters to positive numbers, and back."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_FLOOR = 1e-4


class Transform(NamedTuple):
    """A map onto (part of) the positive numbers and its inverse for values of at least 1e-4.

    As in S4, the inverse of relu is off by 1e-4: the exact one would start a value of 1e-4 where relu has no gradient.
    """

    forward: Callable[[Any], Any]
    inverse: Callable[[Any], Any]
    below: float = math.inf
    """All values are below this."""


TRANSFORMS: dict[str, Transform] = {
    "none": Transform(lambda x: x, lambda y: y),
    "exp": Transform(jnp.exp, jnp.log),
    "relu": Transform(lambda x: jax.nn.relu(x) + _FLOOR, lambda y: y),
    "sigmoid": Transform(jax.nn.sigmoid, lambda y: jnp.log(y) - jnp.log1p(-y), below=1.0),
    "softplus": Transform(jax.nn.softplus, lambda y: y + jnp.log(-jnp.expm1(-y))),
}
"""The parametrisations of dt, -Re A and -Im A that S4 knows, by name."""


def transform(argument: str, name: str) -> Transform:
    """Looks up a transform; `argument` is what the caller named it, for the error."""
    if name not in TRANSFORMS:
        raise ValueError(f"{argument} must be one of {', '.join(TRANSFORMS)}, got {name!r}.")
    return TRANSFORMS[name]


def inverse_clamped(t: Transform, value: jax.Array) -> jax.Array:
    """The parameter whose value is max(`value`, 1e-4): S4 starts no rate, decay or frequency below that."""
    return t.inverse(jnp.maximum(value, _FLOOR))
