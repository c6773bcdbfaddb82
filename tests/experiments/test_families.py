"""Some steps of each family's config, on images of two classes."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs.backbones import image_folder
from experiments.experiment import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight images of each of two classes to train on, and four to test."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in [("train", 8), ("val", 4)]:
        for label, name in enumerate(["dark", "light"]):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(100 * label, 100 * label + 150, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow) for name in image_folder.FAMILIES])
def test_every_family_trains(folder, family):
    config = image_folder.get_config(family)
    config.update(batch_size=16, epochs=4.0)
    config.data.dir = str(folder)
    config.eval.batch_size = 8
    if "depths" in config.model:  # a block of each stage: compiling takes almost all of the time
        config.model.depths = (1, 1, 1, 1)
    if "mixer" in config.model:
        config.model.mixer.d_state = 4
    experiment = build(config)
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        before = jax.device_get(state.params)
        losses, batches, step = [], experiment.train_batches(), experiment.train_step(experiment.stages[0])
        for _ in range(3):
            state, metrics = step(state, experiment.put(next(batches)))
            losses.append(float(metrics["loss"]))
        if family == "resnet":  # with running statistics
            scores, rows = experiment.evaluate(state, "test", experiment.resolution)
            assert rows["logits"].shape == (8, 2)
            assert np.isfinite(scores["loss"])
    assert np.isfinite(losses).all()
    assert losses[0] < 2.0  # of two classes, by a network that has not learned anything
    changed = jax.tree.map(lambda old, new: np.any(old != new), before, jax.device_get(state.params))
    # All but what is behind a layer scale of 1e-6, where Adam's epsilon is not small.
    assert np.mean(jax.tree.leaves(changed)) > (0.9 if family == "convnext_s4nd" else 0.999)
