r"""Mask R-CNN on COCO with ResNet-50.

    python -m experiments.train --config=configs/s6la/coco_mask_rcnn_resnet50.py --workdir=runs/mask \
        --config.weights=runs/resnet50

Not run by this project.
Other backbones: --config.model.backbone.name=resnet50_eca, or another that `ssm_jax.list_models("resnet50*")` has.
"""

from ml_collections import ConfigDict

from configs.common import coco


def get_config() -> ConfigDict:
    config = coco.mask_rcnn("resnet50")
    config.published.value, config.published.source = 38.2, "mmdetection 2.x; mask AP 34.7"
    return config
