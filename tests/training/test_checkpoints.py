import resource
import shutil
import signal
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from ssm_jax.training import checkpoint_files, sharding
from ssm_jax.training import checkpoints as module
from ssm_jax.training.checkpoints import CheckpointError, Checkpoints, DamagedCheckpointError, absolute, find_checkpoint
from ssm_jax.training.sharding import make_mesh
from ssm_jax.training.steps import TrainState

# Where orbax fails, threads of tensorstore may still want to tell it something.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

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


def test_metrics_may_come_after_the_checkpoint(tmp_path):
    """Which stays as it is: written again, it could be lost."""
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        checkpoints.save(small(1), {METRIC: 0.5})
        checkpoints.save(small(2, value=7))
        assert not checkpoints.scored(2)
    before = {path: path.read_bytes() for path in (tmp_path / "2").rglob("*") if path.is_file()}
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        checkpoints.add_metrics(2, {METRIC: 0.9})
        assert checkpoints.best == 2
    assert before == {path: path.read_bytes() for path in (tmp_path / "2").rglob("*") if path.is_file()}
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        assert checkpoints.scored(2)
        assert checkpoints.best == 2
        checkpoints.save(small(3))
        checkpoints.save(small(4))
        assert checkpoints.steps == [2, 3, 4]


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


@pytest.mark.slow
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


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def data_of(checkpoint):
    """The file that has most of a checkpoint's numbers."""
    return max(checkpoint.rglob("d/*"), key=lambda path: path.stat().st_size)


def damage(checkpoint):
    path = data_of(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of step 1 with arrays that devices share, and its state."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    parts, whole = jax.NamedSharding(mesh, P("fsdp")), jax.NamedSharding(mesh, P())
    params = {
        "random": jax.device_put(np.random.default_rng(0).standard_normal((64, 16), np.float32), parts),
        "ones": jax.device_put(np.ones((64, 16), np.float32), parts),
        "zeros": jax.device_put(np.zeros(64, np.float32), whole),
    }
    state = TrainState(jax.device_put(np.int32(1), whole), params, {}, (), None)
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, metric=METRIC) as checkpoints:
        checkpoints.save(state, {METRIC: 0.5})
    return folder, state


DAMAGES = {
    "deleted": None,
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "a bit flipped at a third": lambda data: flipped(data, len(data) // 3),
    "a bit flipped at two thirds": lambda data: flipped(data, 2 * len(data) // 3),
}


def flipped(data, index):
    return data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_is_noticed_or_harmless(saved, tmp_path, assert_same, how):
    folder, state = saved
    noticed = set()
    for number, name in enumerate(contents(folder)):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        path = copy / name
        if DAMAGES[how] is None:
            path.unlink()
        else:
            path.write_bytes(DAMAGES[how](path.read_bytes()))
        try:
            with Checkpoints(copy) as checkpoints:
                assert_same(checkpoints.restore(abstract_of(state), 1), state)
                assert checkpoints.best == 1
        except DamagedCheckpointError as error:
            assert f"checkpoint {copy / '1'} is damaged: " in str(error)  # noqa: PT017
            noticed.add(name)
    assert {Path("1/_CHECKPOINT_METADATA"), data_of(folder).relative_to(folder)} <= noticed


def test_damage_to_metrics_is_noticed(saved, tmp_path):
    """A digit of them is as good as any other, but for the checksum."""
    shutil.copytree(saved[0] / "1", tmp_path / "1")
    path = tmp_path / "1" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace(f'"{METRIC}": 0.5', f'"{METRIC}": 0.9'))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == []
        with pytest.raises(CheckpointError, match=r"1 is damaged: its _CHECKPOINT_METADATA is not what was written"):
            checkpoints.restore_best(abstract_of(saved[1]))


def test_a_damaged_last_checkpoint_makes_way_for_the_one_before(tmp_path, caplog, assert_same):
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        save_scores(checkpoints, [0.5, 0.6])
    damage(tmp_path / "2")
    damaged, before = contents(tmp_path / "2"), contents(tmp_path)
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        assert_same(checkpoints.restore_last(abstract_of(small(1))), small(1))
        assert checkpoints.steps == [1]
        assert (checkpoints.best, checkpoints.last) == (1, 1)
        assert contents(tmp_path) == before
        (warning,) = [message for message in caplog.messages if "Falling back" in message]
        assert warning.startswith(f"checkpoint {tmp_path / '2'} is damaged: ")
        assert warning.endswith("Falling back to the checkpoint of step 1.")
        checkpoints.save(small(2, value=5), {METRIC: 0.7})
        assert checkpoints.best == 2
    assert contents(tmp_path / "2.damaged") == damaged
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        assert checkpoints.steps == [1, 2]
        assert_same(checkpoints.restore_last(abstract_of(small(1))), small(2, value=5))
        checkpoints.save(small(3))
    assert contents(tmp_path / "2.damaged") == damaged


def test_a_step_can_be_damaged_twice(tmp_path):
    for _ in range(2):
        with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
            checkpoints.restore_last(abstract_of(small(1)))
            save_scores(checkpoints, [0.5, 0.6] if checkpoints.last is None else [])
            if checkpoints.last == 1:
                checkpoints.save(small(2))
        damage(tmp_path / "2")
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        assert int(checkpoints.restore_last(abstract_of(small(1))).step) == 1
        checkpoints.save(small(2))
        assert checkpoints.steps == [1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.damaged", "2.damaged-1"}


@pytest.mark.parametrize("file", ["data", "_CHECKPOINT_METADATA"])
def test_a_damaged_best_checkpoint_makes_way_for_the_next_best(tmp_path, caplog, assert_same, file):
    """Also where it can no longer be told how good it was."""
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        save_scores(checkpoints, [0.9, 0.6, 0.7])
    if file == "data":
        damage(tmp_path / "1")
    else:
        (tmp_path / "1" / file).write_text("")
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore_best(abstract_of(small(1))), small(3))
    assert "Falling back to the checkpoint of step 3." in caplog.text
    assert f"{tmp_path / '1'} is damaged" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        save_scores(checkpoints, [0.5, 0.6])
    for step in "12":
        damage(tmp_path / step)
    before = contents(tmp_path)
    for restore in [Checkpoints.restore_last, Checkpoints.restore_best]:
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=r"There is no other.*new --w"):
            restore(checkpoints, abstract_of(small(1)))
    assert contents(tmp_path) == before


def test_where_nothing_was_saved_there_is_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path / "nowhere") as checkpoints:
        assert checkpoints.restore_last(abstract_of(small(1))) is None
        with pytest.raises(CheckpointError, match="has no evaluated checkpoint"):
            checkpoints.restore_best(abstract_of(small(1)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [PermissionError("not yours"), ValueError("UNAVAILABLE: the store is busy"), MemoryError("too large")]
)
def test_what_may_pass_is_not_taken_for_damage(tmp_path, monkeypatch, error):
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        save_scores(checkpoints, [0.5, 0.6])

        def load(*_, **__):
            raise error

        monkeypatch.setattr(ocp, "load", load)
        with pytest.raises(CheckpointError, match=r"2 cannot be read: .*(yours|busy|large)") as told:
            checkpoints.restore_last(abstract_of(small(1)))
        assert not isinstance(told.value, DamagedCheckpointError)


def test_a_misfit_is_no_damage(checkpoints):
    save_scores(checkpoints, [0.5, 0.6])
    state = TrainState(jnp.int32(1), {"w": jnp.zeros(4)}, {}, small(1).opt_state, None)
    for restore in [checkpoints.restore_last, checkpoints.restore_best]:
        with pytest.raises(CheckpointError, match="2 does not fit this model"):
            restore(abstract_of(state))


def test_another_dtype_is_refused(checkpoints):
    checkpoints.save(small(1))
    state = TrainState(jnp.int32(1), {"w": jnp.zeros(3, jnp.bfloat16)}, {}, small(1).opt_state, None)
    with pytest.raises(CheckpointError, match=r"params.w is \(3,\) there and \(3,\) bfloat16 here"):
        checkpoints.restore(abstract_of(state), 1)


def test_another_format_is_refused_with_the_version_that_wrote_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", 7)
    monkeypatch.setattr(module, "__version__", "9.8.7")
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        checkpoints.save(small(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"1 was written by ssm_jax 9\.8\.7 in format 7; .* reads format 1\. Go"):
        Checkpoints(tmp_path)


def test_checkpoints_without_a_format_are_refused(tmp_path):
    """As they were before there were checksums."""
    ocp.save(tmp_path / "1", vars(small(1)), checkpointable_name="state")
    with pytest.raises(CheckpointError, match=r"that did not write checksums yet; .* or start again in a new"):
        Checkpoints(tmp_path)


@pytest.fixture
def full():
    """Files cannot grow beyond a megabyte, which is as on a full disk."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    signal.signal(signal.SIGXFSZ, handler)


def large(step):
    numbers = np.random.default_rng(0).standard_normal(1 << 20, np.float32)  # 4 MB that cannot be compressed
    return TrainState(jnp.int32(step), {"w": jnp.asarray(numbers)}, {}, (), None)


@pytest.mark.parametrize("then", ["the next save", "the end", "a look at the steps"])
def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path, full, then):
    message = f"step 2 cannot be saved in {tmp_path}: .*File too large.* Free space, .*; the checkpoint of step 1 is"

    def save_on_a_full_disk():
        with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
            checkpoints.save(small(1), {METRIC: 0.5})
            assert checkpoints.last == 1
            full()
            checkpoints.save(large(2), {METRIC: 0.6})
            if then == "the next save":
                checkpoints.save(small(3))
            elif then == "a look at the steps":
                print(checkpoints.last)

    with pytest.raises(CheckpointError, match=message):
        save_on_a_full_disk()
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(small(2))
        assert checkpoints.steps == [1, 2]


def test_what_ended_a_run_is_not_hidden_by_a_full_disk(tmp_path, full, caplog):
    def interrupted():
        with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
            full()
            checkpoints.save(large(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "step 1 cannot be saved" in caplog.text
    assert "there is none before it" in caplog.text


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints", metric=METRIC)
    with pytest.raises(CheckpointError, match=r"step 1 cannot be saved in .*Not a directory"):
        checkpoints.save(small(1))


def test_reading_leaves_a_save_under_way_alone(tmp_path, saved):
    folder, state = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore_best(abstract_of(state))
        checkpoints.read_network()
    assert (tmp_path / "2.orbax-checkpoint-tmp").exists()


def test_a_network_is_read_without_the_rest(tiny, tmp_path, monkeypatch, assert_same):
    run = tiny()
    with Checkpoints(tmp_path, metric=METRIC) as checkpoints:
        checkpoints.save(run.init(), {METRIC: 0.5})
        load, wanted = ocp.load, []
        monkeypatch.setattr(
            ocp, "load", lambda path, what, **options: wanted.append(what) or load(path, what, **options)
        )
        best, named = checkpoints.read_network(), checkpoints.read_network(0)
    assert [what.keys() for what in wanted] == [{"params", "rest"}] * 2
    params = run.init().params
    for network in [best, named]:
        found = dict(jax.tree_util.tree_leaves_with_path(network["params"]))
        names = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in found.items()}
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            np.testing.assert_array_equal(names[jax.tree_util.keystr(path, simple=True, separator=".")], x)
        assert len(names) == len(jax.tree.leaves(params))


def test_paths_that_mean_checkpoints(tmp_path):
    (tmp_path / "3" / "checkpoints" / "12").mkdir(parents=True)
    run = tmp_path / "3"
    assert find_checkpoint(run) == (run / "checkpoints", None)
    assert find_checkpoint(run / "checkpoints" / "12") == (run / "checkpoints", 12)
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "nowhere") is None


def test_a_url_stays_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert str(absolute("gs://bucket/run")) == "gs://bucket/run"
    assert str(absolute("run")) == str(tmp_path / "run")


class Bucket(MemoryFileSystem):
    """An object store in memory: it has no directories but as beginnings of names."""

    protocol = ("gs", "gcs")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return ("/" + path.removeprefix("gs://").strip("/")).rstrip("/")


@pytest.fixture
def bucket(monkeypatch):
    """A path as it is where gcsfs is installed, into the store in memory."""
    store = type(epath.backend.fsspec_backend)
    monkeypatch.setattr(store, "_get_filesystem", lambda self, name: Bucket())
    yield epath.Path("gs://bucket/run/checkpoints")
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]


def fill(bucket, *names):
    for name in names:
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_text("some")


def test_in_a_bucket_what_has_no_mark_of_its_commit_is_no_checkpoint(bucket):
    fill(bucket, "4/_METADATA", "8/_METADATA", "8/commit_success.txt", "8.damaged/commit_success.txt")
    assert checkpoint_files._committed(bucket) == [8]
    assert checkpoint_files._committed(bucket / "nowhere") == []


def test_in_a_bucket_damaged_checkpoints_are_set_aside(bucket):
    fill(bucket, "8/_CHECKPOINT_METADATA", "8/commit_success.txt")
    checkpoints = Checkpoints(absolute(bucket))
    assert checkpoints.steps == []
    checkpoints._set_damaged_aside()
    assert [path.name for path in bucket.iterdir()] == ["8.damaged"]
    assert (bucket / "8.damaged" / "_CHECKPOINT_METADATA").read_text() == "some"


def test_the_names_and_shapes_of_a_checkpoints_arrays_stay(tiny):
    """Renaming one makes the checkpoints that people have unreadable: a change here needs another FORMAT."""
    assert module.FORMAT == 1

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
