import copy
import gc
import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from ssm_jax.data.datasets import Source, load_dataset
from ssm_jax.data.decode import decode_image

TRIANGLE, SQUARE = [1.5, 2, 9.25, 2, 4, 7.75], [0, 0, 3, 0, 3, 3, 0, 3]
RUNS = {"counts": [30, 5, 165], "size": [10, 20]}
CONTENT = {
    "images": [{"id": i, "file_name": f"{i:012}.jpg", "width": 20, "height": 10} for i in (70, 8, 300)],
    "categories": [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "sign"}],
    "annotations": [
        {"id": 1, "image_id": 300, "category_id": 13, "bbox": [1, 2, 3.5, 4], "area": 9, "iscrowd": 0,
         "segmentation": [TRIANGLE]},
        {"id": 2, "image_id": 70, "category_id": 90, "bbox": [0, 0, 20, 10], "area": 5, "iscrowd": 1,
         "segmentation": RUNS},
        {"id": 3, "image_id": 300, "category_id": 1, "bbox": [5, 5, 1, 1], "area": 0.5, "iscrowd": 0,
         "segmentation": [SQUARE, TRIANGLE]},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, CONTENT)
        (tmp_path / f"{split}2017").mkdir()
        for image in CONTENT["images"]:
            Image.new("RGB", (20, 10)).save(tmp_path / f"{split}2017" / image["file_name"])
    return tmp_path


def write(folder, split, content):
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def test_examples_have_the_objects_of_their_image_in_the_order_of_the_file(folder):
    dataset = load_dataset("coco", str(folder))
    assert dataset.class_names == ("person", "sign", "brush")
    assert (dataset.multi_label, dataset.resolution) == (True, 224)
    nothing, crowd, two = (dataset.splits["train"][i] for i in range(3))
    assert [example["image_id"] for example in (nothing, crowd, two)] == [8, 70, 300]
    assert two["image"] == (folder / "train2017" / "000000000300.jpg").read_bytes()
    np.testing.assert_array_equal(two["boxes"], np.array([[1, 2, 4.5, 6], [5, 5, 6, 6]], np.float32))
    np.testing.assert_array_equal(two["classes"], [1, 0])
    np.testing.assert_array_equal(two["crowd"], [False, False])
    np.testing.assert_array_equal(two["area"], [9, 0.5])
    np.testing.assert_array_equal(two["label"], [1, 1, 0])
    assert [[polygon.tolist() for polygon in one] for one in two["segmentation"]] == [[TRIANGLE], [SQUARE, TRIANGLE]]


def test_crowds_have_run_length_masks_and_count_for_the_label(folder):
    crowd = load_dataset("coco", str(folder)).splits["val"][1]
    np.testing.assert_array_equal(crowd["crowd"], [True])
    np.testing.assert_array_equal(crowd["label"], [0, 0, 1])
    (mask,) = crowd["segmentation"]
    assert {"counts": mask["counts"].tolist(), "size": mask["size"]} == RUNS


def test_images_without_objects_stay(folder):
    nothing = load_dataset("coco", str(folder)).splits["train"][0]
    shapes = {name: nothing[name].shape for name in ("boxes", "classes", "crowd", "area")}
    assert shapes == {"boxes": (0, 4), "classes": (0,), "crowd": (0,), "area": (0,)}
    assert nothing["segmentation"] == []
    np.testing.assert_array_equal(nothing["label"], [0, 0, 0])


def test_types_do_not_depend_on_what_is_there(folder):
    for i in range(3):
        example = load_dataset("coco", str(folder)).splits["train"][i]
        types = [example[name].dtype for name in ("boxes", "classes", "crowd", "area", "label")]
        assert types == [np.float32, np.int32, np.bool_, np.float32, np.uint8]


def test_sources_are_what_the_pipeline_wants(folder):
    splits = load_dataset("coco", str(folder)).splits
    assert splits["val"] is splits["test"]
    assert isinstance(splits["train"], Source)
    assert splits["train"].name(1) == f"{folder}/train2017/000000000070.jpg"
    again = pickle.loads(pickle.dumps(splits["train"]))
    np.testing.assert_array_equal(again[2]["boxes"], splits["train"][2]["boxes"])
    with pytest.raises(IndexError):
        again[3]


def test_garbage_is_collected_afterwards(folder):
    load_dataset("coco", str(folder))
    assert gc.isenabled()


def test_what_is_missing_is_named_with_where_to_get_it(folder):
    (folder / "annotations" / "instances_val2017.json").unlink()
    shutil.rmtree(folder / "train2017")
    with pytest.raises(ValueError, match=r"^dir must hold annotations/instances_train2017\.json") as error:
        load_dataset("coco", str(folder))
    assert f"got {folder}: no {folder}/train2017 and no {folder}/annotations/instances_val2017.json." in str(
        error.value
    )
    assert "annotations_trainval2017.zip" in str(error.value)


def test_missing_images_are_counted_and_the_first_is_named(folder):
    for name in ("000000000070.jpg", "000000000300.jpg"):
        (folder / "val2017" / name).unlink()
    with pytest.raises(
        ValueError,
        match=r"^dir lacks 2 of the 3 images of instances_val2017\.json, .* 000000000070\.jpg: .*/val2017\.$",
    ):
        load_dataset("coco", str(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["annotations"][0].update(image_id=9), "image_id 9 of an annotation is unknown"),
        (lambda c: c["annotations"][2].update(category_id=2), "category_id 2 of an annotation is unknown"),
        (lambda c: c["annotations"][1].pop("bbox"), "KeyError"),
        (lambda c: c.pop("images"), "KeyError"),
    ],
)
def test_files_of_another_kind_are_refused(folder, damage, message):
    content = copy.deepcopy(CONTENT)
    damage(content)
    write(folder, "train", content)
    with pytest.raises(ValueError, match=rf"^dir has a .*instances_train2017\.json that is .*{message}"):
        load_dataset("coco", str(folder))


def test_a_file_that_is_cut_off_is_refused(folder):
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:-100])
    with pytest.raises(ValueError, match=r"^dir has a .*instances_train2017\.json that is cut off or no file of COCO"):
        load_dataset("coco", str(folder))


def test_both_splits_have_the_same_categories(folder):
    write(folder, "val", {**CONTENT, "categories": [*CONTENT["categories"], {"id": 91, "name": "hat"}]})
    with pytest.raises(ValueError, match=r"^dir has other categories in instances_val2017\.json than in"):
        load_dataset("coco", str(folder))


def test_real_images_have_the_objects_of_the_file(shared):
    folder = shared / "data" / "coco_mini"
    dataset = load_dataset("coco", str(folder))
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 44, "val": 51, "test": 51}
    assert (dataset.num_classes, dataset.class_names[0], dataset.class_names[79]) == (80, "person", "toothbrush")
    content = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    objects = 0
    for example in dataset.splits["val"]:
        image = images[example["image_id"]]
        assert decode_image(example["image"]).size == (image["width"], image["height"])
        found = [a for a in content["annotations"] if a["image_id"] == example["image_id"]]
        objects += len(found)
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in found)]).reshape(-1, 4)
        np.testing.assert_allclose(example["boxes"], boxes, rtol=1e-6)
        assert [dataset.class_names[i] for i in example["classes"]] == [names[a["category_id"]] for a in found]
        assert example["crowd"].tolist() == [bool(a["iscrowd"]) for a in found]
        present = {dataset.class_names[i] for i in np.flatnonzero(example["label"])}
        assert present == {names[a["category_id"]] for a in found}
        for ours, annotation in zip(example["segmentation"], found, strict=True):
            if annotation["iscrowd"]:
                assert ours["counts"].tolist() == annotation["segmentation"]["counts"]
            else:
                for polygon, expected in zip(ours, annotation["segmentation"], strict=True):
                    np.testing.assert_allclose(polygon, expected, rtol=1e-6)
    assert objects == 460
