from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import assert_close, drawn, images, together

from ssm_jax.layers.aggregation import Aggregation, beside, halved, reader
from ssm_jax.models.resnet import BasicBlock, Bottleneck


@pytest.mark.parametrize(
    "build",
    [
        lambda: Bottleneck(8, 4, stride=2, rngs=nnx.Rngs(0)),
        lambda: BasicBlock(8, 6, rngs=nnx.Rngs(0)),
        lambda: BasicBlock(8, 6, stride=2, rngs=nnx.Rngs(0)),
    ],
    ids=["1 x 1", "3 x 3", "3 x 3 with a stride"],
)
def test_a_kernel_cut_in_two_is_one_over_map_and_state(build):
    """In values and all gradients."""
    block = drawn(build)
    read = drawn(lambda: reader(block, 4, param_dtype=jnp.float32, rngs=nnx.Rngs(0)), seed=1)
    x, h = jnp.asarray(images(2, 6, 4, 8)), jnp.asarray(images(2, 6, 4, 4, seed=1))
    graphdef, kernels = nnx.split((block.conv1, read))

    def loss(of, kernels, x, h):
        first, second = nnx.merge(graphdef, kernels)
        y = of(SimpleNamespace(conv1=first), second, h)(x)
        return jnp.sum(jnp.sin(y)), y

    results = [
        jax.value_and_grad(lambda *args, of=of: loss(of, *args), argnums=(0, 1, 2), has_aux=True)(kernels, x, h)
        for of in (beside, together)
    ]
    ((_, y), grads), ((_, expected), expected_grads) = results
    assert_close(y, expected)
    jax.tree.map(assert_close, nnx.to_pure_dict(grads[0]), nnx.to_pure_dict(expected_grads[0]))
    jax.tree.map(assert_close, grads[1:], expected_grads[1:])


def test_states_are_averaged_where_maps_halve():
    h = jnp.asarray(images(1, 4, 6, 3))
    expected = np.asarray(h).reshape(1, 2, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(halved(h, (2, 3)), expected, rtol=1e-6)
    assert halved(h, (4, 6)) is h
    h = jnp.asarray(images(1, 5, 3, 2))
    np.testing.assert_allclose(halved(h, (3, 2))[0, 2, 1], h[0, 4, 2], rtol=1e-6)  # a corner of one position


def test_what_is_not_written_is_told():
    class Nothing(Aggregation):
        pass

    x = jnp.ones((1, 2, 2, 3))
    with pytest.raises(NotImplementedError, match=r"Nothing must define start\."):
        Nothing().start(x, None)
    with pytest.raises(NotImplementedError, match=r"Nothing must define __call__\."):
        Nothing()(None, None, x, None, 0.0)
