import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.training import sharding
from ssm_jax.training.checkpoints import CheckpointError, Checkpoints
from ssm_jax.training.sharding import make_mesh
from ssm_jax.training.steps import TrainState

METRIC = "val/accuracy"

BLOCK = "['blocks'][0]"
KERNEL_SHAPES = {"A_imag": (1, 2), "A_real": (1, 2), "B": (2, 1, 2), "C": (2, 2, 1, 1, 8, 2), "inv_dt": (8, 1)}
PARAMS = {
    f"{BLOCK}['mixer']['D']": (1, 8),
    **{f"{BLOCK}['mixer']['kernels'][{i}]['{name}']": shape for i in [0, 1] for name, shape in KERNEL_SHAPES.items()},
    f"{BLOCK}['mixer']['output']['bias']": (16,),
    f"{BLOCK}['mixer']['output']['kernel']": (8, 16),
    f"{BLOCK}['norm']['bias']": (8,),
    f"{BLOCK}['norm']['scale']": (8,),
    "['head']['bias']": (10,),
    "['head']['kernel']": (8, 10),
    "['encoder']['bias']": (8,),
    "['encoder']['kernel']": (1, 8),
    "['norm']['bias']": (8,),
    "['norm']['scale']": (8,),
}
"""Parameters of S4ND-ISO with one block, width 8 and 4 states, in checkpoints that people have."""


def small(step, value=0.0):
    params = {"w": jnp.arange(3.0) + value}
    return TrainState(step=jnp.int32(step), params=params, rest={}, opt_state=(params,), ema=None)


def abstract_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save_scores(checkpoints, scores):
    for step, score in enumerate(scores, start=1):
        checkpoints.save(small(step), None if score is None else {METRIC: score})


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", metric=METRIC) as opened:
        yield opened


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ([0.1], 1, [1]),
        ([0.1, 0.9, 0.3, 0.4, 0.5], 2, [2, 4, 5]),
        ([0.9, 0.1, 0.2, 0.3], 1, [1, 3, 4]),
        ([0.1, 0.2, 0.3, 0.4], 4, [3, 4]),
        ([0.1, 0.9, 0.3, None, None], 2, [2, 4, 5]),
        ([None, None, 0.0], 3, [2, 3]),
        ([0.5, 0.5], 2, [1, 2]),
        ([0.5, 0.7, 0.7, 0.1, 0.1, 0.1], 3, [3, 5, 6]),
    ],
)
def test_the_best_and_the_last_two_are_kept(checkpoints, scores, best, kept):
    """The best is the latest of equals."""
    save_scores(checkpoints, scores)
    assert checkpoints.best == best
    assert checkpoints.steps == kept
    assert checkpoints.last == len(scores)


def test_steps_and_scores_are_found_again(tmp_path):
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        save_scores(checkpoints, [0.1, 0.9, 0.3, 0.4, None])
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        assert checkpoints.steps == [2, 4, 5]
        assert (checkpoints.best, checkpoints.last) == (2, 5)
        checkpoints.save(small(6), {METRIC: 0.95})
        assert checkpoints.best == 6
        assert checkpoints.steps == [5, 6]


def test_an_empty_directory_has_no_checkpoints(checkpoints):
    assert checkpoints.steps == []
    assert checkpoints.last is None
    assert checkpoints.best is None


def test_checkpoints_that_were_not_evaluated_are_never_the_best(checkpoints):
    save_scores(checkpoints, [None, None])
    assert checkpoints.best is None


def test_a_state_is_restored_bit_for_bit(tiny, tmp_path, assert_same):
    averaging = tiny(dropout=0.1, ema=0.9)
    state, _ = averaging.step(averaging.init(), averaging.batch())
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        restored = checkpoints.restore(averaging.abstract_state, 1)
    assert_same(restored, state)
    batch = averaging.batch(1)
    assert_same(averaging.step(restored, batch), averaging.step(state, batch))


def test_a_state_may_be_used_up_while_it_is_saved(checkpoints):
    """Train steps take over the memory of the state, and saving goes on in the background."""
    size = 1 << 20
    state = TrainState(step=jnp.int32(1), params={"w": jnp.full(size, 7.0)}, rest={}, opt_state=(), ema=None)
    abstract = abstract_of(state)
    checkpoints.save(state)
    overwritten = jax.jit(lambda params: jax.tree.map(lambda x: x * 0, params), donate_argnums=0)(state.params)
    jax.block_until_ready(overwritten)
    restored = checkpoints.restore(abstract, 1)
    np.testing.assert_array_equal(restored.params["w"], np.full(size, 7.0))


def test_a_checkpoint_can_be_restored_at_once(checkpoints, assert_same):
    for step in range(1, 4):
        state = small(step, value=step)
        checkpoints.save(state, {METRIC: float(step)})
        restored = checkpoints.restore(abstract_of(state), checkpoints.best)
        assert_same(restored, state)


def test_a_state_is_restored_onto_another_mesh(tiny, tmp_path, monkeypatch, assert_same):
    monkeypatch.setattr(sharding, "_MIN_SHARDED_BYTES", 0)
    sizes = [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "fsdp": 2}]
    whole, sharded, other = (tiny(mesh=make_mesh(size)) for size in sizes)
    single = tiny()
    state, _ = sharded.step(sharded.init(), sharded.batch())
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        checkpoints.save(state)
        for target in [whole, other, single]:
            restored = checkpoints.restore(target.abstract_state, 1)
            assert_same(restored, state)
            assert jax.tree.map(lambda x: x.sharding, restored) == target.shardings


def test_a_missing_step_is_answered_with_those_there_are(checkpoints):
    save_scores(checkpoints, [0.5, 0.6])
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7; it has \[1, 2\]\.$"):
        checkpoints.restore(abstract_of(small(1)), 7)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"w": jnp.zeros(4)}, r"\(3,\).*\(4,\)|\(4,\).*\(3,\)"),
        ({"v": jnp.zeros(3)}, r"\bv\b"),
        ({"w": jnp.zeros(3), "v": jnp.zeros(3)}, r"\bv\b"),
        ({}, r"\bw\b"),
    ],
)
def test_a_misfit_is_refused_with_the_reason(checkpoints, params, reason):
    checkpoints.save(small(1))
    state = TrainState(step=jnp.int32(1), params=params, rest={}, opt_state=small(1).opt_state, ema=None)
    with pytest.raises(CheckpointError, match="does not fit this model in .*" + reason) as error:
        checkpoints.restore(abstract_of(state), 1)
    assert "V0" not in str(error.value)


def test_another_width_is_refused(tiny, checkpoints):
    narrow, wide = tiny(), tiny(width=16)
    checkpoints.save(narrow.init())
    with pytest.raises(CheckpointError, match=r"params.blocks.0.mixer.D is \(1, 8\) there and \(1, 16\) here"):
        checkpoints.restore(wide.abstract_state, 0)


def test_a_save_that_was_killed_is_not_a_checkpoint(tmp_path):
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        save_scores(checkpoints, [0.5, 0.6])
    leftover = tmp_path / "3.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "state").mkdir()
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        assert checkpoints.steps == [1, 2]
        assert (checkpoints.best, checkpoints.last) == (2, 2)
        checkpoints.save(small(3, value=5), {METRIC: 0.7})
        restored = checkpoints.restore(abstract_of(small(3)), 3)
        np.testing.assert_array_equal(restored.params["w"], small(3, value=5).params["w"])
    assert not list(tmp_path.glob("*tmp*"))


def test_the_names_and_shapes_of_a_checkpoints_arrays_stay(tiny):
    """Renaming one makes the checkpoints that people have unreadable."""

    def named(tree, prefix):
        return {f"{prefix}{name}": shape for name, shape in tree.items()}

    def group_of(name):
        if name.rpartition("[")[2].strip("']") in ("inv_dt", "A_real", "A_imag", "B"):
            return "ssm"
        if name.endswith("['C']"):
            return "ssm_c"
        return "no_decay" if name.endswith(("['bias']", "['scale']")) else "decay"

    expected = {".step": (), **named(PARAMS, ".params"), **named(PARAMS, ".ema")}
    for group in ["decay", "no_decay", "ssm", "ssm_c"]:
        inner = f".opt_state[1].inner_states['{group}'].inner_state"
        members = {name: shape for name, shape in PARAMS.items() if group_of(name) == group}
        expected |= named(members, f"{inner}[0].mu") | named(members, f"{inner}[0].nu")
        expected |= {f"{inner}[0].count": (), f"{inner}[2].count": ()}
    leaves = jax.tree_util.tree_leaves_with_path(tiny(ema=0.9).abstract_state)
    assert {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves} == expected
