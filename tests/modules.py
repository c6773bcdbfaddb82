"""Modules with drawn parameters, as initial values take seconds to compile, and what goes with them."""

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


def images(*shape, seed=0):
    """Normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(actual, expected, tolerance=1e-5):
    """Of one shape, and equal to within a part of the largest expected value."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def size(module):
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def together(block, read, h):
    """The first convolution of a residual block over [x, h], which is formed, with one kernel for both."""

    def first(x):
        kernel = jnp.concatenate([block.conv1.kernel[...], read.kernel[...]], axis=2)
        pad, strides = (kernel.shape[0] // 2,) * 2, np.broadcast_to(block.conv1.strides, 2).tolist()
        return jax.lax.conv_general_dilated(
            jnp.concatenate([x, h], axis=-1), kernel, strides, (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return first
