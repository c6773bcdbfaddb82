"""RetinaNet, Faster R-CNN and Mask R-CNN on any network with maps at 1/4 to 1/32 of the images' size."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from ssm_jax.detection.backbone import Backbone as Backbone
from ssm_jax.detection.faster_rcnn import BoxBranch, ConvsLinear
from ssm_jax.detection.faster_rcnn import FasterRCNN as FasterRCNN
from ssm_jax.detection.fpn import FPN, P6P7FromNetwork
from ssm_jax.detection.mask_rcnn import MaskBranch
from ssm_jax.detection.retinanet import Head, giou
from ssm_jax.detection.retinanet import RetinaNet as RetinaNet
from ssm_jax.detection.rpn import RPN
from ssm_jax.detection.structures import Detections as Detections
from ssm_jax.detection.structures import Objects as Objects
from ssm_jax.layers.norm import BatchNorm

_partial = functools.partial
_group_norm = _partial(nnx.GroupNorm, num_groups=32, epsilon=1e-5, use_fast_variance=False)
_FASTER_V2 = {
    "fpn": _partial(FPN, norm=BatchNorm),
    "rpn": _partial(RPN, depth=2),
    "box": _partial(BoxBranch, head=_partial(ConvsLinear, norm=BatchNorm)),
}

_DETECTORS: dict[str, tuple[Callable[..., nnx.Module], dict[str, Any]]] = {
    "retinanet": (RetinaNet, {}),
    "retinanet_v2": (
        RetinaNet,
        {"fpn": _partial(FPN, extra=P6P7FromNetwork), "head": _partial(Head, norm=_group_norm), "box_loss": giou},
    ),
    "faster_rcnn": (FasterRCNN, {}),
    "faster_rcnn_v2": (FasterRCNN, _FASTER_V2),
    "mask_rcnn": (FasterRCNN, {"mask": MaskBranch}),
    "mask_rcnn_v2": (FasterRCNN, _FASTER_V2 | {"mask": _partial(MaskBranch, norm=BatchNorm)}),
}
"""What makes each detector, and its arguments: torchvision's, the later ones of arXiv:2111.11429 too."""


def list_detectors() -> list[str]:
    """Names that `create_detector` knows."""
    return sorted(_DETECTORS)


def create_detector(
    name: str, *, backbone: str | Mapping[str, Any], num_classes: int, rngs: nnx.Rngs, **overrides: Any
) -> Any:
    """Builds a detector by name.

    ```python
    detector = create_detector("mask_rcnn", backbone="resnet50_s6la", num_classes=80, rngs=nnx.Rngs(0))
    ```

    It is called as `detector(images, sizes)` and gives `Detections`; `detector.losses(images, sizes, objects, key=...)`
    are those of training, of which the sum is to be small. `ssm_jax.pretrained.load_torch(detector.backbone, ...)`
    gives it the weights of a classifier.

    Args:
        name: one of `list_detectors()`.
        backbone: name of a network, see `ssm_jax.list_models`, or with it, as `name`, arguments of `Backbone`.
        num_classes: number of classes of objects.
        rngs: source of the `params` stream.
        **overrides: arguments of the detector's constructor; a dict for a part of it, such as `box={"samples": 128}`,
            has those of the part.

    Raises:
        ValueError: for an unknown name (suggesting near ones), an unknown argument, or an impossible value.
    """
    if name not in _DETECTORS:
        near = difflib.get_close_matches(str(name), _DETECTORS, n=3) or list_detectors()
        raise ValueError(f"unknown detector {name!r}; did you mean {' or '.join(map(repr, near))}?")
    network = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    if "name" not in network:
        raise ValueError(f"backbone must be the name of a network, or have it as `name`, got {backbone!r}.")
    make, arguments = _DETECTORS[name]
    parameters = inspect.signature(make.__init__).parameters
    defaults = {part: parameter.default for part, parameter in parameters.items()} | arguments
    for part, given in overrides.items():
        if isinstance(given, Mapping):
            if not callable(defaults.get(part)):
                raise ValueError(f"{part} must not have arguments of its own in {name!r}, got {dict(given)}.")
            overrides[part] = _partial(defaults[part], **given)
    try:
        return make(num_classes, backbone=_partial(Backbone, **network), **arguments | overrides, rngs=rngs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"detector {name!r}: {error}") from error
