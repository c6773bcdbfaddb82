import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ssm_jax.detection import create_detector, list_detectors
from ssm_jax.detection.fpn import FPN
from ssm_jax.detection.structures import check_sizes
from ssm_jax.layers.norm import BatchNorm


def abstract(name, num_classes, **options):
    backbone = options.pop("backbone", "resnet50")
    return nnx.eval_shape(
        lambda: create_detector(name, backbone=backbone, num_classes=num_classes, rngs=nnx.Rngs(0), **options)
    )


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


TORCHVISION = {
    "retinanet": (91, 34_014_999),
    "retinanet_v2": (91, 38_198_935),
    "faster_rcnn": (90, 41_755_286),
    "faster_rcnn_v2": (90, 43_712_278),
    "mask_rcnn": (90, 44_401_393),
    "mask_rcnn_v2": (90, 46_359_409),
}
"""Classes of objects and parameters of torchvision's detectors with ResNet-50."""


@pytest.mark.parametrize("name", TORCHVISION)
def test_detectors_have_torchvisions_numbers_of_parameters(name):
    num_classes, expected = TORCHVISION[name]
    detector = abstract(name, num_classes)
    norms = [module for _, module in nnx.iter_modules(detector.backbone.network) if isinstance(module, BatchNorm)]
    frozen = 0 if name in ("faster_rcnn_v2", "mask_rcnn_v2", "retinanet_v2") else sum(map(count, norms))
    assert count(detector) - frozen == expected


def test_all_detectors_are_listed():
    assert set(list_detectors()) == set(TORCHVISION)


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(ValueError, match=r"unknown detector 'maskrcnn'; did you mean .*'mask_rcnn'"):
        abstract("maskrcnn", 3)
    with pytest.raises(ValueError, match=r"unknown model 'resnet5'; did you mean .*resnet50"):
        abstract("retinanet", 3, backbone="resnet5")


def test_arguments_go_to_the_detector_and_to_its_backbone():
    detector = abstract(
        "retinanet", 3, backbone={"name": "resnet18", "stem_width": 8, "norm_eval": False}, detections=7
    )
    assert detector.detections == 7
    assert detector.backbone.norm_eval is False
    assert detector.backbone.network.conv1.out_features == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"num_classes": 3, "backbone": {"depth": 3}}, "backbone must be the name of a network, or have it as `name`"),
        ({"num_classes": 3, "boxes": 3}, "detector 'mask_rcnn': .*unexpected keyword argument 'boxes'"),
        ({"num_classes": 3, "backbone": {"name": "resnet18", "windows": 3}}, "unexpected keyword argument 'windows'"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        abstract("mask_rcnn", **arguments)


def test_the_width_of_the_pyramid_is_that_of_all_heads():
    detector = abstract("mask_rcnn", 3, fpn=lambda channels, **options: FPN(channels, 64, **options))
    assert detector.rpn.objectness.in_features == detector.mask.convs[0].conv.in_features == 64
    assert detector.box.head.fc6.in_features == (7, 7, 64)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retinanet", {"match_iou": 0.3, "ignore_iou": 0.5}, r"ignore_iou must be in \[0, match_iou\].* 0\.5 and 0\.3"),
        ("retinanet", {"detections": 0}, "detections must be at least 1, got 0"),
        ("retinanet", {"candidates": 0}, "candidates must be at least 1, got 0"),
        ("faster_rcnn", {"rpn": {"match_iou": 1.1}}, r"match_iou at most 1, got 0\.3 and 1\.1"),
        ("faster_rcnn", {"rpn": {"train_proposals": 0}}, "train_proposals must be at least 1, got 0"),
        ("mask_rcnn", {"box": {"samples": 3}}, r"positive_share must be .* one of samples, got 0\.25 of samples=3"),
        ("mask_rcnn", {"box": {"positive_share": 2.0}}, r"positive_share must be in \(0, 1\]"),
        ("mask_rcnn", {"box": {"detections": 0}}, "detections must be at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused_by_their_names(name, options, message):
    with pytest.raises(ValueError, match=message):
        abstract(name, 3, **options)


@pytest.mark.parametrize("sizes", [[(64, 96)] * 2, (64, 96), [(64, 96, 3)]])
def test_sizes_are_of_each_image(sizes):
    with pytest.raises(ValueError, match=r"^sizes must be an array of shape \(1, 2\), height and width of each image"):
        check_sizes(jnp.zeros((1, 64, 96, 3)), sizes)
    check_sizes(jnp.zeros((1, 64, 96, 3)), [(64, 96)])
