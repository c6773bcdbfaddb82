"""Stochastic depth: dropping residual branches by example (Huang et al., 2016, arXiv:1603.09382)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float


class DropPath(nnx.Module):
    """Drops its whole input, by example, and scales what it keeps by 1 / (1 - rate)."""

    def __init__(self):
        self.deterministic = False

    def set_view(self, deterministic: bool | None = None) -> None:
        """Whether to keep everything."""
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(
        self, x: Float[Array, "b *_"], rate: float | Float[Array, ""], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "b *_"]:
        """Applies it at `rate`, in [0, 1); `rngs` gives the `dropout` stream, needed unless the rate is the number 0.

        The rate is an argument of the call because it is all that differs between the blocks of a stage, which can
        then be run as one loop (see `Stack`).
        """
        if self.deterministic or (isinstance(rate, int | float) and rate == 0):
            return x
        if rngs is None:
            raise ValueError("rngs must be given in training with drop_path, as in model(x, rngs=nnx.Rngs(dropout=0)).")
        keep = 1.0 - jnp.asarray(rate, jnp.float32)
        mask = jax.random.bernoulli(rngs.dropout(), keep, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(mask, x * (1 / keep).astype(x.dtype), jnp.zeros_like(x))


def drop_path_rates(drop_path: float, depths: tuple[int, ...]) -> list[tuple[float, ...]]:
    """Rates for each stage's blocks: from 0 at the first block of the network up to `drop_path` at its last.

    Raises ValueError for a `drop_path` outside [0, 1).
    """
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must be in [0, 1), got {drop_path}.")
    rates = np.linspace(0.0, drop_path, sum(depths)).tolist()
    ends = np.cumsum(depths).tolist()
    return [tuple(rates[end - depth : end]) for end, depth in zip(ends, depths, strict=True)]
