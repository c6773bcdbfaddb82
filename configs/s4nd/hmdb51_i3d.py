r"""ConvNeXt-I3D, ConvNeXt-T with convolutions over space and time, on HMDB-51, split 1 (S4ND, section 4.2).

    python -m experiments.train --config=configs/s4nd/hmdb51_i3d.py --workdir=runs/hmdb51_i3d \
        --config.weights=FILE

Not run by this project. FILE has the weights of the network over images trained on ImageNet, which are inflated. The
authors' are not released; without `weights` the network starts at random, which is another experiment.
RandAugment is as strong as in the authors' command.
"""

from ml_collections import ConfigDict

from configs.common import hmdb51


def get_config() -> ConfigDict:
    config = hmdb51.convnext("convnext_tiny_i3d", rand_augment="rand-m5-mstd0.5-n1")
    config.published.update(value=58.1, source="S4ND's paper; recalled, not verified")
    return config
