"""Images and objects for detectors, against torchvision's numbers and masks over whole images."""

import io
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools.mask import decode, frPyObjects, merge

from ssm_jax.data.coco import coco
from ssm_jax.data.decode import BrokenExampleError
from ssm_jax.data.detection import (
    GRID,
    DetectionAugment,
    DetectionInput,
    bucket_of,
    buckets,
    crop_masks,
    resized,
)
from ssm_jax.data.pipeline import eval_batches, train_batches

SIDES = (40, 60)
BOXES = np.array([[2, 4, 12, 8], [0, 0, 5, 5], [-1, 3, 30, 12.5], [24, 0, 40, 16]], np.float32)
POLYGONS = [
    [np.array([2, 4, 12, 4, 7, 8], np.float32)],
    {"counts": np.array([3, 2, 475], np.int32), "size": [16, 30]},
    [np.array([-1, 3, 30, 3, 30, 12.5, -1, 12.5], np.float32), np.array([4, 13, 6, 13, 6, 15, 4, 15], np.float32)],
    [np.array([24, 0, 40, 0, 24, 16], np.float32)],
]


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def example():
    """An image of 16 x 30 with four objects, the second a crowd, of which some are partly outside."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 30, 3), np.uint8)
    return {
        "image": encoded(pixels),
        "image_id": 7,
        "size": np.array([16, 30], np.int32),
        "boxes": BOXES,
        "classes": np.array([3, 1, 0, 3], np.int32),
        "crowd": np.array([False, True, False, False]),
        "segmentation": POLYGONS,
    }


def augmented(example, seed=0, *, flip=False, max_objects=5, masks=True, sides=SIDES):
    augment = DetectionAugment(sides=sides, flip=flip, max_objects=max_objects, masks=masks)
    return augment(example, np.random.default_rng(seed))


def mirrored_and_not(example, **options):
    """The same example as two seeds give it."""
    plain, *others = (augmented(example, seed, flip=True, **options) for seed in range(10))
    return plain, next(other for other in others if (other["image"] != plain["image"]).any())


def whole_mask(segmentation, size):
    """(h, w) over the image, by pycocotools."""
    if isinstance(segmentation, dict):
        drawn = frPyObjects({**segmentation, "counts": segmentation["counts"].tolist()}, *size)
    else:
        drawn = merge(frPyObjects([polygon.tolist() for polygon in segmentation], *size))
    return decode(drawn)


def averaged(mask, box, cells):
    """The share of a mask over an image in each of cells x cells equal parts of a box."""

    def shares(low, high, length):
        edges, pixels = np.linspace(low, high, cells + 1), np.arange(length)
        covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
        return np.maximum(covered, 0) * cells / (high - low)

    left, top, right, bottom = box.astype(np.float64)
    return shares(top, bottom, len(mask)) @ mask @ shares(left, right, mask.shape[1]).T


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((500, 500), (800, 800)),
        ((300, 640), (624, 1333)),
        ((1600, 2000), (800, 1000)),
        ((100, 640), (208, 1333)),
    ],
)
def test_the_shorter_side_is_the_first_unless_the_longer_one_is_above_the_second(size, expected):
    assert resized(*size, (800, 1333)) == expected


def test_sizes_and_boxes_are_torchvisions(shared):
    golden = np.load(shared / "golden" / "torchvision" / "unit_misc.npz")
    for i, expected in enumerate(golden["transform/out_sizes"].tolist()):
        height, width = golden[f"transform/image/{i}"].shape[1:]
        assert resized(height, width, (61, 100)) == tuple(expected)
        boxes = golden[f"transform/boxes/{i}"]
        example = {
            "image": np.zeros((height, width, 3), np.uint8),
            "image_id": i,
            "size": np.array([height, width], np.int32),
            "boxes": boxes,
            "classes": np.zeros(len(boxes), np.int32),
            "crowd": np.zeros(len(boxes), bool),
        }
        found = augmented(example, sides=(61, 100), masks=False)
        np.testing.assert_allclose(found["boxes"][: len(boxes)], golden[f"transform/out_boxes/{i}"], rtol=1e-6)


def test_images_are_close_to_torchvisions(shared):
    """Which interpolates between floats."""
    golden = np.load(shared / "golden" / "torchvision" / "images_targets.npz")
    size = golden["image/0"].shape[:2]
    example = {"image": golden["image/0"], "image_id": 0, "size": np.array(size, np.int32)}
    found = DetectionInput(sides=(384, 512))(example)
    assert found["size"].tolist() == [384, 512]
    at = (np.arange(512) + 0.5) * size[1] / 512 - 0.5
    row = golden["image/0"][:, :, 0].astype(float)
    columns = np.stack([np.interp(at, np.arange(size[1]), line) for line in row])
    at = (np.arange(384) + 0.5) * size[0] / 384 - 0.5
    expected = np.stack([np.interp(at, np.arange(size[0]), line) for line in columns.T], axis=1)
    np.testing.assert_allclose(found["image"][:384, :512, 0], expected, atol=1.01)


@pytest.mark.parametrize(
    ("sides", "expected"),
    [((800, 1333), ((800, 1344), (1344, 800))), ((96, 128), ((96, 128), (128, 96))), ((250, 256), ((256, 256),))],
)
def test_buckets_are_multiples_of_32(sides, expected):
    assert buckets(sides) == expected


@pytest.mark.parametrize("sides", [(800, 1333), (250, 256), (60, 100), (33, 33)])
def test_every_image_fits_its_bucket(sides):
    lengths = [1, 2, 31, 100, 333, 427, 480, 639, 640, 1000, 5000]
    sizes = np.array([*itertools.product(lengths, lengths)])
    for (height, width), bucket in zip(sizes.tolist(), bucket_of(sizes, sides), strict=True):
        rows, columns = buckets(sides)[bucket]
        h, w = resized(height, width, sides)
        assert 1 <= h <= rows
        assert 1 <= w <= columns


def test_the_bucket_is_that_of_the_original_size():
    """Rounding makes a square of this image, which pipelines still take for one that is higher than wide."""
    size = np.array([640, 639], np.int32)
    assert resized(640, 639, SIDES) == (40, 40)
    example = {"image": np.zeros((640, 639, 3), np.uint8), "image_id": 0, "size": size}
    found = DetectionInput(sides=(40, 90))(example)
    assert found["image"].shape == (*buckets((40, 90))[bucket_of(size[None], (40, 90))[0]], 3) == (96, 64, 3)


def test_an_example_is_what_a_detector_takes(example):
    found = augmented(example)
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        "image": ((64, 64, 3), np.uint8),
        "size": ((2,), np.int32),
        "boxes": ((5, 4), np.float32),
        "classes": ((5,), np.int32),
        "valid": ((5,), np.bool_),
        "masks": ((5, GRID, GRID), np.uint8),
        "mask_boxes": ((5, 4), np.float32),
    }
    without = augmented(example, masks=False)
    assert without.keys() == found.keys() - {"masks", "mask_boxes"}
    for name, array in without.items():
        np.testing.assert_array_equal(array, found[name])


def test_an_image_is_in_the_upper_left_of_zeros(example):
    found = augmented(example)
    assert found["size"].tolist() == [32, 60]
    expected = Image.open(io.BytesIO(example["image"])).resize((60, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found["image"][:32, :60], np.asarray(expected))
    assert not found["image"][32:].any()
    assert not found["image"][:, 60:].any()


def test_boxes_are_scaled_and_cut_at_the_edges_of_the_image(example):
    """16 x 30 becomes 32 x 60. Crowds are left out."""
    found = augmented(example)
    expected = [[4, 8, 24, 16], [0, 6, 60, 25], [48, 0, 60, 32]]
    np.testing.assert_allclose(found["boxes"], [*expected, [0] * 4, [0] * 4], rtol=1e-6)
    assert found["classes"].tolist() == [3, 0, 3, 0, 0]
    assert found["valid"].tolist() == [True, True, True, False, False]
    assert not found["masks"][3:].any()


def test_half_of_the_examples_are_mirrored_as_a_whole(example):
    plain, other = mirrored_and_not(example)
    if (plain["image"] != augmented(example)["image"]).any():
        plain, other = other, plain
    width = 60
    np.testing.assert_array_equal(other["image"][:, :width], plain["image"][:, width - 1 :: -1])
    assert not other["image"][:, width:].any()
    for boxes in ("boxes", "mask_boxes"):
        np.testing.assert_allclose(other[boxes][:3, ::2], width - plain[boxes][:3, [2, 0]], atol=1e-4)
        np.testing.assert_array_equal(other[boxes][:, 1::2], plain[boxes][:, 1::2])
    np.testing.assert_array_equal(other["masks"], plain["masks"][..., ::-1])
    for name in ("size", "classes", "valid"):
        np.testing.assert_array_equal(other[name], plain[name])
    mirrored = [
        (augmented(example, seed, flip=True, masks=False)["image"] != plain["image"]).any() for seed in range(60)
    ]
    assert 15 <= sum(mirrored) <= 45


def test_without_flip_nothing_is_random(example):
    assert pickle.dumps(augmented(example, 1)) == pickle.dumps(augmented(example, 2))


def test_images_without_objects_have_padding_alone(example):
    example |= {"boxes": BOXES[:0], "classes": np.zeros(0, np.int32), "crowd": np.zeros(0, bool), "segmentation": []}
    found = augmented(example)
    assert not found["valid"].any()
    assert found["masks"].shape == (5, GRID, GRID)


def test_a_box_that_is_too_narrow_to_be_mirrored_is_no_object(example):
    """Of 1e-7 pixels nothing is left in float32, and every anchor would have the largest overlap with it: 0."""
    boxes = example["boxes"].astype(np.float32)
    boxes[0] = 1, 2, np.nextafter(np.float32(1), np.float32(2)), 9
    found = augmented({**example, "boxes": boxes}, seed=next(s for s in range(9) if mirrored(s)), flip=True)
    there = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1)
    np.testing.assert_array_equal(found["valid"], there)
    assert found["valid"].sum() == augmented(example)["valid"].sum() - 1


def mirrored(seed):
    return bool(np.random.default_rng(seed).integers(2))


def test_more_objects_than_there_is_room_for_are_refused(example):
    assert augmented(example, max_objects=3)["valid"].all()
    with pytest.raises(ValueError, match=r"^max_objects must be at least the 3 objects of image 7, got 2\.$"):
        augmented(example, max_objects=2)


@pytest.mark.parametrize("sides", [(60, 40), (0, 40)])
def test_sides_are_two_in_order(sides):
    with pytest.raises(ValueError, match=r"^sides must be \(shorter, longer\)"):
        DetectionInput(sides=sides)
    with pytest.raises(ValueError, match=r"^sides must be \(shorter, longer\)"):
        DetectionAugment(sides=sides, flip=False, max_objects=1, masks=False)


def test_there_is_room_for_objects():
    with pytest.raises(ValueError, match=r"^max_objects must be at least 1, got 0\.$"):
        DetectionAugment(sides=SIDES, flip=False, max_objects=0, masks=False)


@pytest.mark.parametrize("read", [augmented, lambda example: DetectionInput(sides=SIDES)(example)])
def test_images_that_cannot_be_read_or_have_another_size_are_broken(example, read):
    with pytest.raises(BrokenExampleError, match="cannot be decoded"):
        read({**example, "image": example["image"][:50]})
    with pytest.raises(BrokenExampleError, match=r"^image 7 is 16 x 30, and 30 x 16 in the annotations\.$"):
        read({**example, "image": encoded(np.zeros((30, 16, 3), np.uint8))})


def test_for_evaluation_the_size_of_the_file_is_told(example):
    found = DetectionInput(sides=SIDES)(example)
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        "image": ((64, 64, 3), np.uint8),
        "size": ((2,), np.int32),
        "original_size": ((2,), np.int32),
        "image_id": ((), np.int32),
    }
    np.testing.assert_array_equal(found["image"], augmented(example)["image"])
    assert found["size"].tolist() == [32, 60]
    assert found["original_size"].tolist() == [16, 30]
    assert found["image_id"] == 7


def test_masks_of_shapes_that_are_known():
    """A rectangle fills its grid, but for the empty cells around it, which the grid's box has too."""
    square = [np.array([10, 20, 38, 20, 38, 34, 10, 34], np.float32)]
    triangle = [np.array([0, 0, 56, 0, 0, 28], np.float32)]
    masks, boxes = crop_masks([square, triangle], (100, 200))
    full = np.zeros((GRID, GRID))
    full[1:-1, 1:-1] = 1
    np.testing.assert_array_equal(masks[0], full)
    np.testing.assert_allclose(boxes[0], [10 - 0.25, 20 - 0.125, 38 + 0.25, 34 + 0.125])
    y, x = np.mgrid[:112, :112]
    half = masks[1, 1:-1, 1:-1].astype(bool)
    assert half[x + y < 110].all()
    assert not half[x + y > 112].any()


def test_several_polygons_are_one_mask_on_one_grid():
    left, right = (np.array([x, 10, x + 10, 10, x + 10, 30, x, 30], np.float32) for x in (0, 30))
    (mask,), (box,) = crop_masks([[left, right]], (40, 60))
    inside = np.arange(112)
    expected = (inside < 28) | (inside >= 84)
    np.testing.assert_array_equal(mask[1:-1, 1:-1], np.broadcast_to(expected, (112, 112)))
    np.testing.assert_allclose(box[::2], [-40 / 112, 40 + 40 / 112], rtol=1e-6)


def test_what_is_outside_of_the_image_is_not_in_the_mask():
    (mask,), (box,) = crop_masks([[np.array([-20, -5, 28, -5, 28, 56, -20, 56], np.float32)]], (56, 100))
    np.testing.assert_allclose(box, [-0.25, -0.5, 28.25, 56.5])
    assert mask[1:-1, 1:-1].all()
    assert mask.sum() == 112**2


def test_masks_of_runs_are_those_of_pixels():
    pixels = np.zeros((20, 30), np.uint8)
    pixels[4:11, 3:17] = np.random.default_rng(0).integers(0, 2, (7, 14))
    pixels[[4, 10], [3, 16]] = 1
    line = pixels.T.ravel()
    changes = np.flatnonzero(np.diff(line)) + 1
    runs = np.diff([0, *changes, line.size]).astype(np.int32)
    (mask,), (box,) = crop_masks([{"counts": runs, "size": [20, 30]}], (20, 30))
    np.testing.assert_allclose(box, [3 - 1 / 8, 4 - 1 / 16, 17 + 1 / 8, 11 + 1 / 16])
    np.testing.assert_array_equal(mask[1:-1, 1:-1], np.kron(pixels[4:11, 3:17], np.ones((16, 8))))


def test_thin_objects_have_a_grid_too():
    line = [np.array([5, 5, 9, 5, 9, 5], np.float32)]
    point = [np.array([60, 40, 60, 40, 60, 40], np.float32)]
    masks, boxes = crop_masks([line, point], (40, 60))
    assert np.isfinite(boxes).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    assert not masks.any()


def test_masks_are_closer_to_the_pixels_the_larger_objects_are(shared):
    """Over the image, pixels are as large as an object's edges are wide, so that there is a limit to agreement."""
    dataset = coco(str(shared / "data" / "coco_mini"), bad_annotations="refuse")
    found = {"small": [], "medium": [], "large": []}
    images = dataset.splits["train"]
    for i in range(0, len(images), 2):
        objects, size = images.objects.of_image(i), tuple(images.sizes[i].tolist())
        kept = np.flatnonzero(~objects["crowd"])
        segmentations = [objects["segmentation"][j] for j in kept]
        masks, boxes = crop_masks(segmentations, size)
        for mask, box, segmentation, area in zip(masks, boxes, segmentations, objects["area"][kept], strict=True):
            truth = averaged(whole_mask(segmentation, size), box, GRID) >= 0.5
            kind = "small" if area < 32**2 else "medium" if area < 96**2 else "large"
            found[kind].append(iou(mask.astype(bool), truth))
    assert {kind: len(values) > 30 for kind, values in found.items()} == dict.fromkeys(found, True)
    means = {kind: np.mean(values) for kind, values in found.items()}
    assert means["small"] > 0.9
    assert means["medium"] > 0.97
    assert means["large"] > 0.99


def test_batches_are_of_one_bucket_each(shared):
    """All that a run reads of COCO."""
    dataset = coco(str(shared / "data" / "coco_mini"), bad_annotations="refuse")
    train, val = dataset.splits["train"].with_objects(), dataset.splits["val"]
    sides = (96, 160)
    augment = DetectionAugment(sides=sides, flip=True, max_objects=train.most_objects, masks=True)
    options = {"batch_size": 4, "groups": bucket_of(train.sizes, sides)}
    shapes = set()
    for batch in itertools.islice(train_batches(train, transform=augment, seed=0, **options), 6):
        shapes.add(batch["image"].shape)
        within = batch["boxes"] <= batch["size"][:, None, [1, 0, 1, 0]]
        assert within.all()
        assert (batch["boxes"][batch["valid"]][:, 2:] > batch["boxes"][batch["valid"]][:, :2]).all()
        assert batch["masks"].any(axis=(2, 3)).sum() == batch["valid"].sum()
    assert shapes == {(4, 96, 160, 3), (4, 160, 96, 3)}
    options = {"batch_size": 8, "groups": bucket_of(val.sizes, sides)}
    seen = {}
    for batch in eval_batches(val, transform=DetectionInput(sides=sides), **options):
        assert batch["image"].shape[1:3] in buckets(sides)
        rows = zip(batch["index"][batch["mask"]], batch["image_id"][batch["mask"]], strict=True)
        seen |= {int(index): int(image_id) for index, image_id in rows}
        np.testing.assert_array_equal(val.sizes[batch["index"]], batch["original_size"])
    assert [seen[i] for i in range(len(val))] == val.image_ids.tolist()
