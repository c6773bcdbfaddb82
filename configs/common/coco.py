"""Recipes for finding objects in COCO 2017: mmdetection's "1x" with FPN, as RLANet and its successors use it.

Each takes the name of the backbone, as `ssm_jax.list_models` has it, and arguments of the detector. The backbone is to
start from a classifier of ImageNet: `config.weights`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import classification

_STEPS = 7330
"""Batches of an epoch: of 16, of the 117,266 training images with objects."""


def retinanet(backbone: str, **detector: Any) -> ConfigDict:
    """RetinaNet (arXiv:1708.02002): half of the others' learning rate."""
    return _common("retinanet", backbone, detector, lr=0.01)


def faster_rcnn(backbone: str, **detector: Any) -> ConfigDict:
    """Faster R-CNN (arXiv:1506.01497) with FPN (arXiv:1612.03144)."""
    return _common("faster_rcnn", backbone, detector, lr=0.02)


def mask_rcnn(backbone: str, **detector: Any) -> ConfigDict:
    """Mask R-CNN (arXiv:1703.06870) with FPN."""
    return _common("mask_rcnn", backbone, detector, lr=0.02)


def _common(name: str, backbone: str, detector: dict[str, Any], *, lr: float) -> ConfigDict:
    """12 epochs of SGD, a tenth of the rate after 8 and after 11; stem and first stage of a ResNet stay as they are."""
    config = classification.get_config()
    config.model = {"name": name, "backbone": {"name": backbone}, **detector}
    config.data.update(name="coco", sides=(800, 1333))
    config.augment.flip = True
    config.batch_size = 16
    config.epochs = 12.0
    config.optimizer.update(name="sgd", lr=lr, ssm_lr=lr, weight_decay=1e-4, decay_rule="all")
    config.optimizer.update(warmup_epochs=500 / _STEPS, warmup_lr=1e-3 * lr, decay_epochs=(8.0, 11.0))
    config.optimizer.frozen = tuple(f"backbone.network.{part}" for part in ("conv1", "bn1", "stages.0"))
    config.eval.batch_size = 16
    config.published.metric = "box AP"
    return config
