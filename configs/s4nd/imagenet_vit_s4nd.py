r"""ViT-B with S4ND over the sequence of patches on ImageNet (S4ND, arXiv:2210.06583, section 4.1).

    python -m experiments.train --config=configs/s4nd/imagenet_vit_s4nd.py --workdir=runs/vit_s4nd

Not run by this project. 88,786,408 parameters, the paper's 88.8 M.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.vit_s4nd("vit_base_s4nd")
    config.published.update(value=80.4, source="S4ND's abstract")
    return config
