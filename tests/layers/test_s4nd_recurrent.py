import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import drawn

from ssm_jax.layers import S4ND

LENGTH = 10
SEQUENCE = {"dims": 1, "bidirectional": False, "d_state": 4}


def build(*, d_model=3, param_dtype=jnp.float64, **arguments):
    arguments = SEQUENCE | arguments
    return drawn(lambda: S4ND(d_model, param_dtype=param_dtype, **arguments, rngs=nnx.Rngs(0)))


def draw(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def step_by_step(layer, state, u, **options):
    state, y = jax.lax.scan(lambda state, u: layer.step(state, u, **options), state, jnp.moveaxis(u, 1, 0))
    return state, jnp.moveaxis(y, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ({}, 1.0),
        ({"discretization": "bilinear", "channels": 2, "d_model": 4, "n_ssm": 2}, 0.5),
        ({"dt_tie": False, "trank": 2, "channels": 2, "conv": "fft"}, 2),
        ({"out_channels": 2, "channels": 2, "linear_output": True}, 1.0),
        ({"bandlimit": 0.5, "d_state": 16, "linear_output": True}, 0.5),
        ({"bandlimit": 0.5, "bandlimit_grid": "current", "d_state": 16, "l_max": LENGTH}, 0.5),
        ({"mode": "dplr"}, 0.5),
        ({"mode": "dplr", "rank": 2, "channels": 2, "trank": 2, "bandlimit": 0.7}, 1.0),
        ({"mode": "dplr", "out_channels": 2, "l_kernel": 4}, 1.0),
    ],
    ids=str,
)
def test_steps_and_chunks_in_two_calls_are_the_convolution_of_the_whole(arguments, rate):
    with jax.enable_x64(True):
        layer = build(**arguments)

        @jax.jit
        def results(u):
            results = [step_by_step(layer, layer.initial_state(2), u, rate=rate)]
            for chunk in (1, 3, 64):
                state, first = layer.scan(layer.initial_state(2), u[:, :4], rate=rate, chunk=chunk)
                state, second = layer.scan(state, u[:, 4:], rate=rate, chunk=chunk)
                results.append((state, jnp.concatenate([first, second], axis=1)))
            return layer(u, rate=rate), *results

        expected, (last, y), *by_chunks = results(draw(2, LENGTH, layer.d_model))
        atol = 1e-11 * np.abs(expected).max()
        np.testing.assert_allclose(y, expected, rtol=0, atol=atol)
        for state, y in by_chunks:
            np.testing.assert_allclose(y, expected, rtol=0, atol=atol)
            np.testing.assert_allclose(state, last, rtol=0, atol=1e-11 * np.abs(last).max())


@pytest.mark.parametrize("arguments", [{"channels": 2, "dt_tie": False}, {"mode": "dplr", "bandlimit": 0.5}], ids=str)
def test_gradients_of_the_scan_are_those_of_the_convolution(arguments):
    with jax.enable_x64(True):
        layer = build(**arguments)
        graphdef, state = nnx.split(layer)
        weights = draw(2, LENGTH, 3, seed=1)

        def pulled_back(f):
            def loss(params, u):
                return jnp.sum(weights * f(nnx.merge(graphdef, params, copy=True), u))

            return jax.jit(jax.grad(loss, argnums=(0, 1)))(nnx.to_pure_dict(state), draw(2, LENGTH, 3))

        expected = pulled_back(lambda layer, u: layer(u))
        result = pulled_back(lambda layer, u: layer.scan(layer.initial_state(2), u, chunk=4)[1])
        assert jax.tree.structure(result) == jax.tree.structure(expected)
        for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * np.abs(theirs).max())


@pytest.mark.parametrize(("layer", "u"), [(jnp.bfloat16, jnp.float32), (None, jnp.bfloat16)], ids=["layer", "input"])
def test_bfloat16_of_layer_or_input_is_that_of_the_output_and_the_state_is_complex64(layer, u):
    layer = build(param_dtype=jnp.float32, dtype=layer, linear_output=layer is None)
    u = draw(2, LENGTH, 3).astype(u)
    before = layer.initial_state(2)
    expected, scanned, stepped = jax.jit(
        lambda u: (layer(u), layer.scan(before, u, chunk=4), step_by_step(layer, before, u))
    )(u)
    assert before.dtype == jnp.complex64
    for state, y in (scanned, stepped):
        assert (state.dtype, y.dtype, expected.dtype) == (jnp.complex64, jnp.bfloat16, jnp.bfloat16)
        y, exact = (np.asarray(x, np.float32) for x in (y, expected))
        np.testing.assert_allclose(y, exact, rtol=0, atol=4 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(exact).max())
    np.testing.assert_allclose(scanned[0], stepped[0], rtol=0, atol=1e-5 * np.abs(stepped[0]).max())


@pytest.mark.parametrize("l_max", [3, 5])
def test_the_kernel_of_the_convolution_ends_at_l_max_and_the_state_goes_on(l_max):
    with jax.enable_x64(True):
        layer = build(l_max=l_max, linear_output=True)
        u = draw(1, LENGTH, 3)
        cut, whole = jax.jit(lambda u: (layer(u), layer.scan(layer.initial_state(1), u)[1]))(u)
    agree = np.isclose(cut, whole, rtol=0, atol=1e-11).all(axis=(0, 2))
    np.testing.assert_array_equal(agree, np.arange(LENGTH) < l_max)


def in_loops(text):
    """The lines of all computations that loops of a compiled program run."""
    computations = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    to_do, seen = set(re.findall(r"body=%([\w.-]+)", text)), set()
    while to_do:
        name = to_do.pop()
        seen.add(name)
        to_do |= {called for called in re.findall(r"%([\w.-]+)", computations[name]) if called in computations} - seen
    return "".join(computations[name] for name in seen)


@pytest.mark.parametrize(("mode", "work"), [("diag", "exponential("), ("diag", " sine("), ("dplr", " divide(")])
def test_a_loop_over_steps_discretises_once_before_it(mode, work):
    """XLA moves out of a loop what does not depend on the position."""
    graphdef, params = nnx.split(build(mode=mode, param_dtype=jnp.float32, linear_output=True))

    def f(params, u):
        layer = nnx.merge(graphdef, params, copy=True)
        return step_by_step(layer, layer.initial_state(2), u)

    u = draw(2, LENGTH, 3, dtype=np.float32)
    text = jax.jit(f).lower(nnx.to_pure_dict(params), u).compile().as_text()
    assert work in text
    assert "dot(" in in_loops(text)
    assert work not in in_loops(text)


def test_dropout_is_left_out():
    layer = build(dropout=0.5, param_dtype=jnp.float32)
    state, u = layer.initial_state(1), jnp.asarray(draw(1, 3, dtype=np.float32))
    without = build(param_dtype=jnp.float32).step(state, u)[1]
    np.testing.assert_array_equal(layer.step(state, u)[1], without)


@pytest.mark.parametrize(
    ("arguments", "rate", "message"),
    [
        ({"dims": 2}, 1.0, "dims must be 1 for a layer to be a recurrence, got 2"),
        ({"bidirectional": True}, 1.0, "bidirectional must be False for kernels to be a recurrence"),
        ({"mode": "dplr", "l_kernel": 8}, 0.5, "l_kernel must be None .*got l_kernel=8, rate=0.5, bandlimit=None"),
        ({"mode": "dplr", "l_kernel": 0, "bandlimit": 0.5}, 1.0, "l_kernel must be None .* bandlimit=0.5"),
        ({}, 0.0, "rate must be positive, .*got 0.0"),
    ],
    ids=str,
)
def test_layers_that_are_no_recurrence_say_so(arguments, rate, message):
    layer = build(param_dtype=jnp.float32, **arguments)
    state = jnp.zeros((1, 3, 2), jnp.complex64)
    with pytest.raises(ValueError, match=message):
        layer.step(state, jnp.ones((1, 3)), rate=rate)
    with pytest.raises(ValueError, match=message):
        layer.scan(state, jnp.ones((1, 5, 3)), rate=rate)
    if rate == 1:
        with pytest.raises(ValueError, match=message):
            layer.initial_state(1)


@pytest.mark.parametrize(
    ("state", "u", "message"),
    [
        ((2, 4, 2), (2, 4), r"u must be \(batch, 0 axes, d_model=3\), not empty, got shape \(2, 4\)"),
        ((2, 4, 2), (2, 5, 4), r"u must be \(batch, 1 axes, d_model=3\), not empty, got shape \(2, 5, 4\)"),
        ((2, 3, 2), (2, 0, 3), "not empty"),
        ((2, 3, 4), (2, 3), r"state must be .* = \(2, 3, 2\), complex64, .*got \(2, 3, 4\), complex64"),
        ((2, 3, 4), (2, 5, 3), r"state must be .* = \(2, 3, 2\), complex64, .*got \(2, 3, 4\), complex64"),
    ],
    ids=str,
)
def test_a_state_or_input_of_another_shape_is_rejected(state, u, message):
    layer = build(param_dtype=jnp.float32)
    advance = layer.step if len(u) == 2 else layer.scan
    with pytest.raises(ValueError, match=message):
        advance(jnp.zeros(state, jnp.complex64), jnp.ones(u))


def test_a_state_of_another_precision_is_rejected():
    with jax.enable_x64(True):
        layer, state = build(), jnp.zeros((1, 3, 2), jnp.complex64)
        with pytest.raises(ValueError, match=r"complex128, as from initial_state, got .*, complex64"):
            layer.step(state, jnp.ones((1, 3)))
