import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ssm_jax.training import sharding
from ssm_jax.training.sharding import make_mesh

SGD = optax.sgd(0.1)
"""For comparisons of gradients: AdamW turns rounding errors of small ones into steps of full size."""


class Normed(nnx.Module):
    """A network with batch statistics."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(1, momentum=0.5, rngs=rngs)
        self.decoder = nnx.Linear(1, 10, rngs=rngs)

    def __call__(self, images, *, rate=1.0, rngs=None):
        return self.decoder(self.norm(images).mean((1, 2)) + images.mean((1, 2)))


@pytest.fixture(scope="module")
def plain(tiny):
    return tiny(optimizer=SGD)


@pytest.fixture(scope="module")
def dropping(tiny):
    return tiny(dropout=0.5)


@pytest.fixture(scope="module")
def averaging(tiny):
    return tiny(ema=0.9)


@pytest.fixture(scope="module")
def normed(tiny):
    return tiny(network=Normed, optimizer=SGD)


@pytest.fixture
def no_threshold(monkeypatch):
    """Shards small arrays too."""
    monkeypatch.setattr(sharding, "_MIN_SHARDED_BYTES", 0)


def cross_entropy(logits, labels, smoothing=0.0):
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.eye(10)[labels] * (1 - smoothing) + smoothing / 10
    return -(targets * log_p).sum(-1)


def test_a_step_changes_every_parameter(plain):
    state = plain.init()
    after, _ = plain.step(state, plain.batch())
    for path, changed in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    ):
        assert changed, jax.tree_util.keystr(path)


def test_a_step_is_counted(plain):
    state = plain.init()
    assert int(state.step) == 0
    for _ in range(2):
        state, _ = plain.step(state, plain.batch())
    assert int(state.step) == 2
    assert state.step.dtype == jnp.int32


def test_a_step_is_a_function_of_state_and_batch(dropping, assert_same):
    state, batch = dropping.init(), dropping.batch()
    assert_same(dropping.step(state, batch), dropping.step(state, batch))


def test_dropout_follows_the_step(dropping):
    state, batch = dropping.init(), dropping.batch()
    later = dataclasses.replace(state, step=state.step + 1)
    assert dropping.step(state, batch)[1]["loss"] != dropping.step(later, batch)[1]["loss"]


def test_dropout_follows_the_seed(tiny, dropping):
    other = tiny(dropout=0.5, seed=1)
    batch = dropping.batch()
    assert dropping.step(dropping.init(), batch)[1]["loss"] != other.step(other.init(), batch)[1]["loss"]


def test_training_lowers_the_loss(averaging):
    state, batch = averaging.init(), averaging.batch()
    state, first = averaging.step(state, batch)
    for _ in range(20):
        state, last = averaging.step(state, batch)
    assert last["loss"] < first["loss"] - 0.1


def test_metrics_are_those_of_the_model_before_the_step(plain):
    state, batch = plain.init(), plain.batch()
    _, metrics = plain.step(state, batch)
    logits = plain.logits(state, batch)
    assert float(metrics["loss"]) == pytest.approx(cross_entropy(logits, batch["label"]).mean(), rel=1e-5)
    assert float(metrics["accuracy"]) == np.mean(np.argmax(np.asarray(logits), -1) == np.asarray(batch["label"]))


def test_the_gradient_norm_is_that_of_the_update(plain):
    state = plain.init()
    after, metrics = plain.step(state, plain.batch())
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.sum((a - b) ** 2), state.params, after.params))
    assert float(metrics["grad_norm"]) * 0.1 == pytest.approx(np.sqrt(sum(moved)), rel=1e-4)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_a_batch_in_parts_is_as_one_in_a_piece(tiny, plain, assert_same, on_mesh):
    parts = tiny(optimizer=SGD, accumulate=4, mesh=make_mesh({"data": 8}) if on_mesh else None)
    state, metrics = plain.step(plain.init(), plain.batch(count=64))
    state_4, metrics_4 = parts.step(parts.init(), parts.batch(count=64))
    assert_same(state.params, state_4.params, rtol=1e-4, atol=1e-6)
    assert_same(metrics, metrics_4, rtol=1e-5)
    assert int(state_4.step) == 1


def test_parts_of_a_batch_have_dropout_of_their_own(tiny):
    """Rows are equal, so that it does not matter which go into which part."""
    parts = tiny(dropout=0.5, accumulate=2, optimizer=SGD)
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), parts.batch())
    model = nnx.merge(nnx.graphdef(parts.abstract_model), parts.init().params)

    @jax.jit
    def logits_of_part(i):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), i)
        _, dropout_key = jax.random.split(key)
        return model(parts.prepare(batch["image"][:8]), rngs=nnx.Rngs(dropout=dropout_key))

    losses = [cross_entropy(logits_of_part(i), batch["label"][:8]).mean() for i in range(2)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    _, metrics = parts.step(parts.init(), batch)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_average_of_parameters_follows_its_formula(averaging, assert_same):
    state = averaging.init()
    assert_same(state.ema, state.params)
    expected = state.params
    for seed in range(3):
        state, _ = averaging.step(state, averaging.batch(seed))
        expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, state.params)
        assert_same(state.ema, expected, rtol=1e-5, atol=1e-7)


def test_the_weight_of_the_average_may_depend_on_the_step(tiny, assert_same):
    """As in a warm-up: here the first step takes the new parameters alone, the second half of them."""
    warming = tiny(ema=lambda step: jnp.where(step == 0, 0.0, 0.5))
    first, _ = warming.step(warming.init(), warming.batch(0))
    second, _ = warming.step(first, warming.batch(1))
    assert_same(first.ema, first.params)
    expected = jax.tree.map(lambda old, new: 0.5 * (old + new), first.params, second.params)
    assert_same(second.ema, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_images_and_targets_are_augmented_anew_by_each_step_and_part(tiny, accumulate):
    """Targets of chance, whose loss says what was drawn."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class Random(tiny):
        def augment(self, images, targets, key):
            return self.prepare(images), jnp.full(targets.shape, jax.random.uniform(key))

    def loss(step, part=0):
        key = jax.random.fold_in(jax.random.key(0), step)
        key = key if accumulate == 1 else jax.random.fold_in(key, part)
        drawn = jax.random.uniform(jax.random.split(key)[0])
        rows = slice(part, None, accumulate)
        log_p = np.stack([-cross_entropy(logits[rows], np.full(16 // accumulate, c)) for c in range(10)])
        return -float(drawn) * log_p.sum(0).mean()

    random = Random(optimizer=optax.sgd(0.0), accumulate=accumulate)
    state, batch = random.init(), random.batch()
    logits = random.logits(state, batch)
    for step in range(2):
        state, metrics = random.step(state, batch)
        expected = np.mean([loss(step, part) for part in range(accumulate)])
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)
    assert loss(0) != loss(1)


def test_without_averaging_there_is_no_average(plain):
    state, _ = plain.step(plain.init(), plain.batch())
    assert state.ema is None


def test_batch_statistics_are_carried_from_step_to_step(normed):
    state, expected = normed.init(), 0.0
    for seed in range(2):
        batch = normed.batch(seed)
        state, _ = normed.step(state, batch)
        expected = 0.5 * expected + 0.5 * float(normed.prepare(batch["image"]).mean())
    assert float(state.rest["norm"]["mean"][0]) == pytest.approx(expected, rel=1e-4)


def test_batch_statistics_are_carried_from_part_to_part(tiny):
    normed = tiny(network=Normed, optimizer=SGD, accumulate=4)
    batch = normed.batch()
    state, _ = normed.step(normed.init(), batch)
    images = np.asarray(normed.prepare(batch["image"]))
    expected = 0.0
    for part in range(4):
        expected = 0.5 * expected + 0.5 * images[part::4].mean()  # rows are dealt out
    assert float(state.rest["norm"]["mean"][0]) == pytest.approx(expected, rel=1e-4)


def test_evaluation_uses_the_batch_statistics(normed):
    state, batch = normed.init(), normed.batch()
    before = normed.logits(state, batch)
    after = normed.logits(dataclasses.replace(state, rest=jax.tree.map(lambda x: x + 1, state.rest)), batch)
    assert np.abs(before - after).max() > 1e-3


def test_evaluation_scores_every_row(dropping):
    state, batch = dropping.init(), dropping.batch()
    mask = np.arange(16) % 3 != 0
    rows = dropping.eval(state.params, state.rest, batch | {"mask": jnp.asarray(mask)})
    labels = np.asarray(batch["label"])
    assert rows["logits"].shape == (16, 10)
    np.testing.assert_array_equal(rows["label"], labels)
    np.testing.assert_array_equal(rows["mask"], mask)
    np.testing.assert_allclose(rows["loss"], cross_entropy(rows["logits"], labels), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(rows["accuracy"], np.argmax(np.asarray(rows["logits"]), -1) == labels)


def test_evaluation_has_no_dropout(dropping, plain):
    batch = plain.batch()
    np.testing.assert_allclose(dropping.logits(dropping.init(), batch), plain.logits(plain.init(), batch), rtol=1e-6)


def test_half_precision_trains_parameters_in_float32(tiny):
    half = tiny(dtype=jnp.bfloat16)
    state, batch, losses = half.init(), half.batch(), []
    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm multiplies float32 and bfloat16
        for _ in range(20):
            state, metrics = half.step(state, batch)
            losses.append(float(metrics["loss"]))
        rows = half.eval(state.params, state.rest, batch | {"mask": jnp.ones(16, bool)})
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    assert {rows[name].dtype for name in ("logits", "loss")} == {jnp.dtype("float32")}
    assert losses[-1] < losses[0] - 0.1


@pytest.fixture(scope="module")
def curve(dropping):
    """The losses of one device."""
    return dropping.losses(5)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_loss_curves_do_not_depend_on_the_devices(tiny, no_threshold, curve, sizes):
    together = tiny(dropout=0.5, mesh=make_mesh(sizes))
    np.testing.assert_allclose(together.losses(5), curve, rtol=1e-4)
    assert len(set(curve)) == 5

    state, _ = together.step(together.init(), together.batch())
    kernel = state.params["blocks"][0]["mixer"]["output"]["kernel"]
    moment = state.opt_state[1].inner_states["decay"].inner_state[0].mu["blocks"][0]["mixer"]["output"]["kernel"]
    for array in [kernel, moment]:
        assert {shard.data.shape for shard in array.addressable_shards} == {(8, 16 // sizes.get("fsdp", 1))}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_devices_that_share_the_batch_exchange_gradients_alone(tiny, accumulate):
    """A gather in the compiled step would mean that devices compute each other's rows (openxla/xla#24)."""
    shared = tiny(accumulate=accumulate, dropout=0.1, ema=0.9, mesh=make_mesh({"data": 8}))
    with shared.context():
        compiled = shared.jitted.lower(shared.abstract_state, shared.batch()).compile().as_text()
    assert "all-reduce" in compiled
    for collective in ["all-gather", "all-to-all", "collective-permute"]:
        assert collective not in compiled
