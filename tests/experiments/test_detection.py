"""Runs of detectors, cut as with --config.smoke=True, on the stand-in of COCO."""

import json

import jax
import numpy as np
import pytest
import standin
from flax import nnx
from ml_collections import ConfigDict
from processes import Command, run_as_two

from configs.common import coco
from configs.s4nd import digits
from configs.s6la import coco_mask_rcnn_resnet50_s6la as recipe
from configs.s6la import imagenet_resnet50_s6la
from experiments.config import ConfigError
from experiments.evaluate import evaluate as evaluate_checkpoint
from experiments.experiment import build
from experiments.export import export
from experiments.train import train
from experiments.weights import start_detector_from_weights
from ssm_jax.data.datasets import load_dataset
from ssm_jax.detection.evaluation import evaluate, read_results
from ssm_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow  # detectors are compiled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return standin.make("coco", tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def small(folder):
    """A cut Mask R-CNN; dotted fields as arguments change the config."""

    def config(**fields) -> ConfigDict:
        config = recipe.get_config()
        config.smoke = True
        config.data.dir = str(folder)
        with config.ignore_type():
            config.update_from_flattened_dict(fields)
        return config

    return config


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run's workdir, and the scores that `train` returned."""
    workdir = tmp_path_factory.mktemp("runs") / "mask_rcnn"
    return workdir, train(small(), workdir)


def test_a_run_leaves_what_was_found(finished, folder):
    """The twelve numbers of boxes and masks, and results that pycocotools scores the same."""
    workdir, scores = finished
    results = read_results(workdir / "detections_test.json")
    assert {result["image_id"] for result in results} == {0, 1, 2, 3}
    assert all(0 < result["score"] < 1 for result in results)
    (of_run,) = scores.values()
    again = evaluate(folder / "annotations/instances_val2017.json", results)
    assert of_run == {name: score for name, score in again.scores.items() if score >= 0}
    assert {name.partition("_")[0] for name in of_run} == {"bbox", "segm"}
    categories = json.loads((workdir / "categories_test.json").read_text())
    assert [row["objects"] for row in categories] == [1] * 8 + [0] * 72
    assert json.loads((workdir / "results.json").read_text())["test"] == {"96": of_run}
    assert {path.stem for path in (workdir / "pictures").iterdir()} >= {"training_curves", "detections"}
    page = (workdir / "report.html").read_text()
    assert "96 x 128" in page
    assert "bbox_AP" in page


def test_a_run_that_is_finished_is_not_gone_on_with(finished, small):
    workdir, scores = finished
    assert train(small(), workdir) == scores


def test_detections_are_in_pixels_of_the_files(small, finished):
    """An image of 120 x 160 is 96 x 128 for the network, which clips boxes to it."""
    corners = np.array([result["bbox"] for result in read_results(finished[0] / "detections_test.json")])
    ends = (corners[:, :2] + corners[:, 2:]).max(0)
    assert np.all(corners > -1e-3)
    assert 128 < ends[0] <= 160.01
    assert 96 < ends[1] <= 120.01


def test_frozen_parameters_stay_and_the_others_do_not(small):
    experiment = build(small())
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        before = jax.device_get(state.params)
        step, batch = experiment.train_step(experiment.stages[0]), next(experiment.train_batches())
        state, metrics = step(state, experiment.put(batch))
    assert np.isfinite(metrics["loss"])
    assert metrics["loss"] == pytest.approx(sum(float(x) for name, x in metrics.items() if name.startswith("loss_")))
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="."): bool((old != new).any())
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(jax.device_get(state.params)), strict=True
        )
    }
    frozen = {name for name in changed if name.startswith(experiment.config.optimizer.frozen)}
    assert len(frozen) > 10
    assert not any(changed[name] for name in frozen)
    momenta = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    sizes = {name: x.size for name, x in zip(changed, jax.tree.leaves(before), strict=True)}
    kept = sum(size for name, size in sizes.items() if name not in frozen)
    assert kept <= momenta < kept + 10  # and counters
    # Not what is behind a map that starts at 0, as S6LA's and the last norm of each block.
    assert np.mean([changed[name] for name in changed if name not in frozen]) > 0.8


def arrays_of(workdir):
    """Parameters and statistics of a run's best checkpoint, by name."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        parts = checkpoints.read_network(None).values()
    leaves = [leaf for part in parts for leaf in jax.tree_util.tree_leaves_with_path(part)]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(array) for path, array in leaves}


def arrays_in(model):
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def started_from(weights, small):
    """The arrays of a cut detector with these weights."""
    detector = build(small()).problem.create_model()
    start_detector_from_weights(ConfigDict({"weights": str(weights)}), detector)
    return arrays_in(detector)


def test_a_detector_starts_from_another(small, finished, tmp_path):
    workdir, expected = finished[0], arrays_of(finished[0])
    found = started_from(workdir, small)
    assert found.keys() <= expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_the_backbone_of_a_detector_starts_from_a_classifier(small, tmp_path):
    """A run, or the file that is exported of it."""
    config = imagenet_resnet50_s6la.get_config()
    config.smoke = True
    (tmp_path / "images").mkdir()
    config.data.update(name="image_folder", dir=str(standin.make("image_folder", tmp_path / "images")))
    train(config, tmp_path / "run")
    export(config, tmp_path / "run", tmp_path / "weights.safetensors")
    expected, own = arrays_of(tmp_path / "run"), arrays_in(build(small()).problem.create_model())
    for weights in ("run", "weights.safetensors"):
        found = started_from(tmp_path / weights, small)
        for name, array in found.items():
            given = expected.get(name.removeprefix("backbone.network."))
            np.testing.assert_array_equal(array, own[name] if given is None else given, err_msg=name)
        assert sum(name.removeprefix("backbone.network.") in expected for name in found) > 50


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.name": "digits"}, r"^config\.data\.name must be coco for a detector, got 'digits'"),
        ({"data.sides": (800,)}, r"^config\.data\.sides must be the shorter side .* got \(800,\)"),
        ({"data.sides": (800, 600)}, r"^config\.data\.sides must be"),
        ({"augment.mixup": 0.8}, r"^config\.augment\.mixup is of no use to a detector: leave it at 0\.0, got 0\.8"),
        ({"eval.resolutions": (64,)}, r"^config\.eval\.resolutions is of no use to a detector"),
        ({"data.max_objects": 1}, r"^config\.data\.max_objects must be at least 2, .* got 1"),
        ({"optimizer.frozen": ("backbone.conv",)}, r"^config\.optimizer\.frozen must name .*; got backbone\.conv\."),
        ({"model.backbone.name": "resnet5"}, r"^config\.model.*resnet5"),
        ({"model.backbone.name": "deit_tiny"}, r"^config\.model.*deit_tiny"),
        ({"model.name": "mask_cnn"}, r"^config\.model.*mask_rcnn"),
        ({"data.bad_annotations": "ignore"}, r"^config\.data\.bad_annotations must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_detector_cannot_do_is_said_before_it_starts(small, fields, message):
    with pytest.raises(ConfigError, match=message):
        build(small(**fields))


def test_an_image_that_cannot_be_read_is_neither_scored_nor_drawn(small, finished, tmp_path):
    folder = standin.make("coco", tmp_path)
    experiment = build(small(**{"data.dir": str(folder), "data.max_broken": 0.5}))
    source = experiment.dataset.splits["test"]
    first = source[0]["image_id"]
    (folder / "val2017" / f"{first}.jpg").write_bytes(b"no image")
    with Checkpoints(finished[0] / "checkpoints") as checkpoints:
        state = checkpoints.restore_best(experiment.abstract_state)
    evaluation = experiment.evaluate(state, "test", experiment.resolution)
    assert set(evaluation.rows["image_ids"]) == {0, 1, 2, 3} - {first}
    left = experiment.problem.leave("test", {experiment.resolution: evaluation}, experiment.resolution, tmp_path)
    read = sum(source[i]["image_id"] != first for i in range(len(source)))
    assert left["detections"].get_suptitle() == f"{read} test images"


def test_images_of_validation_without_an_object_are_refused(small, tmp_path):
    """What nothing can be found in cannot be scored, nor tell which checkpoint is the best."""
    folder = standin.make("coco", tmp_path)
    (path,) = folder.rglob("instances_val2017.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    with pytest.raises(ConfigError, match=r"^config\.data\.dir has no image with an object, .*instances_val2017\.json"):
        build(small(**{"data.dir": str(folder)}))


def test_of_a_detector_only_weights_are_exported(small, finished, tmp_path):
    with pytest.raises(ConfigError, match=r"^--out must be FILE\.safetensors for a detector.*/folder\.$"):
        export(small(), finished[0], tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_detector_is_evaluated_at_its_size(small, finished):
    with pytest.raises(ConfigError, match=r"evaluated at the size of config\.data\.sides, got 64"):
        evaluate_checkpoint(small(), finished[0], 64)


def test_networks_that_tell_classes_need_nothing_of_detectors():
    assert "backbone" not in digits.get_config().model
    assert set(coco.retinanet("resnet50").model) == {"name", "backbone"}


@pytest.mark.timeout(600)
def test_processes_find_what_one_finds(small, finished, folder, tmp_path):
    """Two processes of four devices each, and one with eight."""
    command = Command(config="configs/s6la/coco_mask_rcnn_resnet50_s6la.py", tiny=False)
    fields = ["--config.smoke=True", f"--config.data.dir={folder}"]
    for status, _, errors in run_as_two(command, f"--workdir={tmp_path / 'run'}", *fields):
        assert status == 0, errors
    alone, together = (read_results(path / "detections_test.json") for path in (finished[0], tmp_path / "run"))
    assert [result["image_id"] for result in together] == [result["image_id"] for result in alone]
    scores = [np.array([result["score"] for result in some]) for some in (alone, together)]
    np.testing.assert_allclose(*scores, rtol=1e-3)


def test_checkpoints_are_compared_by_box_ap(finished):
    workdir, scores = finished
    with Checkpoints(workdir / "checkpoints", metric="val/bbox_AP") as checkpoints:
        assert checkpoints.last is not None
    assert load_dataset("coco", files=False).num_classes == 80
    assert "bbox_AP" in next(iter(scores.values()))
