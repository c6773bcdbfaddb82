"""What the papers, and others about them, report: the tables of `experiments.tables`, but for the numbers.

Numbers that belong to a recipe are in the recipe, `config.published`. Of S4ND's paper the abstract and parts of the
introduction could be read, of S6LA's neither: no number of S6LA's authors is known here.
"""

from typing import NamedTuple


class Group(NamedTuple):
    """Recipes that are a table of a paper."""

    paper: str
    title: str
    recipes: tuple[str, ...]
    """Patterns of names in `python -m experiments.configs`."""
    reduced: tuple[str, ...] = ()
    """Sweeps that are about the same, at a reduced size."""


class Claim(NamedTuple):
    """A number that is no result of a recipe here."""

    paper: str
    what: str
    value: str
    source: str
    status: str
    """How sure it is."""


GROUPS = (
    Group(
        "s4nd",
        "ImageNet-1k (section 4.1)",
        ("s4nd/imagenet_*",),
        ("tiny_imagenet", "tiny_imagenet_convnext", "tiny_imagenet_vit"),
    ),
    Group("s4nd", "Video, HMDB-51 (section 4.2)", ("s4nd/hmdb51_*",), ("video",)),
    Group(
        "s4nd",
        "CIFAR-10 and CelebA at their full resolutions (section 4.3)",
        ("s4nd/cifar10_iso*", "s4nd/celeb_a_convnext*:160"),
        ("isotropic",),
    ),
    Group(
        "s4nd",
        "Zero-shot change of resolution (section 4.3)",
        ("s4nd/cifar10_zero_shot_*", "s4nd/celeb_a_convnext*:128", "s4nd/celeb_a_convnext*:64"),
        ("zero_shot", "zero_shot_8", "zero_shot_16", "zero_shot_32"),
    ),
    Group("s4nd", "Progressive resizing (section 4.3)", ("s4nd/*progressive*",), ("progressive",)),
    Group("s6la", "ResNets on ImageNet-1k", ("s6la/imagenet_resnet*",), ("aggregation", "aggregation_quick")),
    Group(
        "s6la",
        "Transformers on ImageNet-1k",
        ("s6la/imagenet_deit*", "s6la/imagenet_swin*", "s6la/imagenet_pvt*"),
        ("aggregation", "aggregation_quick"),
    ),
    Group("s6la", "Detection and instance segmentation, COCO", ("s6la/coco_*",)),
    Group("s6la", "ResNets on CIFAR-10", ("s6la/cifar10_*",), ("aggregation", "aggregation_quick")),
)

CLAIMS = (
    Claim("s4nd", "trained at 8 x 8, tested at 32 x 32: S4ND above Conv2D", "40 points", "abstract", "confirmed"),
    Claim("s4nd", "least loss from 128 to 160 pixels", "1.3 points", "introduction", "confirmed"),
    Claim("s4nd", "loss without a band limit", "20 % and more", "introduction", "confirmed"),
    Claim("s4nd", "progressive resizing, time saved", "22 %", "abstract", "confirmed"),
    Claim("s4nd", "progressive resizing, accuracy lost", "about 1 point", "abstract", "confirmed"),
    Claim("s4nd", "HMDB-51, above the inflated ConvNeXt", "4 points", "abstract", "confirmed"),
    Claim("s4nd", "Inception-I3D on HMDB-51 (RGB), 25.0 M parameters", "49.8 %", "S4ND", "recalled, not verified"),
    Claim("s4nd", "S4ND-ISO of 268 k parameters on CIFAR-10", "89.9 %", "Hyena's table 4.7", "third party"),
    Claim("s4nd", "Hyena-ISO of 202 k parameters on CIFAR-10", "91.2 %", "Hyena's table 4.7", "third party"),
    Claim("s4nd", "ViT-B-S4ND, parameters", "88.8 M", "De-focus's README", "confirmed; ours equal"),
    Claim("s4nd", "S4ND-ConvNeXt-T, parameters", "30 M", "VMamba's table", "confirmed; ours 30.01 M"),
    Claim("s4nd", "S4ND-ConvNeXt-T, FLOPs and images/s", "5.2 G, 683", "VMamba's table", "third party"),
    Claim("s4nd", "ConvNeXt-T, FLOPs and images/s", "4.5 G, 1198", "VMamba's table", "third party"),
    Claim("s4nd", "S4ND-ViT-B, FLOPs and images/s", "17.1 G, 397", "VMamba's table", "third party"),
    Claim("s4nd", "S4ND-ConvNeXt-T, MB in evaluation, in training", "3945, 24 630", "VMamba's log", "third party"),
    Claim("s4nd", "ConvNeXt-T, MB in evaluation, in training", "1664, 14 553", "VMamba's log", "third party"),
    *(
        Claim(
            "s6la",
            f"ResNet-50 / 101 / 152{name}, 10^6 parameters; 10^9 multiply-adds",
            value,
            "counted",
            "tests: equal",
        )
        for name, value in {
            "": "25.557 / 44.549 / 60.193; 4.089 / 7.801 / 11.514",
            " with RLA": "25.871 / 45.003 / 60.771; 4.455 / 8.334 / 12.267",
            " with MRLA-light": "25.738 / 44.940 / 60.768; 4.139 / 7.882 / 11.632",
            " with S6LA": "26.047 / 45.178 / 60.945; 4.680 / 8.747 / 12.898",
        }.items()
    ),
    Claim("s6la", "RLA-ECA-ResNet-50 on ImageNet-1k", "77.85 %", "RLANet's README", "published"),
    *(
        Claim("s6la", f"{detector} on COCO, box AP, R50 / R101: {method}", value, "RLANet's README", "published")
        for detector, values in {
            "Faster R-CNN": {"RLA": "38.8 / 41.2", "RLA-ECA": "39.8 / 42.1"},
            "RetinaNet": {"RLA": "37.9 / 40.3", "RLA-ECA": "39.0 / 41.5"},
            "Mask R-CNN": {"RLA": "39.5 / 41.8", "RLA-ECA": "40.6 / 42.9"},
        }.items()
        for method, value in values.items()
    ),
)
