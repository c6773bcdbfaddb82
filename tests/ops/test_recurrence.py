import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from oracles import dense_step, joined

from ssm_jax.ops import (
    dplr_recurrence,
    recurrent_scan,
    recurrent_step,
    s4d_recurrence,
    state_matrices,
)
from ssm_jax.training.sharding import batch_sharding, replicated

HEADS, MODES, READ_OUTS = 3, 4, 2
KINDS = ["zoh", "bilinear", 1, 2]
"""A discretisation of diagonal systems, or the rank of low-rank ones."""


def normal(rng, *shape):
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def parameters(kind, *, shared=False):
    """A, B, C, dt and, for low-rank systems, P; dt is one per mode for diagonal ones."""
    rng = np.random.default_rng(0)
    sets = 1 if shared else HEADS
    A = -rng.uniform(0.1, 1.0, (sets, MODES)) - 1j * rng.uniform(0.0, 10.0, (sets, MODES))
    B, C = normal(rng, sets, MODES), normal(rng, READ_OUTS, HEADS, MODES)
    dt = rng.uniform(0.01, 1.0, (HEADS, MODES if isinstance(kind, str) else 1))
    return (A, B, C, dt) if isinstance(kind, str) else (A, B, C, dt, normal(rng, kind, sets, MODES))


def recurrence(kind, A, B, C, dt, P=None):
    if P is None:
        return s4d_recurrence(A, B, C, dt, discretization=kind)
    return dplr_recurrence(A, B, C, P, dt)


def sequence(length, *, batch=2):
    """Inputs, a state before them, and D."""
    rng = np.random.default_rng(1)
    return (
        rng.normal(size=(batch, length, HEADS)),
        normal(rng, batch, HEADS, MODES),
        rng.normal(size=(READ_OUTS, HEADS)),
    )


def loop(kind, A, B, C, dt, P=None, *, state, u, D):
    """The state after `u` and the outputs, by dense matrices over all modes and their conjugates."""
    A, B = (np.broadcast_to(x, (HEADS, MODES)) for x in (A, B))
    state, y = state.copy(), np.zeros((*u.shape[:2], READ_OUTS, HEADS))
    for head in range(HEADS):
        if P is None:
            Abar, Bbar = dense_step(A[head], B[head], dt[head], kind)
            Abar, Bbar = scipy.linalg.block_diag(Abar, Abar.conj()), np.concatenate([Bbar, Bbar.conj()])
        else:
            low_rank = np.broadcast_to(P, (kind, HEADS, MODES))[:, head]
            Abar, Bbar = joined(A[head], B[head], low_rank, dt[head, 0])
        read = np.concatenate([C[:, head], C[:, head].conj()], axis=-1)
        for row in range(len(u)):
            x = np.concatenate([state[row, head], state[row, head].conj()])
            for t in range(u.shape[1]):
                x = Abar @ x + Bbar * u[row, t, head]
                y[row, t, :, head] = (read @ x).real + D[:, head] * u[row, t, head]
            state[row, head] = x[:MODES]
    return state, y.reshape(*u.shape[:2], -1)


def steps(system, state, u):
    state, y = jax.lax.scan(lambda x, u: recurrent_step(system, x, u), state, jnp.moveaxis(u, 1, 0))
    return state, jnp.moveaxis(y, 0, 1)


def assert_close(result, expected, atol):
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol * np.abs(theirs).max())


@pytest.mark.parametrize("kind", KINDS)
def test_steps_and_chunks_of_any_size_are_the_loop_over_dense_matrices(kind):
    """10 positions, in chunks of 1, in two and a half, and in half a chunk."""
    arguments = parameters(kind)
    u, state, D = sequence(10)
    expected = loop(kind, *arguments, state=state, u=u, D=D)
    with jax.enable_x64(True):

        @jax.jit
        def results(arguments, state, u, D):
            system = recurrence(kind, *arguments)._replace(D=D)
            return [steps(system, state, u), *(recurrent_scan(system, state, u, chunk=chunk) for chunk in (1, 4, 20))]

        for result in results(arguments, state, u, D):
            assert_close(result, expected, 1e-12)


@pytest.mark.parametrize("kind", ["zoh", 2])
def test_gradients_by_chunks_are_those_by_steps(kind):
    """By parameters shared by all heads, the state, the inputs and D, of outputs and the last state."""
    u, state, D = sequence(10)
    rng = np.random.default_rng(2)
    weights = (normal(rng, *state.shape), rng.normal(size=(2, 10, READ_OUTS * HEADS)))

    def gradients(scan):
        def f(arguments, state, u, D):
            return scan(recurrence(kind, *arguments)._replace(D=D), state, u)

        return jax.jit(lambda weights, *inputs: jax.vjp(f, *inputs)[1](weights))

    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, (weights, parameters(kind, shared=True), state, u, D))
        by_chunks = gradients(functools.partial(recurrent_scan, chunk=4))(*inputs)
        assert_close(by_chunks, gradients(steps)(*inputs), 1e-11)


@pytest.mark.parametrize(("init", "kind"), [("legs", "zoh"), ("fourier", 1)])
def test_float32_does_not_drift_over_a_thousand_positions(init, kind):
    rng = np.random.default_rng(0)
    start = state_matrices(init, 64)
    dt = np.geomspace(0.001, 1.0, 8)[:, None]
    arguments = (start.A, start.B, normal(rng, 1, 8, 32), dt, start.P)[: 4 if kind == "zoh" else 5]
    inputs = (arguments, np.zeros((1, 8, 32), complex), rng.normal(size=(1, 1000, 8)))

    def run(inputs):
        f = jax.jit(lambda arguments, *rest: [f(recurrence(kind, *arguments), *rest) for f in (recurrent_scan, steps)])
        return jax.tree.map(np.asarray, f(*inputs))

    single = run(jax.tree.map(to_single, inputs))
    assert {x.dtype for x in jax.tree.leaves(single)} == {np.dtype("complex64"), np.dtype("float32")}
    with jax.enable_x64(True):
        assert_close(single, run(inputs), 5e-5)


def to_single(x):
    return jnp.asarray(x, jnp.complex64 if np.iscomplexobj(x) else jnp.float32)


def test_half_precision_input_is_computed_in_float32():
    u, state, _ = sequence(9)
    arguments, state = jax.tree.map(to_single, (parameters("zoh"), state))
    f = jax.jit(lambda u: [scan(recurrence("zoh", *arguments), state, u) for scan in (recurrent_scan, steps)])
    half = jnp.asarray(u, jnp.bfloat16)
    results = f(half)
    assert [x.dtype for x in jax.tree.leaves(results)] == [jnp.complex64, jnp.float32] * 2
    assert_close(results, f(half.astype(jnp.float32)), 1e-6)


def test_there_is_no_array_of_all_states():
    """They would take 1 MiB per 1024 positions here."""

    def mebibytes(length):
        def f(arguments, state, u):
            return recurrent_scan(recurrence("zoh", *arguments), state, u)[1]

        def loss(*inputs):
            return jnp.sum(f(*inputs) ** 2)

        complexes = [jax.ShapeDtypeStruct(shape, jnp.complex64) for shape in ((1, 32), (1, 32), (1, 4, 32), (1, 4, 32))]
        reals = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 1), (1, length, 4))]
        inputs = ((*complexes[:3], reals[0]), complexes[3], reals[1])
        programs = (jax.jit(g).lower(*inputs).compile() for g in (f, jax.grad(loss)))
        return np.array([program.memory_analysis().temp_size_in_bytes / 2**20 for program in programs])

    forward, backward = (mebibytes(16 * 1024) - mebibytes(8 * 1024)) / 8
    assert 0 < forward < 0.1
    assert 0 < backward < 0.2


@pytest.mark.parametrize("kind", ["zoh", 1])
def test_each_device_runs_its_own_sequences(kind, mesh):
    """And needs the others for nothing but the gradients of the parameters."""

    def loss(arguments, inputs):
        state, y = recurrent_scan(recurrence(kind, *arguments), *inputs, chunk=4)
        return jnp.sum(y**2) + jnp.sum(jnp.abs(state) ** 2)

    u, state, _ = sequence(10, batch=8)
    f = jax.jit(jax.grad(loss), in_shardings=(replicated(mesh), batch_sharding(mesh)))
    inputs = jax.tree.map(lambda x: np.asarray(to_single(x)), (parameters(kind), (state, u)))
    text = f.lower(*inputs).compile().as_text()
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    assert [name for name in names if name in text] == ["all-reduce"]


@pytest.mark.parametrize(("length", "chunk"), [(3, 0), (3, -1), (0, 4)])
def test_there_must_be_something_to_scan(length, chunk):
    u, state, _ = sequence(length)
    arguments, state, u = jax.tree.map(to_single, (parameters("zoh"), state, u))
    with pytest.raises(ValueError, match=f"chunk and the length of u must be at least 1, got {chunk} and {length}"):
        recurrent_scan(recurrence("zoh", *arguments), state, u, chunk=chunk)
