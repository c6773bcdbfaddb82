"""Videos at other frame rates than that of training."""

import json

import numpy as np
import pytest
import standin

from configs.s4nd import digits, hmdb51_s4nd
from experiments.classification import ClassificationProblem
from experiments.config import ConfigError
from experiments.evaluate import evaluate
from experiments.experiment import build
from experiments.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standin.make("hmdb51", tmp_path_factory.mktemp("hmdb51"))


@pytest.fixture
def config(folder):
    def make(*frames):
        config = hmdb51_s4nd.get_config()
        config.smoke = True
        config.dtype = "float32"
        config.data.update(dir=str(folder), frames=4, image_size=32, seconds=1.0)
        config.augment.update(rand_augment="", short_side=(32, 40))
        config.model.img_size = (4, 32, 32)
        config.eval.update(short_side=32, frames=frames)
        return config

    return make


def test_the_time_axis_has_the_rate_of_the_frames(config):
    experiment = build(config(4, 8))
    for frames, rate in [(4, 1.0), (8, 0.5), (2, 2.0)]:
        problem = experiment.with_frames(frames).problem
        assert isinstance(problem, ClassificationProblem)
        assert problem._rate(32) == (rate, 1.0, 1.0)
        assert problem._rate(16) == (rate, 2.0, 2.0)
        assert problem.example["image"][0] == (frames, 32, 32, 3)


def test_a_run_ends_with_a_table_for_each_number_of_frames(config, tmp_path, capsys):
    scores = train(config(4, 8), tmp_path / "run")
    found = json.loads((tmp_path / "run/results.json").read_text())
    assert [*found["test_by_frames"]] == ["4", "8"]
    assert found["test_by_frames"]["4"] == found["test"]["32"] == scores[32]
    printed = " ".join(capsys.readouterr().out.split())
    assert [printed.count(f"clips of {frames} frames") for frames in (4, 8)] == [1, 1]
    assert np.isfinite(found["test_by_frames"]["8"]["loss"])
    assert found["test_by_frames"]["8"] != found["test_by_frames"]["4"]
    evaluate(config(8), tmp_path / "run")
    assert "clips of 8 frames" in " ".join(capsys.readouterr().out.split())


def test_clips_that_a_network_does_not_take_are_refused_before_training(config):
    with pytest.raises(ConfigError, match=r"^config\.eval\.frames"):
        build(config(4, 1))


@pytest.mark.parametrize("frames", [(0,), (4.5,)])
def test_frames_are_whole_numbers(config, frames):
    with pytest.raises(ConfigError, match=r"^config\.eval\.frames must be whole numbers of at least 1"):
        build(config(*frames))


def test_images_have_no_frames():
    config = digits.get_config()
    config.eval.frames = (4,)
    with pytest.raises(ConfigError, match=r"^config\.eval\.frames is for videos, got \(4,\) for digits"):
        build(config)
