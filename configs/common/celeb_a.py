"""S4ND's recipe for the 40 attributes of CelebA at 160 x 160 (arXiv:2210.06583, section 4.3, and its sweeps)."""

from typing import Any

from ml_collections import ConfigDict

from configs.common import classification

EPOCHS = 20.0


def convnext(name: str, *, resolution: int = 160, weight_decay: float, **model: Any) -> ConfigDict:
    """A ConvNeXt-M trained at `resolution` and tested at 64, 128 and 160, all from images of 160 x 160."""
    config = classification.get_config()
    config.dtype = "bfloat16"
    config.model = {"name": name, "drop_path": 0.1, **model}
    config.data.update(name="celeb_a", image_size=160)
    if resolution < 160:
        config.data.resolution = resolution
    config.batch_size = 256 if resolution < 160 else 128  # as much as their GPUs held
    config.epochs = EPOCHS
    config.optimizer.update(lr=4e-3, ssm_lr=1e-3, weight_decay=weight_decay)
    config.optimizer.warmup_epochs = 500 * config.batch_size / 162_770  # 500 steps
    config.eval.update(batch_size=512, resolutions=(64, 128, 160))
    config.published.metric = "mean accuracy"
    return config
