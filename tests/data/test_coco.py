import copy
import gc
import json
import logging
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
    np.testing.assert_array_equal(two["size"], [10, 20])
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
        types = [example[name].dtype for name in ("size", "boxes", "classes", "crowd", "area", "label")]
        assert types == [np.int32, np.float32, np.int32, np.bool_, np.float32, np.uint8]


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


def test_classes_know_the_ids_of_their_categories(folder):
    assert load_dataset("coco", str(folder)).splits["val"].category_ids == (1, 13, 90)


def test_detectors_are_trained_on_the_images_with_objects_besides_crowds(folder):
    images = load_dataset("coco", str(folder)).splits["train"]
    assert images.objects.counts().tolist() == [0, 0, 2]
    (example,) = (some := images.with_objects())
    assert some.most_objects == images.most_objects == 2
    assert some.sizes.tolist() == [[10, 20]]
    assert some.name(0) == images.name(2)
    assert example.keys() == images[2].keys()
    for name in ("boxes", "classes", "label"):
        np.testing.assert_array_equal(example[name], images[2][name])
    with pytest.raises(ValueError, match=r"^dir has no image with an object, crowds aside, in .*_train2017\.json\.$"):
        images.part(np.array([True, True, False])).with_objects()


def test_scores_are_of_the_files_annotations(folder):
    images = load_dataset("coco", str(folder)).splits["train"]
    assert images.annotations == CONTENT
    some = images.with_objects().annotations
    assert [image["id"] for image in some["images"]] == [300]
    assert [annotation["id"] for annotation in some["annotations"]] == [1, 3]
    assert some["categories"] == CONTENT["categories"]


ANNOTATION = CONTENT["annotations"][0]
NAN, INF = float("nan"), float("inf")
BAD = {
    "of unknown images": [{"image_id": 9}, {"image_id": 301}],
    "of unknown categories": [{"category_id": 2}, {"category_id": 91}],
    "with an id that another has": [{"id": 2}],
    "with a box that is not finite": [{"bbox": [1, NAN, 2, 2]}, {"bbox": [1, 1, INF, 2]}, {"bbox": [1, 1, 2, 1e99]}],
    "with an empty box": [{"bbox": [1, 2, 3, 0]}, {"bbox": [1, 2, 0, 3]}, {"bbox": [1, 2, -1, 3]}],
    "with a box outside of the image": [{"bbox": [20, 2, 3, 4]}, {"bbox": [1, -4, 3, 4]}, {"bbox": [1, 10.5, 3, 4]}],
    "without a mask": [
        {"segmentation": []},
        {"segmentation": None, "iscrowd": 1},
        {"segmentation": {**RUNS, "counts": [200]}},
    ],
    "with an odd number of coordinates": [{"segmentation": [TRIANGLE, SQUARE[:7]]}],
    "with a polygon of less than three points": [{"segmentation": [SQUARE[:4]]}, {"segmentation": [SQUARE, []]}],
    "with a polygon that is not finite": [{"segmentation": [[*TRIANGLE[:5], NAN]]}],
    "with a run-length mask that is compressed, or of another size than the image": [
        {"segmentation": {**RUNS, "size": [20, 10]}},
        {"segmentation": {**RUNS, "counts": [30, 5, 164]}},
        {"segmentation": {**RUNS, "counts": [210, -10]}},
        {"segmentation": {**RUNS, "counts": "n05U5"}, "iscrowd": 1},
    ],
}  # fmt: skip
"""What is bad by kind, as changes of the first annotation."""


@pytest.fixture
def warnings(caplog):
    """What was reported, line by line."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def assert_same_examples(images, others):
    for one, other in zip(images, others, strict=True):
        assert one["image_id"] == other["image_id"]
        for name in ("boxes", "classes", "crowd", "area", "label"):
            np.testing.assert_array_equal(one[name], other[name])
        for ours, theirs in zip(one["segmentation"], other["segmentation"], strict=True):
            np.testing.assert_equal(ours, theirs)


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind in BAD for change in BAD[kind]])
def test_bad_annotations_are_left_out_or_refused(folder, kind, change, warnings):
    whole = load_dataset("coco", str(folder)).splits
    bad = {**ANNOTATION, "id": 4, **change}
    write(folder, "train", {**CONTENT, "annotations": [bad, *CONTENT["annotations"]]})
    if kind == "with an id that another has":  # the first is the one that stays
        write(folder, "train", {**CONTENT, "annotations": [*CONTENT["annotations"], bad]})
    images = load_dataset("coco", str(folder)).splits["train"]
    assert_same_examples(images, whole["train"])
    assert images.annotations == CONTENT
    found = f"1 {kind} ({bad['id']} of image {bad['image_id']})"
    path = f"{folder}/annotations/instances_train2017.json"
    assert warnings() == [f"{path} has bad annotations, which are left out: {found}."]
    with pytest.raises(ValueError, match=r"^dir has a ") as error:
        load_dataset("coco", str(folder), bad_annotations="refuse")
    assert f"dir has a {path} with bad annotations: {found}. config.data.bad_annotations='skip' l" in str(error.value)


def test_bad_annotations_are_counted_by_kind_and_the_first_are_named(folder):
    changes = [change for kind in BAD for change in BAD[kind]]
    bad = [{**ANNOTATION, "id": 10 + i, **change} for i, change in enumerate(changes)]
    write(folder, "val", {**CONTENT, "annotations": [*CONTENT["annotations"], *bad]})
    (folder / "val2017" / "000000000070.jpg").unlink()
    with pytest.raises(ValueError, match=r"^dir has a .*instances_val2017\.json with bad annotations: 2 of") as error:
        load_dataset("coco", str(folder), bad_annotations="refuse")
    for kind, found in BAD.items():
        assert f" {len(found)} {kind} (" in str(error.value)
    assert "3 with an empty box (18 of image 300, 19 of image 300, 20 of image 300);" in str(error.value)
    assert "(31 of image 300, 32 of image 300, 33 of image 300, ...); 1 of 3 images not in" in str(error.value)


def test_oddities_of_good_annotations_are_let_through(folder, warnings):
    """Boxes that are partly outside, crowds as polygons or of no pixel, other objects as run-length masks."""
    empty = {**RUNS, "counts": [200]}
    changes = [{"bbox": [-1, 9, 30, 30]}, {"iscrowd": 1}, {"iscrowd": 1, "segmentation": empty}, {"segmentation": RUNS}]
    odd = [{**ANNOTATION, "id": 4 + i, **change} for i, change in enumerate(changes)]
    write(folder, "train", {**CONTENT, "annotations": odd})
    example = load_dataset("coco", str(folder), bad_annotations="refuse").splits["train"][2]
    np.testing.assert_array_equal(example["boxes"][0], [-1, 9, 29, 39])
    assert example["crowd"].tolist() == [False, True, True, False]
    np.testing.assert_array_equal(example["segmentation"][2]["counts"], [200])
    np.testing.assert_array_equal(example["segmentation"][3]["counts"], RUNS["counts"])
    assert warnings() == []


def test_images_without_a_file_are_left_out_with_their_objects_or_refused(folder, warnings):
    for name in ("000000000008.jpg", "000000000070.jpg"):
        (folder / "val2017" / name).unlink()
    found = f"2 of 3 images not in {folder}/val2017 (000000000008.jpg, 000000000070.jpg)"
    path = f"{folder}/annotations/instances_val2017.json"
    splits = load_dataset("coco", str(folder), max_broken=0.7).splits
    assert_same_examples(splits["val"], [splits["train"][2]])
    assert [image["id"] for image in splits["val"].annotations["images"]] == [300]
    assert warnings() == [f"{path} has bad annotations, which are left out: {found}."]
    with pytest.raises(ValueError, match=r"^dir has a ") as error:
        load_dataset("coco", str(folder), bad_annotations="refuse")
    assert f"dir has a {path} with bad annotations: {found}. config.data.bad_annotations='skip' l" in str(error.value)


def test_a_folder_that_lacks_more_images_than_may_be_broken_is_refused(folder, warnings):
    (folder / "val2017" / "000000000008.jpg").unlink()
    message = r"^max_broken must be at least 1 / 3 to do without the 1 of 3 images .*000000000008\.jpg; got 0\.01\.$"
    with pytest.raises(ValueError, match=message):
        load_dataset("coco", str(folder))
    assert warnings() == []


def test_a_folder_without_any_of_the_images_is_always_refused(folder):
    shutil.rmtree(folder / "val2017")
    (folder / "val2017").mkdir()
    with pytest.raises(
        ValueError, match=r"^dir lacks all 3 images of instances_val2017\.json, .* 000000000008\.jpg: .*/val2017\.$"
    ):
        load_dataset("coco", str(folder))


def test_what_is_done_about_bad_annotations_is_one_of_two(folder):
    with pytest.raises(ValueError, match=r"^bad_annotations must be refuse or skip, got 'ignore'\.$"):
        load_dataset("coco", str(folder), bad_annotations="ignore")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["annotations"][1].pop("bbox"), "KeyError"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2]), "ValueError"),
        (lambda c: c["annotations"][1].update(id=2**70), "OverflowError"),
        (lambda c: c["annotations"][0].update(segmentation=[1.5, 2, 3, 4]), "TypeError"),
        (lambda c: c["annotations"].append(None), "TypeError"),
        (lambda c: c.pop("images"), "KeyError"),
        (lambda c: c["images"][0].pop("height"), "KeyError"),
        (lambda c: c["images"][0].update(width=0), "images need an id of their own, a height and a width"),
        (lambda c: c["images"][0].update(id=8), "images need an id of their own"),
        (lambda c: c["images"].clear(), "images need"),
    ],
)
@pytest.mark.parametrize("bad_annotations", ["skip", "refuse"])
def test_files_of_another_kind_are_always_refused(folder, damage, message, bad_annotations):
    content = copy.deepcopy(CONTENT)
    damage(content)
    write(folder, "train", content)
    with pytest.raises(ValueError, match=rf"^dir has a .*instances_train2017\.json that is cut off or no .*{message}"):
        load_dataset("coco", str(folder), bad_annotations=bad_annotations)


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
    dataset = load_dataset("coco", str(folder), bad_annotations="refuse")
    assert {name: len(source) for name, source in dataset.splits.items()} == {"train": 44, "val": 51, "test": 51}
    assert (dataset.num_classes, dataset.class_names[0], dataset.class_names[79]) == (80, "person", "toothbrush")
    content = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    objects = 0
    for example in dataset.splits["val"]:
        image = images[example["image_id"]]
        assert decode_image(example["image"]).size == (image["width"], image["height"])
        assert example["size"].tolist() == [image["height"], image["width"]]
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
