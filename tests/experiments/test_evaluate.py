import json

import pytest

from experiments.config import ConfigError
from experiments.evaluate import evaluate, find
from ssm_jax.training.checkpoints import CheckpointError


def test_a_run_scores_as_training_reported(finished):
    workdir, config, scores = finished
    assert evaluate(config, workdir) == scores


def test_the_table_has_the_scores(finished, capsys):
    workdir, config, scores = finished
    evaluate(config, workdir)
    printed = capsys.readouterr().out
    assert "8 x 8 (training)" in printed
    for score in scores.values():
        assert f"{score['loss']:.4f}" in printed
        assert f"{score['accuracy']:.2%}" in printed


def test_the_best_checkpoint_is_taken(finished, capsys):
    workdir, config, _ = finished
    evaluate(config, workdir)
    best = json.loads((workdir / "results.json").read_text())["step"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"isotropic_s4nd on the digits test images, checkpoint of step {best}" in printed


def test_one_checkpoint_can_be_named(finished, capsys):
    workdir, config, scores = finished
    by_step = {step: evaluate(config, workdir / "checkpoints" / str(step)) for step in [8, 12]}
    best = json.loads((workdir / "results.json").read_text())["step"]
    assert by_step[best] == scores
    assert by_step[8] != by_step[12]
    assert "checkpoint of step 8 " in " ".join(capsys.readouterr().out.split())


def test_any_resolution_can_be_named(finished):
    workdir, config, scores = finished
    finer = evaluate(config, workdir, 16)
    assert list(finer) == [16]
    assert set(finer[16]) == {"loss", "accuracy"}
    assert evaluate(config, workdir, 4) == {4: scores[4]}


def test_nothing_is_written_into_the_run(finished):
    workdir, config, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    evaluate(config, workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == before


def test_a_wrong_path_is_answered_with_what_is_meant(tmp_path, tiny_config):
    with pytest.raises(ConfigError, match="is neither a run's workdir nor a checkpoint in one"):
        evaluate(tiny_config(), tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_step_is_answered_with_those_there_are(finished):
    workdir, config, _ = finished
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7; it has \["):
        evaluate(config, workdir / "checkpoints" / "7")


def test_a_run_without_checkpoints_is_answered(tmp_path, tiny_config):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has no evaluated checkpoint"):
        evaluate(tiny_config(), tmp_path)


def test_a_checkpoint_of_another_network_is_refused(finished, tiny_config):
    workdir, _, _ = finished
    with pytest.raises(ConfigError, match=r"another network:\n  config.model.d_model: 8 there, 16 now\nRepeat"):
        evaluate(tiny_config(**{"model.d_model": 16}), workdir)


def test_an_impossible_resolution_is_refused(finished):
    workdir, config, _ = finished
    with pytest.raises(ConfigError, match=r"^--resolution must be at least 1, got 0"):
        evaluate(config, workdir, 0)


def test_paths_mean_a_run_or_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    assert find(tmp_path) == (tmp_path / "checkpoints", None)
    assert find(tmp_path / "checkpoints" / "12") == (tmp_path / "checkpoints", 12)


def test_the_command_prints_the_table(finished, command):
    workdir, _, scores = finished
    done = command("experiments.evaluate").run(f"--checkpoint={workdir}", "--resolution=4", devices=8)
    assert done.returncode == 0, done.stderr
    assert f"{scores[4]['accuracy']:.2%}" in done.stdout
