r"""Faster R-CNN on COCO with ResNet-50.

    python -m experiments.train --config=configs/s6la/coco_faster_rcnn_resnet50.py --workdir=runs/faster \
        --config.weights=runs/resnet50

Not run by this project.
Other backbones: --config.model.backbone.name=resnet50_eca, or another that `ssm_jax.list_models("resnet50*")` has.
"""

from ml_collections import ConfigDict

from configs.common import coco


def get_config() -> ConfigDict:
    config = coco.faster_rcnn("resnet50")
    config.published.value, config.published.source = 37.4, "mmdetection 2.x"
    return config
