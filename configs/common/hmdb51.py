"""S4ND's recipe for HMDB-51 (arXiv:2210.06583, section 4.2, and its release): networks inflated from ImageNet's."""

from typing import Any

from ml_collections import ConfigDict

from configs.common import classification


def convnext(name: str, *, rand_augment: str, **model: Any) -> ConfigDict:
    """A ConvNeXt-T over clips of 2 seconds, 30 frames of 224 x 224."""
    config = classification.get_config()
    config.seed = 1112
    config.dtype = "bfloat16"
    config.model = {"name": name, "drop_path": 0.2, "head_dropout": 0.2, **model}
    config.data.update(name="hmdb51", fold=1, frames=30, seconds=2.0)
    config.augment.update(flip=True, rand_augment=rand_augment)
    config.batch_size, config.accumulate = 64, 2
    config.epochs = 50.0
    config.optimizer.update(lr=1e-4, ssm_lr=1e-4, weight_decay=0.2, per_epoch=True)
    config.eval.batch_size = 32
    config.log_every_steps = 10
    config.published.metric = "video accuracy"
    return config
