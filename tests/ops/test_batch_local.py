import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from modules import drawn, split

from ssm_jax import S4ND, compiled, create_model
from ssm_jax.ops import batch_local, conv
from ssm_jax.ops.conv import _fft_nd as plain_fft
from ssm_jax.training.sharding import batch_sharding, make_mesh, replicated

MESHES = [{"data": 8}, {"data": 4, "fsdp": 2}, {"fsdp": 8}]


@pytest.fixture(params=MESHES, ids=str)
def any_mesh(request):
    mesh = make_mesh(request.param)
    with jax.set_mesh(mesh):
        yield mesh


METHODS = ["auto", "fft", "fft_nd"]


def loss(convolve, u, kernels):
    return jnp.sum(jnp.sin(convolve(u, kernels)))


def fft(u, kernels):
    return conv(u, kernels, method="fft_nd")


def inputs(batch=8):
    rng = np.random.default_rng(0)
    u = rng.normal(size=(batch, 5, 4, 3)).astype(np.float32)
    return u, [rng.normal(size=(2, 1, 1, 3, length)).astype(np.float32) for length in (5, 4)]


def collectives(f, mesh, weights, x):
    """Bytes by kind, of the compiled program for weights on every device and rows of `x` divided over them."""
    f = jax.jit(f, in_shardings=(replicated(mesh), batch_sharding(mesh)))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (weights, x))
    totals = Counter()
    for collective in compiled.collectives(f.lower(*shapes).compile().as_text()):
        totals[collective.kind] += collective.count * collective.bytes
    return totals


def test_sharded_value_and_gradient_are_those_of_one_device(any_mesh):
    u, kernels = inputs()
    both = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), static_argnums=0)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        expected = both(plain_fft, u, kernels)
    result = both(fft, jax.device_put(u, batch_sharding(any_mesh)), jax.device_put(kernels, replicated(any_mesh)))
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=2e-5)


def test_output_stays_where_the_input_is(mesh):
    u, kernels = inputs()
    y = jax.jit(fft)(jax.device_put(u, batch_sharding(mesh)), kernels)
    assert y.sharding.is_equivalent_to(batch_sharding(mesh), y.ndim)


@pytest.mark.parametrize("method", [*METHODS, "toeplitz", "dft"])
def test_convolution_communicates_only_gradients(any_mesh, method):
    u, kernels = inputs()
    forward = lambda kernels, u: conv(u, kernels, method=method)  # noqa: E731
    backward = jax.grad(lambda kernels, u: jnp.sum(jnp.sin(forward(kernels, u))))
    assert collectives(backward, any_mesh, kernels, u).keys() == {"all-reduce"}
    assert not collectives(forward, any_mesh, kernels, u)


def test_xla_alone_would_gather_the_batch(any_mesh):
    """The reason for batch_local, openxla/xla#24. Should this fail, XLA has learned it and batch_local can go."""
    u, kernels = inputs()
    assert "all-gather" in collectives(lambda kernels, u: plain_fft(u, kernels), any_mesh, kernels, u)
    assert "all-gather" in collectives(jax.grad(lambda kernels, u: loss(plain_fft, u, kernels)), any_mesh, kernels, u)


def gradient(build):
    """Of a scalar of the module's output, as a function of (parameters, input), and the parameters."""
    f, params = split(drawn(build))
    return jax.value_and_grad(lambda params, x: jnp.mean(jnp.sin(f(params, x)))), params


def small_layer(dims, method):
    return S4ND(4, dims=dims, d_state=4, conv=method, rngs=nnx.Rngs(0))


def small_network(method):
    mixer = {"d_state": 4, "conv": method}
    return create_model(
        "isotropic_s4nd", num_classes=3, d_model=4, n_layers=2, dropout=0.0, mixer=mixer, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize(("axes", "dims"), [({"data": 8}, 1), ({"data": 4, "fsdp": 2}, 2)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_layer_communicates_only_gradients(axes, dims, method):
    f, params = gradient(lambda: small_layer(dims, method))
    with jax.set_mesh(mesh := make_mesh(axes)):
        assert collectives(f, mesh, params, jnp.ones((8, *(4, 3)[:dims], 4))).keys() == {"all-reduce"}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_summed_are_gradients_of_kernels(method, mesh):
    """And not of what the convolution makes of them, 32 x 32 matrices or spectra; whatever the batch."""
    f, params = gradient(lambda: small_layer(1, method))
    small, large = (collectives(f, mesh, params, jnp.ones((batch, 32, 4)))["all-reduce"] for batch in (8, 16))
    kernel = 4 * 2 * 32 * 4  # float32, two-sided
    assert 0 < small == large <= kernel + sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + 64


def test_layer_without_batch_local_would_gather(mesh, monkeypatch):
    monkeypatch.setattr(sys.modules["ssm_jax.ops.conv"], "batch_local", lambda fn: fn)
    f, params = gradient(lambda: small_layer(2, "fft_nd"))
    assert "all-gather" in collectives(f, mesh, params, jnp.ones((8, 4, 3, 4)))


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "fsdp": 2}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_network_communicates_only_gradients(axes, method):
    f, params = gradient(lambda: small_network(method))
    with jax.set_mesh(mesh := make_mesh(axes)):
        assert collectives(f, mesh, params, jnp.ones((8, 4, 4, 3))).keys() == {"all-reduce"}


@pytest.mark.parametrize("axes", [{"model": 8}, {"data": 1, "model": 8}], ids=str)
def test_function_runs_as_it_is_where_the_batch_is_not_divided(axes):
    shapes = []
    with jax.set_mesh(jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))):
        jax.jit(batch_local(lambda x: shapes.append(x.shape) or x))(np.ones((3, 2)))
    assert shapes == [(3, 2)]


def test_function_runs_as_it_is_without_a_mesh():
    shapes = []
    batch_local(lambda x: shapes.append(x.shape) or x)(jnp.ones((3, 2)))
    assert shapes == [(3, 2)]


def test_function_sees_the_rows_of_one_device(any_mesh):
    shapes = []
    x = batch_local(lambda x, w: shapes.append(x.shape) or x * w)(jnp.ones((16, 3)), jnp.array(2.0))
    np.testing.assert_array_equal(x, np.full((16, 3), 2.0))
    assert shapes == [(2, 3)]


def test_nothing_is_divided_twice(mesh):
    u, kernels = inputs(batch=16)
    rows = PartitionSpec("data")
    y = jax.jit(jax.shard_map(fft, in_specs=(rows, PartitionSpec()), out_specs=rows))(u, kernels)
    np.testing.assert_allclose(y, jax.jit(plain_fft)(u, kernels).reshape(y.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_uneven_batch_is_rejected(axes):
    u, kernels = inputs(batch=12)
    with jax.set_mesh(make_mesh(axes)), pytest.raises(ValueError, match=r"batch size must be a multiple of 8.*got 12"):
        jax.jit(fft)(u, kernels)


def test_xla_alone_would_gather_the_batch_of_matrix_products_too(mesh, monkeypatch):
    monkeypatch.setattr(sys.modules["ssm_jax.ops.conv"], "batch_local", lambda fn: fn)
    u, kernels = inputs()
    assert "all-gather" in collectives(lambda kernels, u: conv(u, kernels, method="toeplitz"), mesh, kernels, u)
