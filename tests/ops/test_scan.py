import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from jaxtyping import config

from ssm_jax.ops import linear_recurrence, selective_discretize, selective_scan, selective_states, selective_step
from ssm_jax.ops.scan import METHODS, choose
from ssm_jax.training.sharding import batch_sharding, replicated

scan = jax.jit(linear_recurrence, static_argnames=("axis", "reverse"))


def loop(a, b, axis, h0=None, reverse=False):
    a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
    h = np.zeros_like(b)
    state = np.zeros_like(b[0]) if h0 is None else h0
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        state = h[t] = a[t] * state + b[t]
    return np.moveaxis(h, 0, axis)


def draw(shape, axis, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    a = rng.uniform(-1, 1, shape).astype(dtype)
    h0 = rng.normal(size=np.delete(shape, axis)).astype(dtype)
    return a, rng.normal(size=shape).astype(dtype), h0


@settings(max_examples=15, deadline=None, derandomize=True)
@given(length=st.integers(1, 50), reverse=st.booleans(), start=st.booleans(), seed=st.integers(0, 100))
def test_scan_is_the_loop_at_any_length(length, reverse, start, seed):
    a, b, h0 = draw((length, 2), 0, seed)
    h = scan(a, b, axis=0, h0=h0 if start else None, reverse=reverse)
    np.testing.assert_allclose(h, loop(a, b, 0, h0 if start else None, reverse), rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("reverse", [False, True])
def test_time_is_along_any_axis(axis, reverse):
    a, b, h0 = draw((3, 4, 5), axis)
    h = scan(a, b, axis=axis, h0=h0, reverse=reverse)
    np.testing.assert_allclose(h, loop(a, b, axis, h0, reverse), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_initial_state_acts_before_the_first_step(reverse):
    a, b, h0 = draw((6, 2), 0)
    both = scan(a, b, axis=0, h0=h0, reverse=reverse)
    first, second = (slice(3, 6), slice(0, 3)) if reverse else (slice(0, 3), slice(3, 6))
    half = scan(a[first], b[first], axis=0, h0=h0, reverse=reverse)
    last = half[0 if reverse else -1]
    rest = scan(a[second], b[second], axis=0, h0=last, reverse=reverse)
    np.testing.assert_allclose(both[second], rest, rtol=0, atol=1e-6)


def test_states_may_be_complex():
    rng = np.random.default_rng(0)
    a, b = (np.array(rng.normal(size=(9, 2)) + 1j * rng.normal(size=(9, 2)), np.complex64) / 2 for _ in range(2))
    np.testing.assert_allclose(scan(a, b, axis=0), loop(a, b, 0), rtol=0, atol=1e-5)


def test_a_real_decay_may_drive_a_complex_state():
    a, b, _ = draw((9, 2), 0)
    h = scan(a, b + 1j * a, axis=0)
    assert h.dtype == jnp.complex64
    np.testing.assert_allclose(h, loop(a, b + 1j * a, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """1 + 1/1024 added up 1000 times: in bfloat16 each sum would round to what it was."""
    a = jnp.ones(1000, dtype)
    h = scan(a, jnp.full(1000, 2.0**-10, dtype), axis=0, h0=jnp.ones((), dtype))
    assert h.dtype == jnp.float32
    np.testing.assert_allclose(h[-1], 1 + 1000 * 2.0**-10, rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_finite_differences(reverse):
    with jax.enable_x64(True):
        f = functools.partial(scan, axis=0, reverse=reverse)
        check_grads(lambda a, b, h0: f(a, b, h0=h0), draw((5, 2), 0, dtype=np.float64), 1, ("rev",), 1e-5, 1e-5)


SCANS = ["associative", "sequential", "chunked"]
DISCRETIZATIONS = ["euler", "zoh"]


def signals(length, batch=(2,), d=3, n=2, dtype=np.float32):
    """u, delta, A, B, C, D and h0; one of the modes has next to no decay."""
    rng = np.random.default_rng(0)
    u, B, C = (rng.normal(size=(*batch, length, size)) for size in (d, n, n))
    delta = rng.uniform(0.1, 1, (*batch, length, d))
    A = -rng.uniform(0.5, 2, (d, n))
    A[0, 0] = -1e-6
    D, h0 = rng.normal(size=d), rng.normal(size=(*batch, d, n))
    return [x.astype(dtype) for x in (u, delta, A, B, C, D, h0)]


@functools.partial(jax.jit, static_argnames=("discretization", "reverse", "method"))
def scanned(inputs, discretization="euler", reverse=False, method="chunked"):
    """The last state and the outputs, by chunks of three."""
    *inputs, h0 = inputs
    options = {"discretization": discretization, "reverse": reverse, "method": method, "chunk": 3}
    return selective_scan(*inputs, h0=h0, **options)


def expected(inputs, discretization, reverse):
    """The same, by steps."""
    u, delta, A, B, C, D, h = inputs
    ys = {}
    for t in reversed(range(u.shape[1])) if reverse else range(u.shape[1]):
        h = selective_step(h, u[:, t], delta[:, t], A, B[:, t], discretization=discretization)
        ys[t] = jnp.einsum("bdn,bn->bd", h, C[:, t]) + D[None] * u[:, t]
    return h, jnp.stack([ys[t] for t in range(len(ys))], axis=1)


def values_and_gradients(f, inputs):
    """The latter of a loss that every output and the last state have a part in."""

    def loss(inputs):
        h, y = f(inputs)
        return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.sin(y)), (h, y)

    (_, values), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return values, gradients


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 50),
    method=st.sampled_from(SCANS),
    discretization=st.sampled_from(DISCRETIZATIONS),
    reverse=st.booleans(),
)
def test_selective_scan_is_the_loop_at_any_length(length, method, discretization, reverse):
    u, delta, A, B, C, D, h0 = inputs = signals(length)
    states = oracles.selective_states(u, delta, A, B, h0, discretization, reverse)
    h, y = scanned(inputs, discretization, reverse, method)
    np.testing.assert_allclose(h, states[:, 0 if reverse else -1], rtol=0, atol=2e-5)
    np.testing.assert_allclose(y, np.einsum("bldn,bln->bld", states, C) + D * u, rtol=0, atol=5e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_steps_and_all_states_are_those_of_the_loop(discretization, reverse):
    u, delta, A, B, _, _, h0 = signals(7)
    states = oracles.selective_states(u, delta, A, B, h0, discretization, reverse)
    for method in SCANS:
        options = {"discretization": discretization, "reverse": reverse, "method": method, "chunk": 3}
        ours = jax.jit(functools.partial(selective_states, **options))(u, delta, A, B, h0=h0)
        np.testing.assert_allclose(ours, states, rtol=0, atol=2e-5)
    first = -1 if reverse else 0
    step = jax.jit(functools.partial(selective_step, discretization=discretization))
    h = step(h0, u[:, first], delta[:, first], A, B[:, first])
    np.testing.assert_allclose(h, states[:, first], rtol=0, atol=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_values_and_gradients_are_those_of_steps(discretization, reverse):
    """Three chunks of three in float64, the last of them not full."""
    with jax.enable_x64(True):
        inputs = signals(7, dtype=np.float64)
        theirs = values_and_gradients(
            functools.partial(expected, discretization=discretization, reverse=reverse), inputs
        )
        for method in SCANS:
            scan = functools.partial(scanned, discretization=discretization, reverse=reverse, method=method)
            ours = values_and_gradients(scan, inputs)
            for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                assert x.dtype == np.float64
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-13 * max(1, np.abs(y).max()))


@pytest.mark.parametrize("method", SCANS)
def test_gradients_in_float32_have_its_precision(method):
    _, ours = values_and_gradients(functools.partial(scanned, method=method), signals(50))
    with jax.enable_x64(True):
        _, theirs = values_and_gradients(scanned, signals(50, dtype=np.float64))
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max())


def test_selective_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        f = functools.partial(scanned, discretization="zoh")
        check_grads(f, [signals(5, dtype=np.float64)], 1, ("rev",), 1e-5, 1e-5)


def test_only_the_associative_scan_has_forward_derivatives():
    inputs = signals(4)
    h, dh = jax.jvp(functools.partial(scanned, method="associative"), [inputs], [inputs])
    assert jax.tree.map(jnp.shape, dh) == jax.tree.map(jnp.shape, h)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(scanned, [inputs], [inputs])


def test_a_scan_may_have_any_number_of_batch_axes():
    inputs = signals(4, batch=(2, 3))
    u, delta, A, B, C, D, h0 = inputs
    single = scanned([u[1, 2], delta[1, 2], A, B[1, 2], C[1, 2], D, h0[1, 2]])
    for rows, row in zip(scanned(inputs), single, strict=True):
        np.testing.assert_allclose(rows[1, 2], row, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", SCANS)
def test_without_a_read_out_there_is_the_last_state_only(method):
    u, delta, A, B, *_ = signals(5)
    h, y = jax.jit(functools.partial(selective_scan, method=method, chunk=3))(u, delta, A, B)
    assert y is None
    np.testing.assert_allclose(h, oracles.selective_states(u, delta, A, B)[:, -1], rtol=0, atol=1e-5)


def test_zoh_is_exact_for_a_held_input():
    """Two steps of half the time are one step."""
    u, delta, A, B, *_, h0 = signals(1)
    step = jax.jit(functools.partial(selective_step, discretization="zoh"))
    twice = step(step(h0, u[:, 0], delta[:, 0] / 2, A, B[:, 0]), u[:, 0], delta[:, 0] / 2, A, B[:, 0])
    np.testing.assert_allclose(twice, step(h0, u[:, 0], delta[:, 0], A, B[:, 0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 64])
def test_zoh_and_its_derivatives_keep_their_digits_as_a_vanishes(bits):
    """expm1(A) / A is int_0^1 exp(s A) ds, and its derivative int_0^1 s exp(s A) ds."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    s, weights = (nodes + 1) / 2, weights / 2
    A = -np.array([0, 1e-30, 1e-8, 1e-4, 1e-2, 0.3, 0.4999, 0.5, 0.5001, 1, 3])
    with jax.enable_x64(bits == 64):
        A = jnp.asarray(A, f"float{bits}")
        gain = functools.partial(selective_discretize, discretization="zoh")
        value, slope = jax.vmap(jax.value_and_grad(lambda a: gain(jnp.ones_like(a), a)[1]))(A)
        tolerance = 20 * jnp.finfo(A.dtype).eps
    exponentials = np.exp(np.outer(A, s))
    np.testing.assert_allclose(value, exponentials @ weights, rtol=tolerance)
    np.testing.assert_allclose(slope, (exponentials * s) @ weights, rtol=tolerance)


@pytest.mark.parametrize("method", SCANS)
def test_bfloat16_inputs_drive_a_float32_state(method):
    """As exact as the inputs, and the outputs rounded once. Decays by 1/1000 are not lost, 1000 of them."""
    u, delta, A, B, C, D, h0 = signals(1000)
    short = [x.astype(jnp.bfloat16) for x in (u, delta / 500, B, C)]
    long = [x.astype(jnp.float32) for x in short]
    h, y = scanned([*short[:2], A, *short[2:], D, h0], method=method)
    h_long, y_long = scanned([*long[:2], A, *long[2:], D, h0], method=method)
    assert (h.dtype, y.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(h, h_long, rtol=0, atol=1e-5)
    np.testing.assert_allclose(y.astype(np.float32), y_long, rtol=2**-8, atol=1e-5)
    _, exact = scanned([u, delta / 500, A, B, C, D, h0], method=method)
    assert np.std(y.astype(np.float32) - exact) < 5e-3 * np.std(exact)


@pytest.mark.parametrize("method", SCANS)
@pytest.mark.parametrize("discretization", DISCRETIZATIONS)
def test_no_decay_is_too_fast(discretization, method):
    """exp(-10^7) is 0: a state forgets everything, and nothing is divided by what it forgot."""
    u, delta, A, *rest = signals(8)
    inputs = [u, 1e4 * delta, 1e3 * A, *rest]
    f = functools.partial(scanned, discretization=discretization, method=method)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(values_and_gradients(f, inputs)))


def temporary_bytes(method, length, d=32, n=16):
    """Of the compiled gradient with respect to everything but h0."""
    *inputs, _ = signals(length, (1,), d, n)
    f = jax.grad(lambda *inputs: jnp.sum(selective_scan(*inputs, method=method, chunk=4)[1] ** 2), argnums=range(6))
    return jax.jit(f).lower(*inputs).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_chunks_does_not_grow_by_a_state_per_position():
    """But by the state before each chunk and a few arrays of the size of inputs and outputs."""
    chunked, associative = (
        (temporary_bytes(method, 128) - temporary_bytes(method, 64)) / 64 for method in ("chunked", "associative")
    )
    state, inputs_and_gradients = 4 * 32 * 16, 4 * 2 * (2 * 32 + 2 * 16)
    assert chunked <= state / 4 + inputs_and_gradients < state
    assert associative > 3 * state


@pytest.mark.parametrize("method", SCANS)
def test_devices_keep_their_rows_of_the_batch(mesh, method):
    inputs = signals(7, batch=(8,))
    f = functools.partial(values_and_gradients, functools.partial(scanned, method=method))
    rows = [x.ndim == 3 for x in inputs]
    shardings = [batch_sharding(mesh) if row else replicated(mesh) for row in rows]
    compiled = jax.jit(f, in_shardings=(shardings,)).lower(inputs).compile()
    program, entry = compiled.as_text(), compiled.as_text().split("ENTRY")[1]
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
    assert program.count(" all-reduce(") == entry.count(" all-reduce(") > 0  # of the weights' gradients, in no loop
    results = compiled(jax.device_put(inputs, shardings)), f(inputs)
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=1e-4)


def test_auto_is_one_of_the_methods():
    assert {choose(length, backend) for length in (1, 16, 10_000) for backend in ("cpu", "tpu", "gpu")} < {*METHODS}
    inputs = signals(6)
    for x, y in zip(scanned(inputs, method="auto"), scanned(inputs, method=choose(6)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def unchecked():
    """As users call it: without jaxtyping's checks of shapes, which come first in the tests."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": np.ones((2, 5, 1))}, r"delta must have shape \(2, 5, 3\) .* got \(2, 5, 1\)"),
        ({"A": np.ones(3)}, r"A must have shape \(3, 3\) .* got \(3,\)"),
        ({"A": np.ones((2, 3))}, r"A must have shape \(3, 3\)"),
        ({"B": np.ones((5, 2))}, r"B must have shape \(2, 5, 2\)"),
        ({"C": np.ones((2, 5, 3))}, r"C must have shape \(2, 5, 2\)"),
        ({"D": np.ones(2)}, r"D must have shape \(3,\)"),
        ({"h0": np.ones((2, 2, 3))}, r"h0 must have shape \(2, 3, 2\)"),
        ({"u": np.ones(3)}, r"got u \(..., length, d\) of \(3,\)"),
        ({"u": np.ones((2, 0, 3))}, r"at least 1: got u .* of \(2, 0, 3\)"),
        ({"chunk": 0}, "length and chunk must be at least 1"),
        ({"C": None}, "D needs C"),
        ({"method": "cumsum"}, "method must be one of auto, associative, sequential, chunked, got 'cumsum'"),
        ({"discretization": "bilinear"}, "discretization must be 'euler' or 'zoh', got 'bilinear'"),
    ],
)
def test_errors_name_what_is_wrong(unchecked, change, message):
    u, delta, A, B, C, D, h0 = signals(5)
    inputs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "h0": h0} | change
    inputs = {name: x.astype(np.float32) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


def test_errors_of_a_step_name_what_is_wrong(unchecked):
    u, delta, A, B, *_, h0 = signals(5)
    with pytest.raises(ValueError, match=r"h must have shape \(2, 3, 2\)"):
        selective_step(h0[:, :2], u[:, 0], delta[:, 0], A, B[:, 0])
