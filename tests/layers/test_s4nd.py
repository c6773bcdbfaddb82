import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from modules import drawn, split
from oracles import direct_convolution, gelu, impulse_response, low_rank_impulse_response, sigmoid

from ssm_jax.layers import S4ND
from ssm_jax.layers.ssm_kernel import DPLRKernel, S4DKernel, SSMParam
from ssm_jax.ops import state_matrices
from ssm_jax.ops.conv import METHODS

few = settings(max_examples=6, deadline=None, derandomize=True)


def f64(x):
    return np.asarray(x, np.float64)


def small(dims, *, d_model=3, d_state=4, **arguments):
    return drawn(lambda: S4ND(d_model, dims=dims, d_state=d_state, **arguments, rngs=nnx.Rngs(0)))


def call(layer, u, **options):
    return jax.jit(lambda u: layer(u, **options))(u)


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), dtype)


def kernel_oracle(kernel, length, rate):
    d_model = kernel.inv_dt.shape[0]
    head_to_set = np.arange(d_model) % kernel.A_real.shape[0]
    A = (-np.exp(f64(kernel.A_real[...])) - 1j * f64(kernel.A_imag[...]))[head_to_set]
    B = (f64(kernel.B[0]) + 1j * f64(kernel.B[1]))[head_to_set]
    C = f64(kernel.C[0]) + 1j * f64(kernel.C[1])
    dt = np.exp(f64(kernel.inv_dt[...]))
    if kernel.bandlimit is not None:
        step = dt * rate if kernel.bandlimit_grid == "current" else dt
        C = C * (step * np.abs(A.imag) / np.pi < kernel.bandlimit)
    flat = C.reshape(-1, *C.shape[3:])
    if isinstance(kernel, DPLRKernel):
        P = (f64(kernel.P[0]) + 1j * f64(kernel.P[1]))[:, head_to_set]
        flat = low_rank_impulse_response(A, B, flat, P, dt * rate, length)
    else:
        flat = impulse_response(A, B, flat, dt * rate, length, kernel.discretization)
    return flat.reshape(*C.shape[:4], length)


def layer_oracle(layer, u, rates):
    kernels = [
        kernel_oracle(kernel, length if l_max is None else min(length, round(l_max / rate)), rate)
        for kernel, length, l_max, rate in zip(layer.kernels, u.shape[1:-1], layer.l_max, rates, strict=True)
    ]
    y = direct_convolution(u, kernels)
    y = y.reshape(*u.shape[:-1], -1, u.shape[-1])
    y = y.sum(-1) if layer.out_channels else y + f64(layer.D[...]) * u[..., None, :]
    y = y.reshape(*u.shape[:-1], -1)
    if layer.output is None:
        return y
    value, gate = np.split(gelu(y) @ f64(layer.output.kernel[...]) + f64(layer.output.bias[...]), 2, -1)
    return value * sigmoid(gate)


@pytest.mark.parametrize(
    ("lengths", "rates", "arguments"),
    [
        ((7,), (1.0,), {}),
        ((8,), (0.5,), {"bidirectional": False, "channels": 2, "discretization": "bilinear"}),
        ((5,), (2.0,), {"d_model": 4, "n_ssm": 2, "dt_tie": False, "channels": 2}),
        ((4, 5), (1.0, 2.0), {"channels": 2}),
        ((6, 3), (1.0, 1.0), {"l_max": (4, 2), "linear_output": True, "channels": 2}),
        ((6, 6), (2.0, 0.5), {"l_max": 5, "discretization": "bilinear", "bandlimit": 0.5, "d_state": 16}),
        ((3, 2, 4), (1.0, 1.0, 1.0), {"d_model": 4, "n_ssm": 4}),
        ((2, 3, 2, 3), (1.0, 2.0, 1.0, 0.5), {"bidirectional": False}),
        ((4, 3), (1.0, 2.0), {"trank": 2, "channels": 2}),
        ((4, 5), (1.0, 1.0), {"out_channels": 5}),
        ((4, 5), (2.0, 0.5), {"out_channels": 2, "channels": 2, "trank": 2, "linear_output": True}),
        ((5, 4), (1.0, 2.0), {"bandlimit": 0.5, "bandlimit_grid": "current", "d_state": 16}),
        ((5, 4), (0.5, 2.0), {"mode": "dplr", "channels": 2, "bidirectional": False, "d_state": 2}),
        ((4, 3), (1.0, 2.0), {"mode": "dplr", "rank": 2, "d_model": 4, "n_ssm": 2, "trank": 2, "d_state": 2}),
        ((4, 3), (2.0, 2.0), {"mode": "dplr", "out_channels": 2, "bandlimit": 0.4, "bandlimit_grid": "current"}),
    ],
)
def test_layer_is_direct_convolution_then_gelu_and_glu(lengths, rates, arguments):
    layer = small(len(lengths), **arguments)
    u = draw(2, *lengths, layer.d_model)
    expected = layer_oracle(layer, f64(u), rates)
    y = call(layer, u, rate=rates)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_float64_layer_has_float64_precision():
    with jax.enable_x64(True):
        layer = small(2, param_dtype=jnp.float64)
        u = draw(2, 4, 5, 3, dtype=jnp.float64)
        np.testing.assert_allclose(call(layer, u), layer_oracle(layer, f64(u), (1.0, 1.0)), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        f, params = split(small(2, d_model=2, channels=2, bandlimit=0.7, param_dtype=jnp.float64))
        arguments = (params, draw(2, 3, 4, 2, dtype=jnp.float64))
        check_grads(jax.jit(f), arguments, order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


linear = small(2, linear_output=True)
linear_call = jax.jit(lambda u: linear(u))


@few
@given(seed=st.integers(0, 100), scale=st.floats(-3, 3, width=32))
def test_linear_output_is_linear(seed, scale):
    u, v = draw(2, 6, 7, 3, seed=seed), draw(2, 6, 7, 3, seed=seed + 1)
    together, apart = linear_call(u + scale * v), linear_call(u) + scale * linear_call(v)
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-5 * float(jnp.abs(apart).max()))


@few
@given(seed=st.integers(0, 100), shift=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_shifted_input_gives_shifted_output(seed, shift):
    """Where nothing leaves the grid."""
    rows, columns = shift
    u = np.array(draw(2, 6, 7, 3, seed=seed))
    u[:, 4:], u[:, :, 5:] = 0.0, 0.0
    y, shifted = np.asarray(linear_call(u)), np.asarray(linear_call(np.roll(u, shift, axis=(1, 2))))
    atol = 1e-5 * np.abs(y).max()
    np.testing.assert_allclose(shifted[:, rows:, columns:], y[:, : 6 - rows, : 7 - columns], rtol=0, atol=atol)


def test_rate_one_is_no_rate_and_one_rate_is_for_all_axes():
    layer = small(2)
    rates = [None, 1.0, (1.0, 1.0), 2.0, (2.0, 2.0), (1.0, 2.0), (2.0, 1.0)]
    outputs = jax.jit(lambda u: [layer(u) if rate is None else layer(u, rate=rate) for rate in rates])
    one, *ones, two, twos, one_two, two_one = outputs(draw(2, 4, 5, 3))
    for same in ones:
        np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(two, twos)
    assert not np.allclose(one_two, two_one)


def test_pixels_doubled_in_size_give_the_same_output_at_half_the_rate():
    """A constant over a step is exactly what zoh holds; the coarse samples are at the ends of the fine pairs."""
    layer = small(2, bidirectional=False, linear_output=True)
    layer.D[...] = jnp.zeros_like(layer.D[...])
    u = draw(1, 3, 4, 3)
    fine = np.asarray(call(layer, np.repeat(np.repeat(u, 2, axis=1), 2, axis=2)))[:, 1::2, 1::2]
    np.testing.assert_allclose(call(layer, u, rate=2.0), fine, rtol=0, atol=1e-5 * np.abs(fine).max())


@pytest.mark.parametrize(
    ("l_max", "rate", "lengths"),
    [(None, 2.0, (9, 8)), (6, 1.0, (6, 6)), (6, 4.0, (2, 2)), ((5, 20), 2.0, (2, 8)), (6, (0.5, 2.0), (9, 3))],
)
def test_kernels_are_as_long_as_l_max_at_the_rate_allows(l_max, rate, lengths):
    """min(length, round(l_max / rate)), halves to even."""
    layer = small(2, l_max=l_max)
    kernels = jax.eval_shape(lambda: layer.sample_kernels((9, 8), rate=rate))
    assert tuple(kernel.shape[-1] for kernel in kernels) == lengths


def test_read_outs_and_axes_have_separate_kernels():
    layer = small(2, channels=2)
    rows, columns = jax.jit(lambda: layer.sample_kernels((5, 5)))()
    kernels = np.concatenate([rows.reshape(4, 3, 5), columns.reshape(4, 3, 5)])
    assert len(np.unique(np.round(kernels[:, 0, 0], 4))) == 8


def limited(bandlimit):
    return drawn(lambda: S4DKernel(3, d_state=32, bandlimit=bandlimit, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_bandlimit_is_relative_to_the_base_grid(rate):
    """Modes at or above it are absent, and the same ones at every rate."""
    kernel = limited(0.3)
    expected = kernel_oracle(kernel, 6, rate)
    result = jax.jit(lambda: kernel(6, rate=rate))()
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_masked_modes_get_no_gradient():
    kernel = limited(0.3)
    f, params = split(kernel)
    grads = jax.tree.map(np.asarray, jax.jit(jax.grad(lambda params: jnp.sum(f(params, 6) ** 2)))(params))
    cycles = np.exp(kernel.inv_dt[...]) * np.abs(kernel.A_imag[...]) / (2 * np.pi)
    kept = np.broadcast_to(cycles < 0.15, grads["C"].shape)
    np.testing.assert_array_equal(grads["C"] != 0, kept)
    used = kept.any(axis=(0, 1, 2, 3, 4))
    assert 0 < used.mean() < 1
    for gradient in (grads["A_real"][0], grads["A_imag"][0], *grads["B"][:, 0]):
        np.testing.assert_array_equal(gradient != 0, used)


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_bandlimit_of_the_current_grid_moves_with_the_rate(rate):
    kernel = drawn(lambda: S4DKernel(3, d_state=32, bandlimit=0.3, bandlimit_grid="current", rngs=nnx.Rngs(0)))
    expected = kernel_oracle(kernel, 6, rate)
    assert not np.allclose(expected, kernel_oracle(limited(0.3), 6, rate))
    np.testing.assert_allclose(
        jax.jit(lambda: kernel(6, rate=rate))(), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_infinite_bandlimit_is_none():
    everything, infinite = limited(None), limited(float("inf"))
    np.testing.assert_array_equal(jax.jit(lambda: everything(8))(), jax.jit(lambda: infinite(8))())


def started(build):
    """With its own initial values, compiled at once."""
    graphdef = nnx.split(nnx.eval_shape(build))[0]
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(build()))())


@pytest.fixture(scope="module")
def wide():
    return started(lambda: S4ND(2048, dims=1, channels=2, d_state=4, dt_min=0.001, dt_max=0.1, rngs=nnx.Rngs(0)))


def test_steps_start_log_uniform(wide):
    log_dt = f64(wide.kernels[0].inv_dt[...])
    low, high = np.log([0.001, 0.1])
    assert log_dt.min() >= low - 1e-5
    assert log_dt.max() <= high + 1e-5
    assert log_dt.mean() == pytest.approx((low + high) / 2, abs=5 * (high - low) / (12 * 2048) ** 0.5)
    assert log_dt.var() == pytest.approx((high - low) ** 2 / 12, rel=0.05)


def test_read_outs_start_with_variance_one(wide):
    C = f64(wide.kernels[0].C[...])
    assert np.mean(C[0] ** 2 + C[1] ** 2) == pytest.approx(1.0, abs=0.03)
    assert np.mean(C[0] ** 2) == pytest.approx(0.5, abs=0.02)
    assert abs(np.mean(C[0] * C[1])) < 0.02


def test_skip_connection_starts_normal(wide):
    D = f64(wide.D[...])
    assert D.mean() == pytest.approx(0.0, abs=0.06)
    assert D.var() == pytest.approx(1.0, abs=0.08)
    assert np.mean(D**4) == pytest.approx(3.0, abs=0.5)


@pytest.mark.parametrize("mode", ["diag", "dplr"])
def test_deterministic_start(mode):
    """Steps at equal ratios, and the same read-out of the state's first coordinate everywhere."""
    options = {"channels": 2, "deterministic": True, "d_state": 8, "n_ssm": 2, "init": "hippo"}
    kernel = started(lambda: S4ND(6, mode=mode, **options, rngs=nnx.Rngs(0))).kernels[0]
    np.testing.assert_allclose(np.exp(f64(kernel.inv_dt[...]))[:, 0], np.geomspace(0.1, 1.0, 6), rtol=1e-5)
    first = state_matrices("hippo", 8, n_ssm=2).C
    C = f64(kernel.C[0]) + 1j * f64(kernel.C[1])
    np.testing.assert_allclose(C, np.broadcast_to(np.tile(first, (3, 1)), C.shape), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"channels": 2, "trank": 2, "mode": "dplr"}, {"out_channels": 2}], ids=str)
def test_all_methods_of_convolution_agree(method, options):
    u = draw(2, 4, 5, 3)
    expected = call(small(2, conv="fft_nd", d_state=2, **options), u)
    y = call(small(2, conv=method, d_state=2, **options), u)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * float(jnp.abs(expected).max()))


def test_integers_are_rates():
    layer, u = small(2), draw(2, 4, 5, 3)
    np.testing.assert_array_equal(call(layer, u, rate=2), call(layer, u, rate=2.0))
    np.testing.assert_array_equal(call(layer, u, rate=(1, 2)), call(layer, u, rate=(1.0, 2.0)))


def test_output_map_starts_uniform_by_fan_in():
    output = started(lambda: S4ND(64, dims=1, channels=2, d_state=2, rngs=nnx.Rngs(0))).output
    bound = (2 * 64) ** -0.5
    for parameter in (f64(output.kernel[...]), f64(output.bias[...])):
        assert np.abs(parameter).max() <= bound
        assert np.abs(parameter).max() > 0.95 * bound
        assert parameter.var() == pytest.approx(bound**2 / 3, rel=0.25)


@pytest.mark.parametrize("init", ["legs", "legt", "fourier", "diag-lin", "diag-real"])
@pytest.mark.parametrize("transforms", [{}, {"real_transform": "softplus", "imag_transform": "softplus"}], ids=str)
def test_modes_start_as_the_table_says_but_not_below_the_floor(init, transforms):
    table = state_matrices(init, 64)
    kernel = S4DKernel(2, init=init, **transforms, rngs=nnx.Rngs(0))
    softplus = lambda x: np.logaddexp(x, 0)  # noqa: E731
    decay = (softplus if transforms else np.exp)(f64(kernel.A_real[...]))
    frequency = (softplus if transforms else lambda x: x)(f64(kernel.A_imag[...]))
    np.testing.assert_allclose(decay, np.maximum(-table.A.real, 1e-4), rtol=1e-5)
    np.testing.assert_allclose(frequency, np.maximum(-table.A.imag, 1e-4), rtol=1e-5)
    np.testing.assert_allclose(f64(kernel.B[0]) + 1j * f64(kernel.B[1]), table.B, rtol=1e-6, atol=1e-6)


def test_transforms_change_parameters_and_not_the_kernel():
    transforms = {"dt_transform": "sigmoid", "real_transform": "softplus", "imag_transform": "exp"}
    plain, other = (S4DKernel(2, dt_max=0.9, **options, rngs=nnx.Rngs(0)) for options in ({}, transforms))
    for name in ("inv_dt", "A_real", "A_imag"):
        assert not np.allclose(getattr(plain, name)[...], getattr(other, name)[...])
    kernels = jax.jit(lambda: (plain(6), other(6)))()
    np.testing.assert_allclose(*kernels, rtol=0, atol=1e-4)


def test_initial_values_follow_their_options():
    options = {"imag_scale": 0.5, "B_init": "alternating", "P_scale": 0.0}
    plain, other = (
        DPLRKernel(2, d_state=8, init="dplr-inv", init_options=o, rngs=nnx.Rngs(0)) for o in (None, options)
    )
    np.testing.assert_allclose(other.A_imag[...], np.maximum(0.5 * plain.A_imag[...], 1e-4), rtol=1e-6)
    np.testing.assert_array_equal(other.B[0], [[1, -1, 1, -1]])
    assert np.all(plain.P[...] != 0)
    assert np.all(other.P[...] == 0)


def test_dynamics_are_marked_for_their_own_learning_rate():
    kernel = nnx.eval_shape(lambda: S4DKernel(3, rngs=nnx.Rngs(0)))
    marked = {name for name in ("inv_dt", "A_real", "A_imag", "B", "C") if isinstance(getattr(kernel, name), SSMParam)}
    assert marked == {"inv_dt", "A_real", "A_imag", "B"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_input_is_convolved_in_float32(dtype):
    layer, exact = small(2, linear_output=True, dtype=dtype, conv="fft_nd"), small(2, linear_output=True)
    u = draw(2, 4, 5, 3, dtype=dtype)
    y, expected = call(layer, u), call(exact, u.astype(jnp.float32))
    assert y.dtype == dtype
    np.testing.assert_allclose(f64(y), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)  # rounded once


def test_bfloat16_output_agrees_with_float32_to_its_rounding():
    layer, exact = small(2, d_model=8, dtype=jnp.bfloat16), small(2, d_model=8)
    u = draw(2, 4, 5, 8, dtype=jnp.bfloat16)
    y, expected = call(layer, u), f64(call(exact, u.astype(jnp.float32)))
    assert y.dtype == jnp.bfloat16
    error = np.abs(f64(y) - expected).max()
    assert 0 < error < 4 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(expected).max()


def test_parameters_are_float32_whatever_the_dtype():
    layer = nnx.eval_shape(lambda: S4ND(8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("method", ["fft", "fft_nd"])
def test_no_bfloat16_reaches_the_fft(method):
    layer = small(2, dtype=jnp.bfloat16, conv=method)
    program = jax.jit(lambda u: layer(u)).lower(jnp.ones((2, 4, 5, 3), jnp.bfloat16)).as_text()
    ffts = [line for line in program.splitlines() if "stablehlo.fft" in line]
    assert ffts
    assert all("f32" in line and "bf16" not in line for line in ffts)
    assert any("stablehlo.dot_general" in line and "bf16" in line for line in program.splitlines())


def train(layer, u, seed):
    return np.asarray(jax.jit(lambda u: layer(u, rngs=nnx.Rngs(dropout=seed)))(u))


def test_dropout_drops_whole_features_and_scales_the_others():
    layer = small(2, d_model=32, dropout=0.25)
    layer.output.kernel[...] = jnp.concatenate([jnp.eye(32), jnp.zeros((32, 32))], axis=1)  # hands its input through
    layer.output.bias[...] = jnp.repeat(jnp.array([0.0, 100.0]), 32)
    u = draw(4, 3, 5, 32)
    whole = call(nnx.view(layer, deterministic=True), u)
    y = train(layer, u, 0)
    dropped = (y == 0).all(axis=(1, 2))
    assert dropped.mean() == pytest.approx(0.25, abs=0.15)
    assert len(np.unique(dropped, axis=0)) == 4
    np.testing.assert_allclose(y, np.where(dropped[:, None, None], 0, whole / 0.75), rtol=1e-5, atol=1e-6)


def test_dropout_is_that_of_its_key():
    layer, u = small(2, dropout=0.5), draw(2, 3, 5, 3)
    np.testing.assert_array_equal(train(layer, u, 0), train(layer, u, 0))
    assert not np.array_equal(train(layer, u, 0), train(layer, u, 1))


def test_deterministic_view_has_no_dropout():
    u = draw(2, 3, 5, 3)
    layer = nnx.view(small(2, dropout=0.5), deterministic=True)
    np.testing.assert_array_equal(call(layer, u), call(small(2, dropout=0.0), u))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_ssm": 2}, "n_ssm must be a divisor of d_model: got n_ssm=2, d_model=3"),
        ({"n_ssm": 0}, "n_ssm must be a divisor"),
        ({"d_model": 0}, "d_model=0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"dt_min": 0.0}, "dt_min=0.0"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_max=0.1"),
        ({"dt_max": float("inf")}, "dt_max=inf"),
        ({"dt_min": float("nan")}, "dt_min=nan"),
        ({"discretization": "euler"}, "discretization must be 'zoh' or 'bilinear', got 'euler'"),
        ({"bandlimit": 0.0}, "bandlimit must be positive.*got 0.0"),
        ({"bandlimit": float("nan")}, "bandlimit must be positive.*got nan"),
        ({"param_dtype": jnp.bfloat16}, "param_dtype of a state space must be float32 or float64, got bfloat16"),
        ({"param_dtype": jnp.int32}, "param_dtype.*got int32"),
        ({"param_dtype": jnp.complex64}, "param_dtype.*got complex64"),
        ({"dt_transform": "log"}, "dt_transform must be one of .*got 'log'"),
        ({"real_transform": "log"}, "real_transform must be one of .*got 'log'"),
        ({"imag_transform": "log"}, "imag_transform must be one of .*got 'log'"),
        ({"dt_transform": "sigmoid"}, "dt_transform='sigmoid' stays below 1, but the initial values reach 1"),
        ({"imag_transform": "sigmoid"}, "imag_transform='sigmoid' stays below 1, but the initial values reach"),
        ({"d_state": 5}, "d_state must be even"),
        ({"init": "diag_inv"}, "init must be one of .*Did you mean 'diag-inv'"),
        ({"init": "hippo", "n_ssm": 3}, "n_ssm must be a positive multiple of 2"),
        ({"dims": 0}, "dims must be at least 1, got 0"),
        ({"l_max": 0}, "l_max must be at least 1, one number or one for each of 2 axes, got 0"),
        ({"l_max": (8,)}, "l_max must be at least 1, one number or one for each of 2 axes, got "),
        ({"l_max": (8, -1)}, "l_max must be at least 1.*-1"),
        ({"mode": "dense"}, "mode must be 'diag' or 'dplr', got 'dense'"),
        ({"conv": "direct"}, "conv must be one of auto, .*, got 'direct'"),
        ({"out_channels": 0}, "out_channels must be at least 1, or None for d_model, got 0"),
        ({"trank": 0}, "trank must be at least 1, got 0"),
        ({"bandlimit_grid": "fine"}, "bandlimit_grid must be 'base' or 'current', got 'fine'"),
        ({"deterministic": True, "dt_tie": False}, "deterministic.*dt_tie is False"),
        ({"mode": "dplr", "dt_tie": False}, "dt_tie must be True"),
        ({"mode": "dplr", "discretization": "zoh"}, "discretization is bilinear for low-rank"),
        ({"mode": "dplr", "rank": 0}, "rank must be at least 1, got 0"),
        ({"mode": "dplr", "init": "legt"}, "rank must be at least 2 for init='legt', got 1"),
        ({"mode": "dplr", "l_kernel": -1}, "l_kernel must be at least 0.*-1"),
        ({"mode": "dplr", "l_kernel": (8,)}, "l_kernel must be at least 0.*each of 2 axes"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout must be in"),
    ],
    ids=str,
)
def test_impossible_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        S4ND(**{"d_model": 3, "dims": 2} | arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 4, 4, 4, 3), (2, 4, 4, 5), (0, 4, 4, 3), (2, 0, 4, 3)], ids=str)
def test_input_of_another_shape_is_rejected(shape):
    with pytest.raises(ValueError, match=r"u must be \(batch, 2 axes, d_model=3\), not empty, got shape"):
        small(2)(jnp.ones(shape))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "complex64"])
def test_input_that_is_not_floating_point_is_rejected(dtype):
    with pytest.raises(ValueError, match=f"u must be floating-point, got {dtype}; for images: u.astype"):
        small(2)(jnp.ones((2, 4, 4, 3), dtype))


def test_rate_may_be_a_number_of_numpy():
    u = draw(2, 4, 4, 3)
    np.testing.assert_array_equal(call(small(2), u, rate=np.float64(2.0)), call(small(2), u, rate=2.0))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan"), (1.0,), (1.0, 0.0), (1.0, 1.0, 1.0)], ids=str)
def test_impossible_rate_is_rejected(rate):
    with pytest.raises(ValueError, match="rate must be positive, one number or one for each of 2 axes, got "):
        small(2)(jnp.ones((2, 4, 4, 3)), rate=rate)


def test_a_traced_rate_is_answered_with_what_to_do():
    layer = small(2)
    rates = S4ND._rates.__wrapped__  # as users have it, without the tests' checks of types
    with pytest.raises(TypeError, match=r"^rate must be known when a function is compiled, .*static_argnames='rate'"):
        jax.jit(lambda rate: rates(layer, rate))(0.5)


def test_axes_may_have_options_of_their_own():
    own = [{"d_state": 6, "bandlimit": 0.5}, {}]
    layer = S4ND(4, dims=2, d_state=8, per_axis=own, rngs=nnx.Rngs(0))
    assert [kernel.C.shape[-1] for kernel in layer.kernels] == [3, 4]
    assert [kernel.bandlimit for kernel in layer.kernels] == [0.5, None]
    with pytest.raises(ValueError, match="per_axis must have options for each of 2 axes, got 1"):
        S4ND(4, dims=2, per_axis=own[:1], rngs=nnx.Rngs(0))
