r"""S4ND-ConvNeXt-3D on HMDB-51, split 1 (S4ND, section 4.2).

    python -m experiments.train --config=configs/s4nd/hmdb51_s4nd.py --workdir=runs/hmdb51_s4nd \
        --config.weights=FILE

Not run by this project. FILE has the weights of the network over images trained on ImageNet, which are inflated. The
authors' are not released; without `weights` the network starts at random, which is another experiment.
RandAugment is as strong as in the authors' command.
"""

from ml_collections import ConfigDict

from configs.common import hmdb51


def get_config() -> ConfigDict:
    config = hmdb51.convnext("convnext_tiny_3d_s4nd", rand_augment="rand-m7-mstd0.5-n1")
    config.published.update(value=62.1, source="S4ND's paper; recalled, not verified")
    return config
