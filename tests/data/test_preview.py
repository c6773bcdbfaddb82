import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.s4nd import digits
from configs.s6la import coco_mask_rcnn_resnet50
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


def object_at(number, image, category, left, top, right, bottom):
    corners = [left, top, right, top, right, bottom, left, bottom]
    box = [left, top, right - left, bottom - top]
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3],
            "iscrowd": 0, "segmentation": [corners]}  # fmt: skip


@pytest.fixture
def coco_dir(tmp_path):
    """Two landscapes of 20 x 10 with an object each, and one without any."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 20, "height": 10} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "person"}, {"id": 13, "name": "sign"}],
        "annotations": [object_at(1, 1, 1, 2, 1, 10, 9), object_at(2, 3, 13, 12, 0, 20, 6)],
    }
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (tmp_path / f"{split}2017").mkdir()
        for image in content["images"]:
            Image.new("RGB", (20, 10)).save(tmp_path / f"{split}2017" / image["file_name"])
    return tmp_path


def detector_config(folder, **data):
    config = coco_mask_rcnn_resnet50.get_config()
    config.data.update(dir=str(folder), sides=(40, 100), **data)
    config.augment.flip = False
    return config


def test_of_a_detector_objects_are_drawn_over_images_without_their_padding(coco_dir):
    """At four times the size. An epoch has the two images with objects, in a batch of two each of them once."""
    axes = shown(preview(detector_config(coco_dir), 2))
    found = {one.texts[0].get_text(): one for one in axes}
    assert {name: [patch.get_bbox().extents.tolist() for patch in one.patches] for name, one in found.items()} == {
        "person": [[8, 4, 40, 36]],
        "sign": [[48, 0, 80, 24]],
    }
    for name, (left, top, right, bottom) in {"person": (8, 4, 40, 36), "sign": (48, 0, 80, 24)}.items():
        inside = np.zeros((40, 80), bool)
        inside[top:bottom, left:right] = True
        pixels = np.asarray(found[name].images[0].get_array())
        np.testing.assert_array_equal(pixels.max(-1) > 0.05, inside)  # the image is black


def test_a_detector_wants_coco_and_room_for_its_objects(coco_dir):
    with pytest.raises(ValueError, match="max_objects must be at least"):
        preview(detector_config(coco_dir, max_objects=0), 2)
    config = detector_config(coco_dir)
    config.data.update(name="digits", dir="")
    with pytest.raises(ValueError, match="name must be coco for a detector, got 'digits'"):
        preview(config, 2)
