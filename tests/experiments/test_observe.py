"""What a run tells of itself while it runs, and what its starts may be asked for besides."""

import json
import sys
import types

import jax
import pytest
from traces import traced

from experiments.config import ConfigError
from experiments.experiment import build
from experiments.observe import Steps, check_profile, find_writer, parse_profile
from experiments.train import train
from ssm_jax import chips, summary
from ssm_jax.training.metrics import read_metrics


@pytest.mark.parametrize(("text", "steps"), [("10:15", (10, 15)), ("1:1", (1, 1)), ("5", (11, 15)), ("1", (11, 11))])
def test_a_profile_is_of_steps_of_this_start(text, steps):
    assert parse_profile(text) == steps


@pytest.mark.parametrize("text", ["", "0", "0:3", "5:4", "a", "3:", ":3", "-3", "1:2:3", "1.5"])
def test_other_profiles_are_refused(text):
    with pytest.raises(ConfigError, match=r"--profile must be FIRST:LAST, .* such as 10:15"):
        parse_profile(text)


def test_a_profile_counts_from_where_a_run_goes_on():
    assert check_profile(Steps(2, 4), 100, 104) == (102, 104)


def test_a_profile_of_more_steps_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="--profile asks for step 5 of this start, which has 4 left to take"):
        check_profile(Steps(2, 5), 100, 104)


@pytest.mark.parametrize("name", ["no_such_module:make", "json:no_such_function", "json", ":dumps"])
def test_a_writer_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match=f"--writer must be MODULE:FUNCTION, .* got '{name}'"):
        find_writer(name)


@pytest.mark.parametrize("found", [3, lambda workdir, config, step: {}], ids=["no function", "nothing that writes"])
def test_what_is_no_writer_is_refused(monkeypatch, found):
    module = types.ModuleType("my_writers")
    module.found = found
    monkeypatch.setitem(sys.modules, "my_writers", module)
    with pytest.raises(ConfigError, match=r"--writer.*my_writers:found"):
        find_writer("my_writers:found")("runs/digits", {}, 0)


@pytest.mark.parametrize(
    ("data", "score"),
    [("digits", "val/accuracy"), ("coco", "val/mean_average_precision"), ("hmdb51", "val/video_accuracy")],
)
def test_the_best_checkpoint_is_that_of_the_score_in_tables(tiny_config, data, score):
    experiment = build(tiny_config())
    with experiment.config.unlocked():
        experiment.config.data.name = data
    assert experiment.best_by == score


class Kept:
    """A writer such as those of services for experiments."""

    def __init__(self, workdir, config, step):
        self.begun = workdir, config, step
        self.rows, self.closed = [], False
        made.append(self)

    def write(self, step, metrics):
        assert all(type(value) in (float, int) for value in metrics.values())
        self.rows.append({"step": step, **metrics})

    def flush(self):
        pass

    def close(self):
        self.closed = True


made = []


@pytest.fixture(scope="module")
def observed(tiny_config, tmp_path_factory):
    """A run on a chip that is known, with a trace and a writer of its own."""
    workdir = tmp_path_factory.mktemp("runs") / "observed"
    module = types.ModuleType("my_writers")
    module.Kept = Kept
    config = tiny_config(**{"ema_decay": 0.9, "eval.resolutions": ()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "my_writers", module)
        patch.setitem(chips._GPUS, (jax.devices()[0].device_kind,), chips.Chip("fake", 1e12, 1e9, 1e9))
        writer = find_writer("my_writers:Kept")
        train(config, workdir, profile=parse_profile("5:6"), writers=[writer])
    return workdir, config


def test_a_further_writer_gets_all_rows(observed):
    workdir, config = observed
    (kept,) = made
    assert kept.begun == (workdir, config.to_dict(), 0)
    assert kept.rows == read_metrics(workdir)
    assert kept.closed


def test_the_trace_of_a_run_has_the_steps_that_were_asked_for(observed):
    workdir, _ = observed
    names, steps = traced(workdir / "profile")
    assert steps == [5, 6]
    assert any("PjitFunction(step)" in name for name in names)
    assert "wait for input" in names


def test_rows_tell_what_a_run_costs_and_what_became_of_its_dynamics(observed):
    workdir, config = observed
    rows = read_metrics(workdir)
    training = [row for row in rows if "train/loss" in row]
    for row in training:
        assert row["train/grad_norm"] > 0
        assert row["train/param_norm"] > 0
        assert 0 <= row["input_wait"] <= 1
        assert row["images_per_second_per_device"] == row["images_per_second"] / jax.device_count()
    model = build(config).abstract_model
    flops = 6 * summary(model, (1, 8, 8, 1)).total.multiply_adds
    peak = 1e12 * jax.device_count()
    assert training[-1]["mfu"] == pytest.approx(training[-1]["images_per_second"] * flops / peak, rel=1e-3)
    dynamics = [row for row in rows if "ssm/s4nd/dt_mean" in row]
    assert [row["step"] for row in dynamics] == [row["step"] for row in rows if "val/loss" in row] == [8, 12]
    for row in dynamics:
        for name in ("dt", "A"):
            low, mean, high = (row[f"ssm/s4nd/{name}_{end}"] for end in ("min", "mean", "max"))
            assert 0 < low < mean < high
    assert dynamics[0] != dynamics[1] | {"step": 8}  # they are trained


def test_what_devices_do_not_tell_is_absent(finished):
    """A CPU has no peak that is known, and does not tell its memory."""
    workdir, _, _ = finished
    names = {name for row in read_metrics(workdir) for name in row}
    assert not names & {"mfu", "memory_bytes", "memory_peak_bytes"}


def test_a_run_notes_its_starts(observed):
    workdir, _ = observed
    run = json.loads((workdir / "run.json").read_text())
    (start,) = run["starts"]
    assert start["devices"] == jax.device_count()
    assert start["versions"]["jax"] == jax.__version__
    assert start["outcome"] == "finished"
    assert start["start"] <= start["end"]
    assert sum(run["groups"].values()) == run["parameters"]
    assert (run["total_steps"], run["steps_per_epoch"]) == (12, 4)
