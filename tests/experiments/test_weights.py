import jax
import numpy as np
import pytest
from flax import nnx

import ssm_jax
from experiments.config import ConfigError
from experiments.experiment import build
from experiments.export import export
from experiments.weights import built, start_from_file
from ssm_jax.pretrained import inflate, save_safetensors

SMALL = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}


def network(name, **options):
    return built(lambda: ssm_jax.create_model(name, **SMALL | options, rngs=nnx.Rngs(3)))


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
    start_from_file(config, model, SMALL | network_of)
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
    start_from_file(config, moving, {**SMALL, "img_size": (4, 32, 32), "num_classes": 7, "in_channels": 3})
    assert_same_tree(params(moving), params(expected))


def test_what_does_not_fit_is_said_with_the_field(tiny_config, tmp_path):
    experiment = build(tiny_config(weights=str(tmp_path / "nowhere.safetensors")))
    with pytest.raises(ConfigError, match=r"^config.weights must be a file, got .*nowhere\.safetensors"):
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
