r"""RetinaNet on COCO with ResNet-50.

    python -m experiments.train --config=configs/s6la/coco_retinanet_resnet50.py --workdir=runs/retinanet \
        --config.weights=runs/resnet50

Not run by this project.
Other backbones: --config.model.backbone.name=resnet50_eca, or another that `ssm_jax.list_models("resnet50*")` has.
"""

from ml_collections import ConfigDict

from configs.common import coco


def get_config() -> ConfigDict:
    config = coco.retinanet("resnet50")
    config.published.value, config.published.source = 36.5, "mmdetection 2.x"
    return config
