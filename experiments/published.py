"""What the papers, and others about them, report: the tables of `experiments.tables`, but for the numbers.

Numbers that belong to a recipe are in the recipe, `config.published`. Of S4ND's paper the abstract and parts of the
introduction could be read, of S6LA's neither: no number of S6LA's authors is known here.
"""

from typing import NamedTuple

PAPERS = {
    "s4nd": "S4ND: Modeling Images and Videos as Multidimensional Signals Using State Spaces (NeurIPS 2022)",
    "s6la": "From Layers to States: A State Space Model Perspective to Deep Neural Network Layer Dynamics (ICLR 2025)",
}


class Group(NamedTuple):
    """Recipes that are a table of a paper."""

    paper: str
    title: str
    recipes: tuple[str, ...]
    """Patterns of names in `python -m experiments.configs`."""
    reduced: tuple[str, ...] = ()
    """Sweeps that are about the same, at a reduced size."""


class Cost(NamedTuple):
    """A cost of a recipe's network, which is counted here, too."""

    recipe: str
    what: str
    """`parameters` or `multiply-adds`."""
    value: str
    source: str
    status: str


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
        ("zero_shot", "zero_shot_32"),
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

STATUS = {
    "S4ND's abstract": "confirmed",
    "VMamba's table": "confirmed",
    "S4ND's paper": "recalled, not verified",
    "mmdetection": "published",
    "MRLA's checkpoint names": "published",
    **{f"{authors}'s README": "published" for authors in ("RLANet", "ECANet", "DeiT", "Swin", "PVTv2")},
}
"""How sure a recipe's published number is, by how its source begins."""

_RECALLED = "S4ND's paper", "recalled, not verified"

COSTS = (
    Cost("s4nd/imagenet_vit_s4nd.py", "parameters", "88.8 M", "De-focus's README", "confirmed"),
    Cost("s4nd/imagenet_convnext_s4nd.py", "parameters", "30 M", "VMamba's table", "confirmed"),
    *(
        Cost(f"s4nd/{recipe}", "parameters", value, *_RECALLED)
        for recipe, value in {
            "hmdb51_i3d.py": "28.5 M",
            "hmdb51_s3d.py": "27.9 M",
            "hmdb51_s4nd.py": "31.4 M",
            "cifar10_iso.py": "5.3 M",
            "cifar10_iso_conv2d.py:3x3": "2.2 M",
            "celeb_a_convnext_s4nd.py:160": "9.6 M",
            "celeb_a_convnext.py:160": "9.2 M",
        }.items()
    ),
    Cost("s4nd/imagenet_vit_s4nd.py", "multiply-adds", "17.1 G", "VMamba's table", "third party"),
    Cost("s4nd/imagenet_convnext_s4nd.py", "multiply-adds", "5.2 G", "VMamba's table", "third party"),
    Cost("s4nd/imagenet_convnext.py", "multiply-adds", "4.5 G", "VMamba's table", "third party"),
)

CLAIMS = (
    Claim("s4nd", "trained at 8 x 8, tested at 32 x 32: S4ND above Conv2D", "40 points", "abstract", "confirmed"),
    Claim("s4nd", "least loss from 128 to 160 pixels", "1.3 points", "introduction", "confirmed"),
    Claim("s4nd", "loss without a band limit", "up to 20 % and more", "introduction", "confirmed"),
    Claim("s4nd", "progressive resizing, time saved", "22 %", "abstract", "confirmed"),
    Claim("s4nd", "progressive resizing, accuracy lost", "about 1 point", "abstract", "confirmed"),
    Claim(
        "s4nd",
        "CIFAR-10, accuracy lost by 80 epochs at a low and 20 at the full resolution",
        "within 1 %",
        "reproducibility summary",
        "confirmed",
    ),
    Claim("s4nd", "HMDB-51, above the inflated ConvNeXt", "4 points", "abstract", "confirmed"),
    Claim("s4nd", "Inception-I3D on HMDB-51 (RGB), 25.0 M parameters", "49.8 %", "S4ND", "recalled, not verified"),
    Claim("s4nd", "S4ND-ISO of 268 k parameters on CIFAR-10", "89.9 %", "Hyena's table 4.7", "third party"),
    Claim("s4nd", "Hyena-ISO of 202 k parameters on CIFAR-10", "91.2 %", "Hyena's table 4.7", "third party"),
    Claim("s4nd", "Hyena-ISO, faster than S4ND-ISO", "8 %", "Hyena's table 4.7", "third party"),
    *(
        Claim("s4nd", f"{network}, {what}", value, source, "third party")
        for what, source, values in (
            ("images/s", "VMamba's table", {"S4ND-ConvNeXt-T": "683", "ConvNeXt-T": "1198", "S4ND-ViT-B": "397"}),
            ("images/s in batches of 128", "VMamba's log", {"S4ND-ConvNeXt-T": "254", "ConvNeXt-T": "367"}),
            ("MB in evaluation", "VMamba's log", {"S4ND-ConvNeXt-T": "3945", "ConvNeXt-T": "1664"}),
            ("MB in training", "VMamba's log", {"S4ND-ConvNeXt-T": "24 630", "ConvNeXt-T": "14 553"}),
        )
        for network, value in values.items()
    ),
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
