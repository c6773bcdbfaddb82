import copy
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ssm_jax.detection.evaluation import (
    category_table,
    coco_results,
    decode_mask,
    encode_mask,
    evaluate,
    paste_masks,
    read_results,
    score_table,
    write_results,
)
from ssm_jax.detection.structures import Detections

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE = (48, 64)


def box_mask(x, y, w, h, size=SIZE):
    mask = np.zeros(size, bool)
    mask[y : y + h, x : x + w] = True
    return mask


def annotation(number, image, category, box, crowd=0):
    x, y, w, h = box
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    counts = [len(list(run)) for run in _runs(box_mask(*box).T.ravel())]
    segmentation = {"size": [*SIZE], "counts": counts} if crowd else outline
    return {"id": number, "image_id": image, "category_id": category, "bbox": [*box], "area": w * h, "iscrowd": crowd,
            "segmentation": segmentation}  # fmt: skip


def _runs(values):
    """Runs of equal values, beginning with one of False that may be empty."""
    runs = [[]]
    for value in values:
        if value != (len(runs) + 1) % 2:
            runs.append([])
        runs[-1].append(value)
    return runs


def instances(*annotations, images=(7, 8)):
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in images],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}],
        "annotations": [*annotations],
    }


def result(image, category, box, score):
    mask = encode_mask(box_mask(*box))
    return {"image_id": image, "category_id": category, "bbox": [*map(float, box)], "score": score,
            "segmentation": mask}  # fmt: skip


def detections(boxes, scores, classes, valid=None, masks=None):
    valid = np.ones(np.shape(scores), bool) if valid is None else np.array(valid)
    return Detections(np.array(boxes, np.float32), np.array(scores, np.float32), np.array(classes), valid, masks)


def printed(table):
    file = io.StringIO()
    Console(file=file, width=120).print(table)
    return file.getvalue()


@pytest.fixture
def coco_mini(shared):
    return shared / "data" / "coco_mini"


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_numbers_are_those_of_the_golden_results(coco_mini, kind):
    expected = json.loads((coco_mini / "golden" / "expected_metrics.json").read_text())[kind]
    results = read_results(coco_mini / "golden" / f"fake_{kind}_results_val2017.json")
    found = evaluate(coco_mini / "annotations" / "instances_val2017.json", results, kinds=(kind,))
    names = {"AR1": "AR_1", "AR10": "AR_10", "AR100": "AR_100"}
    names |= {f"{of}{size[0]}": f"{of}_{size}" for of in ("AP", "AR") for size in ("small", "medium", "large")}
    assert found.scores == {f"{kind}_{names.get(name, name)}": value for name, value in expected["stats"].items()}
    assert {str(row["id"]): row[f"{kind}_AP"] for row in found.categories} == expected["per_category_AP"]
    assert sum(row["objects"] for row in found.categories) == 460 - 7  # crowds


def test_perfect_boxes_have_the_golden_numbers(coco_mini):
    expected = json.loads((coco_mini / "golden" / "expected_metrics.json").read_text())["perfect_bbox_stats"]
    path = coco_mini / "annotations" / "instances_val2017.json"
    truth = json.loads(path.read_text())["annotations"]
    results = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 1.0}
        for one in truth
        if not one["iscrowd"]
    ]
    expected = [*expected.values()] if isinstance(expected, dict) else expected
    assert [*evaluate(path, results, kinds=("bbox",)).scores.values()] == expected


CAR, ELSEWHERE, CROWD = (2, 2, 10, 10), (40, 30, 8, 8), (20, 20, 40, 24)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        # The best detection, ELSEWHERE, is wrong, the second right: precision 1/2 at recall 1.
        ([annotation(1, 7, 3, CAR)], 0.5),
        # It lies in a group of cars and does not count.
        ([annotation(1, 7, 3, CAR), annotation(2, 7, 3, CROWD, crowd=1)], 1.0),
        # Were the group one car that is missed, recall would end at 1/2: 51 of 101 points have precision 1/2.
        ([annotation(1, 7, 3, CAR), annotation(2, 7, 3, CROWD)], 0.5 * 51 / 101),
        # A group of something else is none of cars.
        ([annotation(1, 7, 3, CAR), annotation(2, 7, 90, CROWD, crowd=1)], 0.5),
    ],
)
def test_crowds_take_detections_in_them_out_of_the_count(kind, annotations, expected):
    results = [result(7, 3, ELSEWHERE, 0.9), result(7, 3, CAR, 0.8)]
    found = evaluate(instances(*annotations), results, kinds=(kind,))
    assert found.scores[f"{kind}_AP"] == pytest.approx(expected)


def test_ids_of_annotations_do_not_matter():
    """Also not 0, which pycocotools takes for no match."""
    for number in (0, 5):
        found = evaluate(instances(annotation(number, 7, 3, CAR)), [result(7, 3, CAR, 0.8)])
        assert (found.scores["bbox_AP"], found.scores["segm_AP"]) == pytest.approx((1, 1))


def test_the_mask_tells_whether_a_detection_is_large():
    """One with a box of more than 32 x 32 and a thin mask is a small wrong one for segm, and a medium one for bbox."""
    truth = instances(annotation(1, 7, 3, CAR), annotation(2, 8, 3, (0, 0, 40, 40)))
    thin = {**result(7, 3, (0, 0, 40, 40), 0.9), "segmentation": encode_mask(np.eye(*SIZE, dtype=bool))}
    found = evaluate(truth, [thin, result(7, 3, CAR, 0.8), result(8, 3, (0, 0, 40, 40), 0.8)])
    names = ("bbox_AP_small", "bbox_AP_medium", "segm_AP_small", "segm_AP_medium")
    assert [found.scores[name] for name in names] == pytest.approx([1, 0.5, 0.5, 1])


def test_an_image_without_objects_can_have_wrong_detections():
    truth = instances(annotation(1, 7, 3, CAR))
    right = result(7, 3, CAR, 0.8)
    assert evaluate(truth, [right]).scores["bbox_AP"] == pytest.approx(1)
    assert evaluate(truth, [right, result(8, 3, CAR, 0.9)]).scores["bbox_AP"] == pytest.approx(0.5)
    assert evaluate(truth, [right, result(8, 3, CAR, 0.9)], image_ids=[7]).scores["bbox_AP"] == pytest.approx(1)


def test_no_results_score_zero_and_no_objects_score_minus_one():
    found = evaluate(instances(annotation(1, 7, 3, CAR)), [])
    assert {name: found.scores[name] for name in ("bbox_AP", "segm_AR_100", "bbox_AP_small", "bbox_AP_large")} == {
        "bbox_AP": 0, "segm_AR_100": 0, "bbox_AP_small": 0, "bbox_AP_large": -1
    }  # fmt: skip
    assert {*evaluate(instances(), [result(7, 3, CAR, 0.9)]).scores.values()} == {-1}
    assert {*evaluate(instances(images=()), []).scores.values()} == {-1}


def test_categories_are_told_by_id_and_those_without_objects_have_no_score():
    truth = instances(annotation(1, 7, 3, CAR), annotation(2, 7, 90, CROWD, crowd=1))
    found = evaluate(truth, [result(7, 3, CAR, 0.8)], kinds=("bbox",))
    assert found.categories == [
        {"id": 3, "name": "car", "objects": 1, "bbox_AP": pytest.approx(1), "bbox_AP50": pytest.approx(1)},
        {"id": 90, "name": "brush", "objects": 0, "bbox_AP": None, "bbox_AP50": None},
    ]
    assert json.loads(json.dumps(found.categories)) == found.categories
    lines = [line.strip("│ ").split() for line in printed(category_table(found.categories)).splitlines()]
    assert ["3", "│", "car", "│", "1", "│", "100.0", "│", "100.0"] in lines
    assert ["90", "│", "brush", "│", "0", "│", "-", "│", "-"] in lines
    rows = [line.strip("│ ").split(" │ ") for line in printed(score_table(found.scores)).splitlines()]
    shown = {row[0].strip(): row[1].strip() for row in rows if row[0].startswith("A")}
    sizes = {"small": "100.0", "medium": "-", "large": "-"}
    assert shown == {
        **dict.fromkeys(["AP", "AP50", "AP75", "AR_1", "AR_10", "AR_100"], "100.0"),
        **{f"{of}_{size}": value for of in ("AP", "AR") for size, value in sizes.items()},
    }


def test_an_evaluation_changes_nothing_and_prints_nothing(capsys):
    truth, results = instances(annotation(1, 7, 3, CAR)), [result(7, 3, CAR, 0.8)]
    before = copy.deepcopy((truth, results))
    evaluate(truth, results)
    assert (truth, results) == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, r"of the images in the annotations, of image_id 7, 8; got image_id 9\."),
        ({"category_id": 2}, r"of the categories in the annotations, of category_id 3, 90; got category_id 2\."),
        ({"score": math.nan}, r"must have a finite number as score, got nan in entry 1\."),
        ({"score": "0.5"}, r"must have a finite number as score, got '0.5' in entry 1\."),
        ({"bbox": [1.0, 2.0, 3.0]}, r"must have 4 finite numbers as bbox, got \[1.0, 2.0, 3.0\] in entry 1\."),
        ({"bbox": [1.0, 2.0, 3.0, math.inf]}, r"must have 4 finite numbers as bbox, got .* in entry 1\."),
        ({"segmentation": encode_mask(np.zeros((64, 48), bool))}, r"over the image, with size \[48, 64\] in entry 1"),
        ({"segmentation": [[0, 0, 1, 0, 1, 1]]}, r"a compressed run-length mask .* got \[\[0, 0, 1"),
    ],
)
def test_results_that_cannot_be_scored_are_told(change, message):
    results = [result(7, 3, CAR, 0.8), {**result(7, 3, CAR, 0.8), **change}]
    with pytest.raises(ValueError, match=message):
        evaluate(instances(annotation(1, 7, 3, CAR)), results)


def test_missing_fields_and_many_unknown_images_are_told():
    truth = instances(annotation(1, 7, 3, CAR))
    boxes = [{name: value for name, value in result(7, 3, CAR, 0.8).items() if name != "segmentation"}]
    assert evaluate(truth, boxes, kinds=["bbox"]).scores["bbox_AP"] == pytest.approx(1)
    message = r"must have bbox, category_id, image_id, score, segmentation each; entry 0 has no segmentation\."
    with pytest.raises(ValueError, match=message):
        evaluate(truth, boxes)
    with pytest.raises(ValueError, match=r"got image_id 19, 18, 17 and 7 more\."):
        evaluate(truth, [result(i, 3, CAR, 0.8) for i in range(19, 9, -1)])
    with pytest.raises(ValueError, match=r"image_ids must be of images in the annotations, got 9\."):
        evaluate(truth, [], image_ids=[7, 9])


def test_other_kinds_and_annotations_are_told(tmp_path):
    with pytest.raises(ValueError, match="kinds must be one or both of bbox, segm, got keypoints"):
        evaluate(instances(), [], kinds=["keypoints"])
    with pytest.raises(ValueError, match="annotations must be COCO instances, got those given: KeyError"):
        evaluate({"images": []}, [])
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"annotations must be COCO instances, got .*cut.json: JSONDecodeError"):
        evaluate(tmp_path / "cut.json", [])


LANDSCAPE = {"size": (800, 1067), "original": (480, 640)}
PORTRAIT = {"size": (1333, 625), "original": (640, 300)}


@pytest.mark.parametrize("image", [LANDSCAPE, PORTRAIT], ids=["landscape", "portrait"])
def test_boxes_are_mapped_back_to_the_original_image(image):
    """Each axis has a ratio of its own, as sizes are whole numbers: the image's far corner is its far corner."""
    (height, width), (h, w) = image["size"], image["original"]
    boxes = [[[0, 0, width, height], [width / 2, height / 4, width, height]]]
    found = coco_results(
        detections(boxes, [[0.75, 0.5]], [[1, 0]]),
        np.array([7]),
        np.array([image["size"]]),
        np.array([image["original"]]),
        [3, 90],
    )
    assert [one["category_id"] for one in found] == [90, 3]
    assert [one["score"] for one in found] == [0.75, 0.5]
    expected = [[0, 0, w, h], [w / 2, h / 4, w / 2, 3 * h / 4]]
    np.testing.assert_allclose([one["bbox"] for one in found], expected, rtol=1e-5)


def test_what_is_padding_is_no_result_and_the_others_are_plain():
    """Of two images the second is padding of the batch, and of the first the second detection."""
    boxes = np.tile(np.array([2, 2, 12, 12], np.float32), (2, 2, 1))
    scores = np.array([[1 / 3, 0], [0.9, 0.9]], np.float32)
    found = coco_results(
        detections(boxes, scores, np.zeros((2, 2), int), [[True, False], [True, True]]),
        np.array([7, 0], np.int32),
        np.array([SIZE, SIZE], np.int32),
        np.array([SIZE, SIZE], np.int32),
        [3],
        mask=np.array([True, False]),
    )
    score = float(np.float32(1 / 3))
    assert found == [{"image_id": 7, "category_id": 3, "bbox": [2.0, 2.0, 10.0, 10.0], "score": score}]
    assert json.loads(json.dumps(found)) == found
    assert {type(value) for value in found[0].values()} == {int, list, float}


def test_boxes_and_masks_of_objects_found_at_twice_the_size_are_right():
    """From arrays of a network to the numbers. Masks are a little larger than these boxes, by the ring around them."""
    truth = instances(annotation(1, 7, 3, (2, 2, 40, 30)), annotation(2, 8, 90, (20, 8, 30, 36)))
    boxes = 2 * np.array([[[2, 2, 42, 32]], [[20, 8, 50, 44]]], np.float32)
    found = coco_results(
        detections(boxes, np.ones((2, 1)), np.array([[0], [1]]), masks=np.ones((2, 1, 28, 28), np.float32)),
        np.array([7, 8]),
        np.array([(96, 128), (96, 128)]),
        np.array([SIZE, SIZE]),
        [3, 90],
    )
    scores = evaluate(truth, json.loads(json.dumps(found))).scores
    assert scores["bbox_AP"] == pytest.approx(1)
    assert scores["segm_AP75"] == pytest.approx(1)


@pytest.mark.parametrize("image", [0, 1])
def test_results_are_those_of_torchvision(shared, image):
    """The golden images are a landscape and a portrait, resized by ratios that differ between axes."""
    arrays = np.load(shared / "golden" / "torchvision" / "maskrcnn.npz")
    original = [(240, 320), (500, 351)][image]
    part = {name: arrays[f"det_resized/{image}/{name}"] for name in ("boxes", "scores", "labels", "masks")}
    found = coco_results(
        Detections(
            part["boxes"][None], part["scores"][None], part["labels"][None] - 1, np.ones((1, 12), bool),
            part["masks"][None, :, 0],
        ),
        np.array([1]),
        arrays["image_sizes"][image][None],
        np.array([original]),
        range(1, 8),
    )  # fmt: skip
    boxes = arrays[f"det/{image}/boxes"]
    np.testing.assert_allclose([one["bbox"][:2] for one in found], boxes[:, :2], atol=1e-4)
    np.testing.assert_allclose([one["bbox"][2:] for one in found], boxes[:, 2:] - boxes[:, :2], atol=1e-4)
    assert [one["category_id"] for one in found] == arrays[f"det/{image}/labels"].tolist()
    assert [one["score"] for one in found] == arrays[f"det/{image}/scores"].tolist()
    expected = np.unpackbits(arrays[f"det/{image}/masks_bits"][:, 0], axis=-1, count=original[1]).astype(bool)
    decoded = np.stack([decode_mask(one["segmentation"], original) for one in found])
    pasted = paste_masks(part["masks"][:, 0], boxes, original)
    np.testing.assert_array_equal(decoded | (abs(pasted - 0.5) < 1e-5), expected | (abs(pasted - 0.5) < 1e-5))
    np.testing.assert_allclose(pasted[:2], arrays[f"det/{image}/masks_first2"][:, 0], atol=1e-5)
    np.testing.assert_allclose(pasted.sum((1, 2)), arrays[f"det/{image}/masks_sum"], rtol=1e-4)


def test_pasted_masks_are_torchvisions(shared):
    arrays = np.load(shared / "golden" / "torchvision" / "unit_misc.npz")
    pasted = paste_masks(arrays["paste/masks"][:, 0], arrays["paste/boxes"], (48, 64))
    np.testing.assert_allclose(pasted, arrays["paste/out"][:, 0], atol=1e-5)


@pytest.mark.parametrize(
    "box",
    [
        (5.2, 3.9, 20.7, 30.1),
        (-6.5, -9.3, 12.0, 11.0),  # over the image's edges
        (-20.0, 30.0, 90.0, 60.0),
        (9.9, 9.9, 10.1, 10.1),  # in a pixel
        (70.0, 10.0, 80.0, 20.0),  # outside
    ],
)
def test_a_pixel_of_a_pasted_mask_is_interpolated_between_four_cells(box):
    """Pixel by pixel. The ring of zeros makes 6 cells of 4, and the box 6 / 4 as wide around its middle."""
    mask = np.random.default_rng(0).uniform(size=(4, 4)).astype(np.float32)
    ringed = np.pad(mask, 1)

    def cell(pixel, low, high):
        """Where the middle of a pixel lies between the middles of cells, or None if it is not over them."""
        first, last = (int((low + high) / 2 + sign * (high - low) / 2 * 6 / 4) for sign in (-1, 1))
        if first <= pixel <= last:
            return min(max((pixel - first + 0.5) * 6 / (last - first + 1) - 0.5, 0), 5)

    expected = np.zeros(SIZE)
    for y, x in np.ndindex(SIZE):
        v, u = cell(y, box[1], box[3]), cell(x, box[0], box[2])
        if v is not None and u is not None:
            i, j = int(v), int(u)
            below, right = min(i + 1, 5), min(j + 1, 5)
            top = (1 - (u - j)) * ringed[i, j] + (u - j) * ringed[i, right]
            bottom = (1 - (u - j)) * ringed[below, j] + (u - j) * ringed[below, right]
            expected[y, x] = (1 - (v - i)) * top + (v - i) * bottom
    (pasted,) = paste_masks(mask[None], np.array([box], np.float32), SIZE)
    np.testing.assert_allclose(pasted, expected, atol=1e-5)


def test_no_masks_can_be_pasted():
    assert paste_masks(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (5, 6)).shape == (0, 5, 6)


def test_masks_come_back_from_what_they_are_encoded_as():
    mask = np.random.default_rng(0).uniform(size=(13, 17)) > 0.6
    encoded = encode_mask(mask)
    assert json.loads(json.dumps(encoded)) == encoded
    np.testing.assert_array_equal(decode_mask(encoded, (13, 17)), mask)
    runs = {"size": [13, 17], "counts": [len(run) for run in _runs(mask.T.ravel())]}
    np.testing.assert_array_equal(decode_mask(runs, (13, 17)), mask)


def test_polygons_are_filled():
    """Two rectangles, of one object, with corners between pixels."""
    polygons = [[2, 3, 8, 3, 8, 5, 2, 5], [10, 0, 12, 0, 12, 13, 10, 13]]
    expected = box_mask(2, 3, 6, 2, (13, 17)) | box_mask(10, 0, 2, 13, (13, 17))
    np.testing.assert_array_equal(decode_mask(polygons, (13, 17)), expected)


def test_results_are_read_as_they_were_written(tmp_path):
    results = [result(7, 3, CAR, 1 / 3), result(8, 90, CROWD, 0.25)]
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    with pytest.raises(ValueError, match="Out of range float"):
        write_results(tmp_path / "results.json", [result(7, 3, CAR, math.nan)])
    assert read_results(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(("content", "message"), [("[", "must be a JSON file"), ("{}", "must be a list of objects")])
def test_other_files_are_no_results(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=f"results {message}.* {tmp_path}/results.json"):
        read_results(tmp_path / "results.json")


def test_the_command_prints_numbers_and_categories(tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps(instances(annotation(1, 7, 3, CAR))))
    command = [sys.executable, "-m", "ssm_jax.detection.evaluation", f"--annotations={tmp_path / 'truth.json'}"]
    command.append(f"--results={tmp_path / 'results.json'}")
    write_results(tmp_path / "results.json", [result(7, 3, CAR, 0.8)])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "AR_large" in done.stdout
    assert "brush" in done.stdout
    assert "segm AP50" in done.stdout
    write_results(tmp_path / "results.json", [result(6, 3, CAR, 0.8)])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: results must be of the images in the annotations, of image_id 7, 8; got image_id 6.\n"
    )
