import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.loop import NonFiniteLossError, Stopped, fit
from ssm_jax.training.metrics import MetricWriter, ProgressBar, read_metrics
from ssm_jax.training.steps import TrainState

BATCH_SIZE = 4


def state_at(step):
    return TrainState(step=jnp.int32(step), params={"w": jnp.zeros(2)}, rest={}, opt_state=(), ema=None)


@jax.jit
def train_step(state, batch):
    """The "loss" of a batch is its content, and its gradient overflows float32 before it does."""
    state = TrainState(state.step + 1, {"w": state.params["w"] + batch}, state.rest, state.opt_state, state.ema)
    return state, {"loss": batch, "accuracy": batch / 2, "grad_norm": batch * 10}


class Recorded(Checkpoints):
    """Notes what is saved."""

    def __init__(self):
        self.saved = []

    @property
    def last(self):
        return self.saved[-1][0] if self.saved else None

    def save(self, state, metrics=None):
        self.saved.append((int(state.step), metrics))


class Trained:
    """A run of `fit` on numbers as batches, and what it wrote."""

    def __init__(self, workdir, *, losses=None, start=0, checkpoints=None, stop_at=None, **cadence):
        self.taken = 0
        self.asked = []
        self.traced = []
        self.stop_at = stop_at
        self.stopped = None
        self.evaluated = []
        self.checkpoints = checkpoints or Recorded()
        self.workdir = workdir
        cadence = {"total_steps": 12, "eval_every": 5, "checkpoint_every": 4, "log_every": 3} | cadence
        losses = itertools.count(1.0) if losses is None else losses
        with (
            MetricWriter(workdir, step=start) as writer,
            ProgressBar(total_steps=cadence["total_steps"], step=start) as progress,
        ):
            try:
                self.state = fit(
                    state_at(start),
                    train_step=train_step,
                    batches=map(self.batch, losses),
                    evaluate=self.evaluate,
                    schedule=lambda step: 0.1 * step,
                    checkpoints=self.checkpoints,
                    writer=writer,
                    progress=progress,
                    batch_size=BATCH_SIZE,
                    stopping=self.stopping,
                    tracing=lambda step, state: self.traced.append((step, self.taken, int(state.step))),
                    **cadence,
                )
            except Stopped as stopped:
                self.stopped = stopped.step

    def batch(self, loss):
        self.taken += 1
        return jnp.float32(loss)

    def evaluate(self, state):
        self.evaluated.append(int(state.step))
        return {"val/loss": 0.5, "val/accuracy": int(state.step) / 100}

    def stopping(self, step):
        self.asked.append((step, list(self.saved)))
        return step == self.stop_at

    @property
    def rows(self):
        return read_metrics(self.workdir)

    @property
    def saved(self):
        return [step for step, _ in getattr(self.checkpoints, "saved", [])]


@pytest.fixture
def trained(tmp_path):
    return Trained(tmp_path)


def training_rows(rows):
    return [row for row in rows if "train/loss" in row]


def test_training_ends_after_the_last_step(trained):
    assert int(trained.state.step) == 12
    assert trained.taken == 12
    np.testing.assert_array_equal(trained.state.params["w"], [78.0, 78.0])  # 1 + 2 + ... + 12


def test_the_model_is_evaluated_at_its_cadence_and_at_the_end(trained):
    assert trained.evaluated == [5, 10, 12]


def test_the_model_is_saved_at_its_cadence_and_whenever_it_is_evaluated(trained):
    assert trained.saved == [4, 5, 8, 10, 12]


@pytest.mark.parametrize("total_steps", [1, 5, 11])
def test_the_last_step_is_evaluated_and_saved_once(tmp_path, total_steps):
    trained = Trained(tmp_path, total_steps=total_steps, eval_every=5, checkpoint_every=5)
    assert trained.evaluated[-1] == trained.saved[-1] == total_steps
    assert len(set(trained.evaluated)) == len(trained.evaluated)
    assert len(set(trained.saved)) == len(trained.saved)


def test_scores_are_saved_with_the_models_they_belong_to(trained):
    for step, scores in trained.checkpoints.saved:
        assert scores == ({"val/loss": 0.5, "val/accuracy": step / 100} if step in (5, 10, 12) else None)


def test_rows_are_written_at_their_cadence_and_whenever_a_model_is_saved(trained):
    assert [row["step"] for row in training_rows(trained.rows)] == [3, 4, 5, 6, 8, 9, 10, 12]


def test_rows_are_means_since_the_row_before(trained):
    means = {3: 2.0, 4: 4.0, 5: 5.0, 6: 6.0, 8: 7.5, 9: 9.0, 10: 10.0, 12: 11.5}
    rows = training_rows(trained.rows)
    assert {row["step"]: row["train/loss"] for row in rows} == means
    assert {row["step"]: row["train/accuracy"] for row in rows} == {step: mean / 2 for step, mean in means.items()}


def test_rows_have_the_rate_of_their_last_update(trained):
    for row in training_rows(trained.rows):
        assert row["train/lr"] == pytest.approx(0.1 * (row["step"] - 1))


def test_scores_are_rows_too(trained):
    rows = [row for row in trained.rows if "val/loss" in row]
    assert rows == [{"step": step, "val/loss": 0.5, "val/accuracy": step / 100} for step in (5, 10, 12)]


def test_throughput_is_positive_from_the_second_step_on(trained):
    assert all(row["images_per_second"] > 0 for row in training_rows(trained.rows))


def test_rows_tell_how_much_of_the_time_input_took(trained):
    assert all(0 <= row["input_wait"] <= 1 for row in training_rows(trained.rows))


def test_what_a_row_is_about_is_written_before_its_checkpoint(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(MetricWriter, "flush", lambda self: order.append("flush"))
    monkeypatch.setattr(Recorded, "save", lambda self, state, metrics=None: order.append(int(state.step)))
    Trained(tmp_path)
    assert order == ["flush", 4, "flush", 5, "flush", 8, "flush", 10, "flush", 12]


def test_a_trace_is_told_of_each_step_before_it_begins(trained):
    assert trained.traced == [(step, step - 1, step - 1) for step in range(1, 13)]


def test_numbers_are_fetched_only_for_rows(tmp_path, monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(len(tree)) or device_get(tree))
    Trained(tmp_path)
    assert fetched == [3, 1, 1, 1, 2, 1, 1, 2]  # steps


def test_a_run_goes_on_from_its_step(tmp_path, trained):
    rest = Trained(tmp_path, start=8, losses=itertools.count(9.0))
    assert int(rest.state.step) == 12
    assert rest.evaluated == [10, 12]
    assert rest.saved == [10, 12]
    assert [row["step"] for row in training_rows(rest.rows)] == [3, 4, 5, 6, 8, 9, 10, 12]
    assert training_rows(rest.rows)[-1]["train/loss"] == 11.5


def test_a_finished_run_is_left_as_it_is(tmp_path, trained):
    before = trained.rows
    again = Trained(tmp_path, start=12)
    assert (again.taken, again.evaluated, again.saved) == (0, [], [])
    assert again.rows == before


def test_it_is_asked_after_every_step_whether_to_stop(trained):
    assert [step for step, _ in trained.asked] == [*range(1, 13)]
    assert trained.stopped is None


@pytest.mark.parametrize("at", [1, 3, 4, 5, 7, 12])
def test_a_run_that_is_stopped_ends_with_its_state_saved_once(tmp_path, at):
    """Amid everything, after a row, after a checkpoint, after an evaluation, and after the last step."""
    stopped = Trained(tmp_path, stop_at=at)
    assert stopped.stopped == stopped.taken == stopped.asked[-1][0] == at
    assert stopped.saved == sorted({step for step in (4, 5, 8, 10, 12) if step < at} | {at})
    assert stopped.evaluated == [step for step in (5, 10, 12) if step <= at]
    assert training_rows(stopped.rows)[-1]["step"] == at


def test_where_a_run_is_evaluated_it_is_asked_to_stop_afterwards(tmp_path):
    """So that being asked during an evaluation is noticed at once."""
    assert Trained(tmp_path).asked[4] == (5, [4, 5])


@pytest.mark.parametrize("at", [3, 4, 5, 7])
def test_a_run_that_was_stopped_ends_as_an_unbroken_one(tmp_path, trained, at):
    (tmp_path / "run").mkdir()
    first = Trained(tmp_path / "run", stop_at=at)
    rest = Trained(tmp_path / "run", start=at, losses=itertools.count(at + 1.0))
    assert first.evaluated + rest.evaluated == trained.evaluated
    scored = {step: scores for step, scores in first.checkpoints.saved + rest.checkpoints.saved if scores}
    assert scored == {step: scores for step, scores in trained.checkpoints.saved if scores}


def test_a_stopped_run_has_been_saved_to_the_end(tmp_path):
    (tmp_path / "run").mkdir()
    with Checkpoints(tmp_path / "checkpoints", metric="val/accuracy") as checkpoints:
        Trained(tmp_path / "run", stop_at=7, checkpoints=checkpoints)
        assert not list((tmp_path / "checkpoints").glob("*tmp*"))
        assert checkpoints.steps == [5, 7]


def test_a_bad_loss_is_not_saved_when_a_run_is_stopped(tmp_path):
    recorded = Recorded()
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 6; the checkpoint of step 5 is kept"):
        Trained(tmp_path, losses=[1.0] * 5 + [np.nan, 1.0], checkpoints=recorded, stop_at=7)
    assert [step for step, _ in recorded.saved] == [4, 5]


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [1, 4, 6, 7, 12])
def test_a_loss_that_is_not_finite_ends_training_at_its_step(tmp_path, loss, at):
    losses = [float(step) for step in range(1, 13)]
    losses[at - 1] = loss
    recorded = Recorded()
    with pytest.raises(NonFiniteLossError) as error:
        Trained(tmp_path, losses=losses, checkpoints=recorded)
    good = [step for step, _ in recorded.saved]
    assert good == [step for step in (4, 5, 8, 10, 12) if step < at]
    kept = f"the checkpoint of step {good[-1]} is kept" if good else "no checkpoint was saved yet"
    assert str(error.value).startswith(f"the loss is {np.float32(loss)} at step {at}; {kept}. Try a lower ")


def test_the_first_of_several_bad_losses_is_named(tmp_path):
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 7;"):
        Trained(tmp_path, losses=[1.0] * 6 + [np.nan, np.inf, np.nan] + [1.0] * 3)


def test_a_gradient_that_is_not_finite_ends_training_though_the_loss_is(tmp_path):
    recorded = Recorded()
    with pytest.raises(NonFiniteLossError, match="the grad_norm is inf at step 6; the checkpoint of step 5 is kept"):
        Trained(tmp_path, losses=[1.0] * 5 + [1e38] * 7, checkpoints=recorded)


def test_after_a_bad_loss_the_last_good_checkpoint_can_be_restored(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (
        Checkpoints(tmp_path / "checkpoints", metric="val/accuracy") as checkpoints,
        pytest.raises(NonFiniteLossError, match="at step 7; the checkpoint of step 5 is kept"),
    ):
        Trained(workdir, losses=[1.0] * 6 + [np.nan] * 6, checkpoints=checkpoints)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state_at(0))
    with Checkpoints(tmp_path / "checkpoints", metric="val/accuracy") as checkpoints:
        assert checkpoints.steps == [4, 5]
        state = checkpoints.restore(abstract, 5)
    np.testing.assert_array_equal(state.params["w"], [5.0, 5.0])
