import json

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

import ssm_jax
from experiments.config import ConfigError
from experiments.experiment import build
from experiments.export import export
from experiments.weights import built, start_from_weights
from ssm_jax.pretrained import inflate, save_safetensors
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.steps import init_state

SMALL = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}


def network(name, **options):
    options = {key: value for key, value in (SMALL | options).items() if value is not None}
    return built(lambda: ssm_jax.create_model(name, **options, rngs=nnx.Rngs(3)))


def initial(config):
    experiment = build(config)
    with jax.set_mesh(experiment.mesh):
        return experiment.init()


def params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_a_finished_run_is_the_start_of_another(finished, tiny_config, tmp_path, assert_same_tree):
    workdir, config, _ = finished
    file = tmp_path / "weights.safetensors"
    export(config, workdir, file)
    experiment = build(tiny_config(weights=str(file), seed=5))
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
    from experiments.evaluate import find, restore

    trained, _ = restore(experiment, *find(workdir))
    assert_same_tree(state.params, trained.params)
    assert int(state.step) == 0
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, experiment.abstract_state)


def test_a_file_is_not_overwritten(finished, tmp_path):
    workdir, config, _ = finished
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"^--out: .*weights\.safetensors"):
        export(config, workdir, file)
    assert file.read_bytes() == b"precious"


def test_averaged_parameters_are_exported_where_there_are_any(finished, tmp_path):
    workdir, config, _ = finished
    with pytest.raises(ConfigError, match=r"^--ema needs a run with averaged parameters"):
        export(config, workdir, tmp_path / "weights.safetensors", ema=True)


def test_a_classifier_of_other_classes_stays(tiny_config, tmp_path, assert_same_tree, caplog):
    config = tiny_config(**{"model.name": "convnext_tiny"})
    network_of = {"name": "convnext_tiny", "in_channels": 3, "num_classes": 7}
    save_safetensors(network(num_classes=5, name="convnext_tiny"), tmp_path / "weights.safetensors")
    config.weights = str(tmp_path / "weights.safetensors")
    model = network("convnext_tiny", num_classes=7)
    before = jax.device_get(params(model))
    start_from_weights(config, model, SMALL | network_of)
    after = params(model)
    assert_same_tree(after["head"], before["head"])
    expected = params(network("convnext_tiny", num_classes=5))
    assert_same_tree({**after, "head": 0}, {**expected, "head": 0})
    assert "has other classes" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("video", "images"),
    [
        ("convnext_tiny_i3d", {"name": "convnext_tiny"}),
        ("convnext_tiny_s3d", {"name": "convnext_tiny"}),
        ("convnext_tiny_3d_s4nd", {"name": "convnext_tiny_s4nd", "stem": "patch"}),
    ],
)
def test_networks_over_video_start_from_those_over_images(tiny_config, tmp_path, assert_same_tree, video, images):
    flat = network(**images, img_size=32, num_classes=5)
    save_safetensors(flat, tmp_path / "weights.safetensors")
    config = tiny_config(**{"model.name": video, "weights": str(tmp_path / "weights.safetensors")})
    moving = network(video, img_size=(4, 32, 32), num_classes=7)
    expected = network(video, img_size=(4, 32, 32), num_classes=7)
    inflate(flat, expected)
    start_from_weights(config, moving, {**SMALL, "img_size": (4, 32, 32), "num_classes": 7, "in_channels": 3})
    assert_same_tree(params(moving), params(expected))


@pytest.mark.parametrize("named", [False, True])
def test_a_run_is_the_start_of_another(finished, tiny_config, assert_same_tree, monkeypatch, named):
    """Of its best checkpoint, or of the one that is named; optimizer state is not even read."""
    workdir, config, _ = finished
    steps = {True: 8, False: json.loads((workdir / "results.json").read_text())["step"]}
    path = workdir / "checkpoints" / "8" if named else workdir
    load, read = ocp.load, []
    monkeypatch.setattr(ocp, "load", lambda path, what, **given: read.append(what) or load(path, what, **given))
    state = initial(tiny_config(weights=str(path), seed=5))
    assert [what.keys() for what in read] == [{"params", "rest"}]
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        trained = checkpoints.restore(build(config).abstract_state, steps[named])
    assert_same_tree(state.params, trained.params)
    assert int(state.step) == 0
    assert all(not np.any(x) for x in jax.tree.leaves(state.opt_state))


@pytest.fixture
def pretrained(tmp_path):
    """The workdir of a run of ConvNeXt with 5 classes, and its parameters."""
    model = network("convnext_tiny", num_classes=5)
    state = init_state(model, optax.sgd(0.1), ema=True)
    with Checkpoints(tmp_path / "run" / "checkpoints", metric="m") as checkpoints:
        checkpoints.save(state, {"m": 0.5})
    return tmp_path / "run", jax.device_get(state.params)


def test_a_run_with_other_classes_leaves_the_classifier(tiny_config, pretrained, assert_same_tree, caplog):
    workdir, trained = pretrained
    config = tiny_config(**{"model.name": "convnext_tiny", "weights": str(workdir)})
    model = network("convnext_tiny", num_classes=7)
    before = jax.device_get(params(model))
    start_from_weights(config, model, SMALL | {"name": "convnext_tiny", "in_channels": 3, "num_classes": 7})
    after = params(model)
    assert_same_tree(after["head"], before["head"])
    assert_same_tree({**after, "head": 0}, {**trained, "head": 0})
    assert "has other classes" in caplog.text


@pytest.mark.slow
def test_a_run_over_images_is_inflated_for_video(tiny_config, pretrained, assert_same_tree):
    workdir, _ = pretrained
    config = tiny_config(**{"model.name": "convnext_tiny_i3d", "weights": str(workdir)})
    moving, expected = (network("convnext_tiny_i3d", img_size=(4, 32, 32), num_classes=7) for _ in range(2))
    inflate(network("convnext_tiny", num_classes=5), expected)
    start_from_weights(config, moving, {**SMALL, "img_size": (4, 32, 32), "num_classes": 7, "in_channels": 3})
    assert_same_tree(params(moving), params(expected))


def test_runs_that_cannot_be_the_start_are_refused_with_the_field(tiny_config, pretrained, tmp_path):
    workdir, _ = pretrained
    messages = {
        tmp_path: "must be a file, a run's workdir, or one of its checkpoints, WORKDIR/checkpoints/STEP, got",
        workdir / "checkpoints" / "7": r".* has no checkpoint of step 7; it has \[0\]",
        workdir: r".*weights do not fit Isotropic: blocks\.0\..* is missing",
    }
    model = network("isotropic_s4nd", depths=None, dims=None, d_model=8, n_layers=1, in_channels=1, num_classes=10)
    for path, message in messages.items():
        with pytest.raises(ConfigError, match=f"^config.weights[ =]{message}"):
            start_from_weights(tiny_config(weights=str(path)), model, {})
    data = max((workdir / "checkpoints").rglob("d/*"), key=lambda file: file.stat().st_size)
    data.unlink()
    with pytest.raises(ConfigError, match=r"^config.weights=.* is damaged: "):
        start_from_weights(tiny_config(weights=str(workdir)), model, {})


def test_what_does_not_fit_is_said_with_the_field(tiny_config, tmp_path):
    experiment = build(tiny_config(weights=str(tmp_path / "nowhere.safetensors")))
    with pytest.raises(ConfigError, match=r"^config.weights must be a file, a run.*, got .*nowhere\.safetensors"):
        experiment.init()
    save_safetensors(network("convnext_tiny", num_classes=5), tmp_path / "weights.safetensors")
    experiment = build(tiny_config(weights=str(tmp_path / "weights.safetensors")))
    with pytest.raises(ConfigError, match=r"^config.weights=.*weights\.safetensors: weights do not fit"):
        experiment.init()


@pytest.fixture(scope="session")
def assert_same_tree():
    """Compares two trees of arrays, exactly."""

    def compare(first, second):
        assert jax.tree.structure(first) == jax.tree.structure(second)
        jax.tree.map(np.testing.assert_array_equal, first, second)

    return compare
