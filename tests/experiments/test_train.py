import json
import shutil

import jax
import pytest
from etils import epath
from PIL import Image

from experiments.config import ConfigError
from experiments.experiment import build
from experiments.lock import WorkdirInUseError, locked
from experiments.observe import Steps
from experiments.train import train
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.loop import NonFiniteLossError
from ssm_jax.training.metrics import read_metrics


def contents(folder):
    """All files under `folder` with their contents."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(workdir):
    """The metrics, apart from how fast they came."""
    return [
        {k: v for k, v in row.items() if k != "input_wait" and "per_second" not in k} for row in read_metrics(workdir)
    ]


def assert_is_picture(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) >= 200
        assert len(image.convert("L").getcolors(256)) > 10


def test_a_run_leaves_everything_in_its_workdir(finished):
    workdir, config, _ = finished
    names = {entry.name for entry in workdir.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert names - events == {
        "config.json",
        "run.json",
        "metrics.jsonl",
        "checkpoints",
        "results.json",
        "pictures",
        "report.html",
    }
    assert len(events) == 1
    assert (workdir / events.pop()).stat().st_size > 0
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(config.to_dict()))
    assert {entry.name for entry in (workdir / "checkpoints").iterdir()} >= {"8", "12"}


def test_metrics_come_at_their_cadence(finished):
    """4 steps per epoch; logged every 3, saved every 4, evaluated every 8 and at the end."""
    workdir, _, _ = finished
    steps = [row["step"] for row in read_metrics(workdir) if "train/loss" in row]
    assert steps == [3, 4, 6, 8, 9, 12]
    assert [row["step"] for row in read_metrics(workdir) if "val/loss" in row] == [8, 12]


def test_results_are_the_returned_scores(finished):
    workdir, _, scores = finished
    results = json.loads((workdir / "results.json").read_text())
    assert results["test"] == {str(resolution): score for resolution, score in scores.items()}
    assert list(scores) == [4, 8]
    assert results["jax"] == jax.__version__


def test_results_are_those_of_the_best_checkpoint(finished):
    workdir, config, scores = finished
    results = json.loads((workdir / "results.json").read_text())
    scored = {row["step"]: row["val/accuracy"] for row in read_metrics(workdir) if "val/accuracy" in row}
    assert scored[results["step"]] == max(scored.values())
    experiment = build(config)
    with Checkpoints(workdir / "checkpoints", metric="val/accuracy") as checkpoints:
        state = checkpoints.restore(experiment.abstract_state, results["step"])
    with jax.set_mesh(experiment.mesh):
        again = experiment.evaluate(state, "test", 8).scores
    assert again == pytest.approx(scores[8], rel=1e-5)


def test_there_are_four_pictures(finished):
    workdir, _, _ = finished
    names = ["accuracy_by_resolution", "kernels", "predictions", "training_curves"]
    assert sorted(path.name for path in (workdir / "pictures").iterdir()) == [f"{name}.png" for name in names]
    for name in names:
        assert_is_picture(workdir / "pictures" / f"{name}.png")


def test_the_same_command_again_only_reports_again(finished, tmp_path, capsys):
    workdir, config, scores = finished
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    assert train(config, copy) == scores
    assert read_metrics(copy) == read_metrics(workdir)
    assert contents(copy / "checkpoints") == contents(workdir / "checkpoints")
    assert (copy / "results.json").read_text() == (workdir / "results.json").read_text()
    said = capsys.readouterr().out
    assert "going on from step 12" in said
    assert "state on a mesh of data 8 x fsdp 1" in said


@pytest.mark.parametrize(
    ("change", "options"),
    [({"weights": "/nowhere"}, {}), ({}, {"profile": Steps(1000, 1001)})],
    ids=["weights", "profile"],
)
def test_what_cannot_be_started_leaves_no_workdir(tmp_path, tiny_config, change, options):
    with pytest.raises(ConfigError):
        train(tiny_config(**change), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_left_untouched(finished, tiny_config):
    workdir, _, _ = finished
    before = contents(workdir)
    with pytest.raises(ConfigError, match=r"config\.optimizer\.lr: 0\.01 there, 0\.5 now"):
        train(tiny_config(**{"optimizer.lr": 0.5}), workdir)
    assert contents(workdir) == before


def test_a_workdir_that_another_start_is_in_is_left_untouched(finished):
    workdir, config, _ = finished
    with locked(epath.Path(workdir)):
        before = contents(workdir)
        with pytest.raises(WorkdirInUseError):
            train(config, workdir)
        assert contents(workdir) == before


def test_a_directory_with_foreign_files_is_left_untouched(tmp_path, tiny_config):
    (tmp_path / "thesis.tex").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"not empty and not a run"):
        train(tiny_config(), tmp_path)
    assert contents(tmp_path) == before


def test_networks_without_state_spaces_have_no_picture_of_kernels(tmp_path, tiny_config):
    config = tiny_config(
        **{
            "model.name": "isotropic_conv2d",
            "model.mixer": {"kernel_size": 3},
            "epochs": 1.0,
            "optimizer.warmup_epochs": 0.5,
        }
    )
    scores = train(config, tmp_path / "run")
    assert set(scores) == {4, 8}
    names = ["accuracy_by_resolution", "predictions", "training_curves"]
    assert sorted(path.stem for path in (tmp_path / "run" / "pictures").iterdir()) == names


def test_a_run_that_diverges_keeps_its_good_checkpoints(tmp_path, tiny_config):
    """A rate of 1e30 makes parameters infinite at the first step that has it: warm-up is at 0 for step 1."""
    config = tiny_config(**{"optimizer.lr": 1e30, "checkpoint_every_epochs": 0.25})
    with pytest.raises(NonFiniteLossError, match=r"at step \d+; .* Try a lower config\.optimizer\.lr") as error:
        train(config, tmp_path / "run")
    bad = int(str(error.value).split(" at step ")[1].split(";")[0])
    with Checkpoints(tmp_path / "run" / "checkpoints", metric="val/accuracy") as checkpoints:
        assert checkpoints.steps
        assert max(checkpoints.steps) < bad
        assert f"the checkpoint of step {checkpoints.last} is kept" in str(error.value)
    assert max(row["step"] for row in rows(tmp_path / "run")) < bad
