import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ssm_jax.layers.aggregation import Aggregation
from ssm_jax.layers.drop_path import DropPath, drop_path_rates
from ssm_jax.layers.norm import BatchNorm
from ssm_jax.layers.stack import REMAT, Stack


class Block(nnx.Module):
    """A residual block with everything a loop must carry: batch statistics, dropout, drop path, an argument."""

    def __init__(self, kind=0, *, rngs):
        self.norm = BatchNorm(6, rngs=rngs)
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.dropout = nnx.Dropout(0.25)
        self.drop_path = DropPath()
        self.kind = kind

    def __call__(self, x, drop_path, *, factor=1.0, rngs=None):
        y = self.dropout(jnp.sin(self.linear(self.norm(x))), rngs=rngs) * (factor + self.kind)
        return x + self.drop_path(y, drop_path, rngs=rngs)


def stack(kinds, **how):
    rngs = nnx.Rngs(0)
    blocks = [Block(kind, rngs=rngs) for kind in kinds]
    return Stack(blocks, drop_path=drop_path_rates(0.5, (len(kinds),))[0], **how)


X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 6)), jnp.float32)


def run(model, *, training=True):
    """Output, gradients and batch statistics."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        y, _ = model(x, factor=2.0, rngs=nnx.Rngs(dropout=3) if training else None)
        return jnp.sum(y**2), (y, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    (_, (y, statistics)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, X)
    return y, nnx.to_pure_dict(grads), statistics


@functools.cache
def plain(kinds):
    return run(stack(kinds))


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@pytest.mark.parametrize(
    ("kinds", "how"),
    [
        *(((0,) * 3, {"remat": remat, "scan": scan}) for remat in REMAT for scan in (False, True)),
        ((1, 0, 0), {"remat": "nothing_saveable", "scan": True}),
        ((0, 1, 0, 1), {"remat": "nothing_saveable", "scan": True}),
        ((0, 1, 2), {"scan": True}),
    ],
    ids=str,
)
def test_every_way_of_running_gives_the_same_numbers(kinds, how):
    assert_same(plain(kinds), run(stack(kinds, **how)))


def test_statistics_of_every_block_move():
    before = nnx.to_pure_dict(nnx.state(stack((0,) * 4), nnx.BatchStat))
    _, _, after = run(stack((0,) * 4, scan=True))
    for i in range(4):
        assert np.all(before["blocks"][i]["norm"]["mean"] != after["blocks"][i]["norm"]["mean"])


@pytest.mark.parametrize(
    ("kinds", "loops", "bodies"),
    [((0,) * 6, 1, 1), ((1, 0, 0, 0, 0), 1, 2), ((0, 1, 0, 1), 1, 2), ((0, 1, 2), 0, 3), ((0,), 0, 1)],
    ids=str,
)
def test_equal_blocks_are_compiled_once(kinds, loops, bodies):
    model = nnx.view(stack(kinds, scan=True), deterministic=True, use_running_average=True)
    program = str(jax.make_jaxpr(lambda x: model(x)[0])(X))
    assert program.count(" scan[") == loops
    assert program.count(" dot_general[") == bodies


def test_view_changes_how_it_runs_and_not_the_values():
    model = stack((0,) * 3)
    other = nnx.view(model, remat="nothing_saveable", scan=True)
    assert (model.remat, model.scan) == ("none", False)
    assert (other.remat, other.scan) == ("nothing_saveable", True)
    assert other.blocks[0].linear.kernel is model.blocks[0].linear.kernel
    assert_same(run(model), run(other))


def test_rematerialisation_keeps_less():
    def saved(remat):
        model = stack((0,) * 4, remat=remat)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def residuals(params, x):
            f = lambda params: nnx.merge(graphdef, params, rest, copy=True)(x, rngs=nnx.Rngs(dropout=0))[0].sum()  # noqa: E731
            return jax.vjp(f, params)[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, params, X)) if leaf.ndim == X.ndim)

    assert saved("nothing_saveable") < saved("dots_saveable") < saved("none")


def test_no_way_needs_a_key_without_drop_path():
    model = Stack([Block(rngs=nnx.Rngs(i)) for i in range(3)], drop_path=(0.0,) * 3)
    model = nnx.view(model, only=nnx.Dropout, deterministic=True)
    outputs = [run(nnx.view(model, scan=scan), training=False)[0] for scan in (False, True)]
    assert_same(*outputs)


@pytest.mark.parametrize("remat", REMAT)
def test_blocks_may_compute_with_complex_numbers(remat):
    class Complex(nnx.Module):
        def __init__(self, *, rngs):
            self.weights = nnx.Param(jax.random.normal(rngs.params(), (6, 6)))

        def __call__(self, x, drop_path, *, rngs=None):
            weights = jnp.exp(jax.lax.complex(self.weights[...], self.weights[...]))
            return x + jnp.sin(jnp.abs(jax.lax.complex(x, x) @ weights))

    model = Stack([Complex(rngs=nnx.Rngs(0)) for _ in range(2)], drop_path=(0.0,) * 2, remat=remat)
    graphdef, params = nnx.split(model)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params, copy=True)(X)[0] ** 2)))(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("how", [{"scan": True}, {"remat": "nothing_saveable", "scan": True}, {}], ids=str)
def test_an_aggregation_sees_every_block(how):
    class Sum(Aggregation):
        """The state is the sum of all outputs, each multiplied by the block's number; the blocks read it."""

        def __init__(self, n):
            self.cells = nnx.List(nnx.Param(jnp.asarray(float(i))) for i in range(n))
            self.head_channels = 2

        def start(self, x, h):
            return jnp.zeros_like(x) if h is None else h

        def __call__(self, block, cell, x, h, drop_path, *, rngs=None, factor):
            x = block(x + h, drop_path, factor=factor, rngs=rngs)
            return x, h + cell[...] * x

    model = nnx.view(stack((0,) * 3, **how), deterministic=True, use_running_average=True)
    model = Stack(model.blocks, drop_path=(0.0,) * 3, aggregation=Sum(3), **how)
    y, h = model(X, jnp.ones_like(X), factor=2.0)
    expected, state = X, jnp.ones_like(X)
    for i, block in enumerate(model.blocks):
        expected = block(expected + state, 0.0, factor=2.0)
        state = state + i * expected
    assert_same((y, h), (expected, state))
    assert model.head_channels == 2
    assert Stack(model.blocks, drop_path=(0.0,) * 3).head_channels == 0


def test_unknown_rematerialisation_is_rejected():
    with pytest.raises(ValueError, match=r"remat must be one of none, .*, got 'dots'"):
        stack((0,), remat="dots")


@pytest.mark.parametrize("traced", [False, True])
def test_drop_path_drops_whole_examples_and_keeps_the_mean(traced):
    x = jnp.ones((1000, 2, 3))
    rate = jnp.float32(0.25) if traced else 0.25
    y = np.asarray(jax.jit(lambda x: DropPath()(x, rate, rngs=nnx.Rngs(dropout=0)))(x))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.04)


def test_drop_path_keeps_everything_at_rate_0_and_in_evaluation():
    assert DropPath()(X, 0.0) is X
    assert nnx.view(DropPath(), deterministic=True)(X, 0.5) is X


def test_drop_path_needs_a_key():
    with pytest.raises(ValueError, match="rngs must be given in training with drop_path"):
        DropPath()(X, 0.5)


def test_rates_grow_linearly_over_all_stages():
    rates = drop_path_rates(0.4, (2, 1, 2))
    np.testing.assert_allclose(np.concatenate(rates), [0, 0.1, 0.2, 0.3, 0.4])
    assert [len(stage) for stage in rates] == [2, 1, 2]
    assert drop_path_rates(0.4, (1,)) == [(0.0,)]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_rejected(rate):
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\), got"):
        drop_path_rates(rate, (2, 2))
