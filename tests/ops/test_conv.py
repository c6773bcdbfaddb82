import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from oracles import direct_convolution

from ssm_jax.ops.conv import METHODS, choose
from ssm_jax.ops.conv import conv as eager_conv

few = settings(max_examples=8, deadline=None, derandomize=True)


conv = jax.jit(eager_conv, static_argnames="method")


def draw(lengths, kernel_lengths, *, directions=2, rank=1, channels=1, heads=2, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(2, *lengths, heads)).astype(dtype)
    return u, [rng.normal(size=(directions, rank, channels, heads, length)).astype(dtype) for length in kernel_lengths]


def assert_direct(u, kernels, methods=METHODS):
    expected = direct_convolution(u, kernels)
    for method in methods:
        y = conv(u, kernels, method=method)
        assert y.dtype == u.dtype
        atol = 20 * np.finfo(u.dtype).eps * np.abs(expected).max()
        np.testing.assert_allclose(y, expected, rtol=0, atol=atol, err_msg=method)


@pytest.mark.parametrize("directions", [1, 2], ids=["one-sided", "two-sided"])
@pytest.mark.parametrize(
    ("lengths", "kernel_lengths"),
    [
        ((8,), (8,)),
        ((7,), (7,)),
        ((9,), (4,)),
        ((1,), (1,)),
        ((6, 6), (6, 6)),
        ((5, 8), (5, 8)),
        ((7, 4), (3, 1)),
        ((3, 4, 5), (3, 4, 5)),
        ((4, 3, 2), (2, 3, 1)),
        ((3, 2, 3, 2), (3, 2, 3, 2)),
        ((2, 3, 2, 3), (1, 3, 2, 2)),
    ],
)
def test_every_method_is_the_direct_sum(lengths, kernel_lengths, directions):
    assert_direct(*draw(lengths, kernel_lengths, directions=directions, rank=2, channels=2))


@pytest.mark.parametrize("method", METHODS)
def test_skip_is_added_for_every_channel(method):
    u, kernels = draw((4, 5), (4, 3), channels=3)
    D = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    expected = direct_convolution(u, kernels) + (D * u[..., None, :]).reshape(*u.shape[:-1], 6)
    np.testing.assert_allclose(conv(u, kernels, D, method=method), expected, rtol=0, atol=1e-5)


def test_float64_has_float64_precision():
    with jax.enable_x64(True):
        assert_direct(*draw((5, 4), (5, 3), dtype=np.float64))


@few
@given(
    axes=st.lists(
        st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=3
    ),
    directions=st.sampled_from([1, 2]),
    seed=st.integers(0, 100),
)
def test_it_is_the_direct_sum_at_any_size(axes, directions, seed):
    lengths, kernel_lengths = zip(*axes, strict=True)
    assert_direct(*draw(lengths, kernel_lengths, directions=directions, seed=seed), methods=["auto", "fft_nd"])


def response_to_impulse(kernels, lengths, at):
    u = np.zeros((1, *lengths, 1), np.float32)
    u[0, *at] = 1.0
    return np.asarray(conv(u, [np.array(k, np.float32)[:, None, None, None] for k in kernels]))[0, ..., 0]


def test_two_sided_kernel_starts_at_lag_minus_one():
    y = response_to_impulse([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]], (7,), at=(3,))
    np.testing.assert_allclose(y, [30, 20, 10, 1, 2, 3, 0], atol=1e-5)


def test_one_sided_kernel_is_causal():
    y = response_to_impulse([[[1.0, 2.0, 3.0]]], (7,), at=(3,))
    np.testing.assert_allclose(y, [0, 0, 0, 1, 2, 3, 0], atol=1e-5)


def test_there_is_no_wrap_around():
    y = response_to_impulse([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]], (3,), at=(2,))
    np.testing.assert_allclose(y, [20, 10, 1], atol=1e-5)


def test_kernel_over_axes_is_an_outer_product():
    y = response_to_impulse([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], (4, 4), at=(2, 2))
    np.testing.assert_allclose(y, np.outer([4, 3, 1, 2], [8, 7, 5, 6]), atol=1e-4)


@few
@given(seed=st.integers(0, 100), scale=st.floats(-3, 3, width=32))
def test_convolution_is_linear(seed, scale):
    u, kernels = draw((4, 5), (4, 3), seed=seed)
    v, _ = draw((4, 5), (4, 3), seed=seed + 1)
    scale = np.float32(scale)
    together, apart = conv(u + scale * v, kernels), conv(u, kernels) + scale * np.asarray(conv(v, kernels))
    np.testing.assert_allclose(together, apart, rtol=0, atol=2e-4)


@few
@given(seed=st.integers(0, 100), shift=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_shifted_input_gives_shifted_output(seed, shift):
    """Where nothing leaves the grid."""
    u, kernels = draw((6, 7), (6, 7), seed=seed)
    u[:, 4:], u[:, :, 5:] = 0.0, 0.0
    rows, columns = shift
    y, shifted = np.asarray(conv(u, kernels)), np.asarray(conv(np.roll(u, shift, axis=(1, 2)), kernels))
    np.testing.assert_allclose(shifted[:, rows:, columns:], y[:, : 6 - rows, : 7 - columns], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("directions", [1, 2])
def test_gradients_are_those_of_finite_differences(directions, method):
    with jax.enable_x64(True):
        u, kernels = draw((3, 4), (3, 2), directions=directions, rank=2, channels=2, dtype=np.float64)
        f = lambda u, kernels: conv(u, kernels, method=method)  # noqa: E731
        check_grads(f, (u, kernels), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("lengths", "kernel_lengths"), [((7,), (3,)), ((3, 4, 5), (3, 2, 5)), ((2, 3, 2, 3),) * 2])
def test_gradients_of_all_methods_agree(lengths, kernel_lengths):
    u, kernels = draw(lengths, kernel_lengths, rank=2, channels=2)
    grad = jax.jit(
        jax.grad(lambda u, kernels, method: conv(u, kernels, method=method).__pow__(2).sum(), argnums=(0, 1)),
        static_argnums=2,
    )
    expected = jax.tree.leaves(grad(u, kernels, "fft_nd"))
    for method in METHODS:
        for ours, theirs in zip(jax.tree.leaves(grad(u, kernels, method)), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=method)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_and_is_close_to_float32(method):
    u, kernels = draw((6, 5), (6, 3), rank=2, channels=2)
    half = jnp.array(u, jnp.bfloat16)
    y, expected = conv(half, kernels, method=method), conv(half.astype(jnp.float32), kernels, method="fft_nd")
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0, atol=0.02 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("backend", [None, "cpu", "gpu", "tpu", "other"])
def test_choice_is_a_method_along_one_axis(backend):
    assert {choose(length, backend) for length in range(1, 4097)} <= {"toeplitz", "dft", "fft"}


def test_unknown_method_is_rejected():
    with pytest.raises(ValueError, match="method must be one of auto, toeplitz, dft, fft, fft_nd, got 'direct'"):
        conv(*draw((3,), (3,)), method="direct")


def test_every_axis_needs_a_kernel():
    u, kernels = draw((3, 4), (3,))
    with pytest.raises(ValueError, match=r"kernels must have one entry per axis: got 1 for u of shape \(2, 3, 4, 2\)"):
        conv(u, kernels)
