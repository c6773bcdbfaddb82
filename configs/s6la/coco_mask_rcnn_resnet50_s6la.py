r"""Mask R-CNN on COCO with ResNet-50 and S6LA.

    python -m experiments.train --config=configs/s6la/coco_mask_rcnn_resnet50_s6la.py --workdir=runs/mask_s6la \
        --config.weights=runs/resnet50_s6la

Not run by this project. An independent implementation: no settings and no numbers of S6LA's paper (arXiv:2502.10463)
are known here. The recipe is that of the plain network.
Other backbones: --config.model.backbone.name=resnet50_eca, or another that `ssm_jax.list_models("resnet50*")` has.
"""

from ml_collections import ConfigDict

from configs.common import coco


def get_config() -> ConfigDict:
    config = coco.mask_rcnn("resnet50_s6la")
    config.published.source = "not stated: S6LA's paper could not be read"
    return config
