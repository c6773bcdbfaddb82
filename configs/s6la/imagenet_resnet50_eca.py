r"""ResNet-50 on ImageNet with ECA.

    python -m experiments.train --config=configs/s6la/imagenet_resnet50_eca.py --workdir=runs/resnet50_eca

Not run by this project. The recipe is RLANet's, for a fair comparison; ECANet's own is another.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet("resnet50_eca")
    config.published.update(value=77.48, source="ECANet's README")
    return config
