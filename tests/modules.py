"""Modules with drawn parameters: the initial values of real ones take seconds to compile."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def drawn(build, seed=0):
    """What `build` builds, with all parameters normal."""
    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(leaf.dtype)), abstract)
    return nnx.merge(graphdef, state)


def split(module):
    """A pure function of (parameters, *arguments), and the parameters."""
    graphdef, state = nnx.split(module)
    return lambda state, *args, **kwargs: nnx.merge(graphdef, state, copy=True)(*args, **kwargs), nnx.to_pure_dict(
        state
    )
