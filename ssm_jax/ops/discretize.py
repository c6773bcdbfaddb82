"""From the continuous system x' = A x + B u to its samples at step dt."""

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float


def discretize(
    A: Complex[Array, "h_or_1 n"],
    B: Complex[Array, "h_or_1 n"],
    dt: Float[Array, "h n_or_1"],
    method: str = "zoh",
) -> tuple[Complex[Array, "h n"], Complex[Array, "h n"]]:
    """Discretises diagonal modes; returns `log(Abar)` and `Bbar`, so that x_l = Abar x_{l-1} + Bbar u_l.

    The logarithm is returned because kernels need powers: Abar^l = exp(l log Abar).

    * `zoh` holds the input constant over a step: Abar = exp(dt A), Bbar = B (exp(dt A) - 1) / A.
    * `bilinear` is the trapezoidal rule: Abar = (1 + dt A / 2) / (1 - dt A / 2), Bbar = dt B / (1 - dt A / 2).

    S4D (arXiv:2206.11893), section 3.1. Raises ValueError for another `method`.
    """
    dt = dt.astype(A.dtype)
    z = dt * A
    if method == "zoh":
        return z, B * jnp.expm1(z) / A
    if method == "bilinear":
        return jnp.log((1 + z / 2) / (1 - z / 2)), dt * B / (1 - z / 2)
    raise ValueError(f"discretization must be 'zoh' or 'bilinear', got {method!r}.")
