"""What a run is exported as, used in a process that has JAX and safetensors alone."""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from experiments import export as module
from experiments.config import ConfigError
from experiments.evaluate import find, restore
from experiments.experiment import build
from experiments.export import export
from ssm_jax.pretrained.files import read_state

ALONE = """
import sys

class Blocked:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("ssm_jax", "experiments", "configs", "flax", "optax", "orbax"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked)
"""


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """What a finished run is exported as, in a folder that was not there."""
    workdir, config, _ = finished
    folder = tmp_path_factory.mktemp("exported") / "new" / "digits"
    export(config, workdir, folder)
    return folder


@pytest.fixture(scope="module")
def scored(finished):
    """The run's logits of test images at a resolution, and its images at the base resolution."""
    workdir, config, _ = finished
    experiment = build(config)
    with jax.set_mesh(experiment.mesh):
        state, _ = restore(experiment, *find(workdir))

    def at(resolution):
        with jax.set_mesh(experiment.mesh):
            return experiment.evaluate(state, "test", resolution).rows["logits"]

    return at, experiment.dataset.splits["test"].images


def run_alone(folder, code):
    """Runs code in a folder, in a new process in which nothing of the project can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE + code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_a_process_with_jax_alone_its_logits_are_those_of_evaluation(folder, scored, tmp_path):
    """By the program in its README, and for as many images as were never spoken of before."""
    logits, images = scored
    np.save(tmp_path / "images.npy", images)
    (program,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    more = f"""
        images = np.load({str(tmp_path / "images.npy")!r})
        logits = [network(weights, part) for part in (images[:1], images[1:8], images[8:])]
        np.save({str(tmp_path / "logits.npy")!r}, np.concatenate(logits))
        try:
            import ssm_jax
        except ModuleNotFoundError:
            print("alone")
    """
    printed = run_alone(folder, program + textwrap.dedent(more)).split()
    assert printed[-1] == "alone"
    assert {*printed[:2]} <= {*map(str, range(10))}  # of the README's two images
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits(8), rtol=0, atol=1e-5)


def test_a_function_for_another_resolution_is_of_images_of_that_size(command, finished, scored, tmp_path):
    """With the rate that goes with it. Where evaluation makes such images, this gets them rounded to bytes."""
    workdir, *_ = finished
    logits, images = scored
    out = tmp_path / "finer"
    done = command("experiments.export").run(f"--checkpoint={workdir}", f"--out={out}/", "--resolution=16")
    assert done.returncode == 0, done.stderr
    assert f"{out} has the network" in done.stdout
    metadata = json.loads((tmp_path / "finer" / "metadata.json").read_text())
    assert metadata["images"]["shape"] == ["batch", 16, 16, 1]
    assert metadata["rate"] == 0.5
    function = jax.export.deserialize((tmp_path / "finer" / "model.jax_export").read_bytes())
    weights = read_state(tmp_path / "finer" / "weights.safetensors")
    finer = jax.image.resize(images.astype(np.float32), (len(images), 16, 16, 1), "bilinear")
    actual = function.call(weights, np.asarray(finer).round().astype(np.uint8))
    np.testing.assert_allclose(actual, logits(16), rtol=0, atol=0.02 * np.abs(logits(16)).max())


def test_the_folder_says_what_is_in_it(folder, finished):
    workdir, config, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "metadata.json", "model.jax_export", "weights.safetensors")
    }
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]
    metadata = json.loads((folder / "metadata.json").read_text())
    results = json.loads((workdir / "results.json").read_text())
    assert metadata["step"] == results["step"]
    assert metadata["scores"] == results["test"]
    assert metadata["class_names"] == [*map(str, range(10))]
    assert metadata["images"]["shape"] == ["batch", 8, 8, 1]
    assert metadata["logits"] == {"shape": ["batch", 10], "dtype": "float32", "of": "softmax"}
    assert metadata["config"]["model.d_model"] == config.model.d_model
    assert "data.dir" not in metadata["config"]


def test_weights_alone_are_a_file_in_a_folder_that_is_made(finished, tmp_path):
    workdir, config, _ = finished
    export(config, workdir, str(tmp_path / "a" / "b" / "digits.safetensors"))
    assert read_state(tmp_path / "a" / "b" / "digits.safetensors")


@pytest.mark.parametrize("out", ["digits.pt", "digits.safetensor", "v1.0", ""])
def test_a_name_must_say_what_it_is(finished, out):
    workdir, config, _ = finished
    with pytest.raises(ConfigError, match=r"^--out must be FILE\.safetensors, .* or a folder .*as NAME/"):
        export(config, workdir, out)


def test_nothing_is_written_over(finished, tmp_path):
    workdir, config, _ = finished
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    for out in ["file", "full", "full/"]:
        with pytest.raises(ConfigError, match=r"^--out: .* exists and is no empty folder"):
            export(config, workdir, f"{tmp_path}/{out}")
    with pytest.raises(ConfigError, match=r"^--out: .*file is a file"):
        export(config, workdir, str(tmp_path / "file" / "digits"))
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "file").read_text() == "precious"


def test_what_fails_leaves_nothing(finished, tmp_path, monkeypatch):
    workdir, config, _ = finished

    def full(metadata):
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_readme", full)
    with pytest.raises(ConfigError, match=r"^--out=.*: No space left on device"):
        export(config, workdir, str(tmp_path / "digits"))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_said_with_the_flag(finished, tiny_config, tmp_path):
    workdir, config, _ = finished
    with pytest.raises(ConfigError, match=r"^--resolution must be at least 1, and --out a folder"):
        export(config, workdir, str(tmp_path / "digits.safetensors"), resolution=8)
    with pytest.raises(ConfigError, match=r"is a run of another network:\n  config\.model\.d_model: 8 there, 16 now"):
        export(tiny_config(**{"model.d_model": 16}), workdir, str(tmp_path / "digits"))
    for field, there, now in [("optimizer.name", "'adamw'", "'sgd'"), ("smoke", "False", "True")]:
        with pytest.raises(ConfigError, match=rf"\n  config\.{field}: {there} there, {now} now\n"):
            export(tiny_config(**{field: ast.literal_eval(now)}), workdir, tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []
