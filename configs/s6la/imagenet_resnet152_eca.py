r"""ResNet-152 on ImageNet with ECA.

    python -m experiments.train --config=configs/s6la/imagenet_resnet152_eca.py --workdir=runs/resnet152_eca

Not run by this project. The recipe is RLANet's, for a fair comparison; ECANet's own is another.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.resnet("resnet152_eca")
    config.published.update(value=78.92, source="ECANet's README")
    return config
