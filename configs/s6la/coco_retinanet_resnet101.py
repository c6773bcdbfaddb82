r"""RetinaNet on COCO with ResNet-101.

    python -m experiments.train --config=configs/s6la/coco_retinanet_resnet101.py --workdir=runs/retinanet \
        --config.weights=runs/resnet101

Not run by this project.
Other backbones: --config.model.backbone.name=resnet101_eca, or another that `ssm_jax.list_models("resnet101*")` has.
"""

from ml_collections import ConfigDict

from configs.common import coco


def get_config() -> ConfigDict:
    config = coco.retinanet("resnet101")
    config.published.value, config.published.source = 38.5, "mmdetection 2.x"
    return config
