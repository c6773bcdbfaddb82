r"""ConvNeXt-T on ImageNet, the baseline of S4ND-ConvNeXt-T (S4ND, arXiv:2210.06583, section 4.1).

    python -m experiments.train --config=configs/s4nd/imagenet_convnext.py --workdir=runs/convnext

Not run by this project. The recipe is that of S4ND's release; ConvNeXt's own is another, with averaged parameters.
"""

from ml_collections import ConfigDict

from configs.common import imagenet


def get_config() -> ConfigDict:
    config = imagenet.convnext_s4nd("convnext_tiny")
    config.published.update(value=82.1, source="VMamba's table")
    return config
