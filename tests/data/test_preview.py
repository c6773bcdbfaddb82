import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.s4nd import digits
from ssm_jax.data.preview import preview

ROOT = Path(__file__).resolve().parent.parent.parent


def shown(figure):
    return [axes for axes in figure.axes if axes.images]


def pictures(figure):
    return np.stack([axes.images[0].get_array() for axes in shown(figure)])


def test_a_batch_is_drawn_as_the_network_gets_it():
    config = digits.get_config()
    config.augment.crop_padding = 0
    figure = preview(config, 12)
    assert len(shown(figure)) == 12
    from ssm_jax.data.datasets import load_dataset

    train = load_dataset("digits").splits["train"]
    known = {}
    for i in range(len(train)):
        known.setdefault(train[i]["image"].tobytes(), set()).add(str(train[i]["label"]))
    for axes in shown(figure):
        assert axes.get_title() in known[np.asarray(axes.images[0].get_array(), np.uint8).tobytes()]


def test_mixed_images_have_both_classes_with_their_weights():
    config = digits.get_config()
    config.augment.update(mixup=1.0, mix_group=4)
    titles = [axes.get_title() for axes in shown(preview(config, 8))]
    weights = [[float(part.split()[1]) for part in title.split(", ")] for title in titles if "," in title]
    assert weights  # pairs of one class have one
    assert all(sum(pair) == pytest.approx(1, abs=0.011) for pair in weights)


def test_the_resolution_is_that_of_the_first_stage():
    config = digits.get_config()
    config.stages.update(epochs=(40.0, 20.0), resolutions=(4, 8), bandlimits=(0.1, None))
    assert pictures(preview(config, 2)).shape[1:3] == (4, 4)


def test_the_command_writes_a_picture(tmp_path, monkeypatch, capsys):
    import subprocess

    out = tmp_path / "preview.png"
    command = [sys.executable, "-m", "ssm_jax.data.preview", "--config=configs/s4nd/digits.py", f"--out={out}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{out}\n"), result.stderr
    with Image.open(out) as picture:
        assert np.asarray(picture.convert("L")).std() > 20
    result = subprocess.run(
        [*command, "--config.data.name=digit"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: name must be one of")
