"""What became of the dynamics of a network's state space models: statistics of dt and |A|, from its parameters."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ssm_jax.layers.s6la import Decay
from ssm_jax.layers.ssm_kernel import S4DKernel


def ssm_statistics(model: nnx.Module) -> dict[str, Float[Array, ""]]:
    """Least, geometric mean and greatest dt and |A| over all layers, as `ssm/KIND/dt_min` and so on; {} without layers.

    * `s4nd`: of all axes, heads and modes. dt is that of one step of the base grid, rate 1, and A that of the
      diagonal part in a diagonal plus low-rank system.
    * `s6la`: dt is softplus of its bias, that is Delta where the input says nothing, and A the diagonal.

    The product of dt and |A| is what counts: a mode changes at that rate, in radians or e-foldings per step.
    """
    found: dict[str, list[tuple[Array, Array]]] = {}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, S4DKernel):
            A, _, _, dt = module.continuous()
            found.setdefault("s4nd", []).append((dt, jnp.abs(A)))
        elif isinstance(module, Decay):
            found.setdefault("s6la", []).append((module.delta(None, 1), jnp.abs(module.A)))
    statistics = {}
    for kind, layers in found.items():
        for name, parts in zip(("dt", "A"), zip(*layers, strict=True), strict=True):
            values = jnp.concatenate([part.ravel() for part in parts])
            statistics |= {
                f"ssm/{kind}/{name}_min": values.min(),
                f"ssm/{kind}/{name}_mean": jnp.exp(jnp.log(values).mean()),
                f"ssm/{kind}/{name}_max": values.max(),
            }
    return statistics
