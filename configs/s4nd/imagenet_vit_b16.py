r"""ViT-B/16 on ImageNet, the baseline of ViT-S4ND (S4ND, arXiv:2210.06583, section 4.1).

    python -m experiments.train --config=configs/s4nd/imagenet_vit_b16.py --workdir=runs/vit_b16

Not run by this project. The weight decay is that of the release's README; its config has 0.05.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.vit_s4nd("vit_base")
    config.published.update(value=78.9, source="S4ND's abstract")
    return config
