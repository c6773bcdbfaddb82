"""Recipes for ImageNet-1k at 224 x 224, one function per family of networks.

Each takes the name of a network, as `ssm_jax.list_models` has it, and arguments of its constructor. Rates are those for
the batch size that is given here.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import classification


def resnet(name: str, **model: Any) -> ConfigDict:
    """RLANet's recipe (arXiv:2110.11852): SGD, 120 epochs, a tenth of the rate after every 30."""
    config = _common(name, model)
    config.augment.interpolation = config.eval.interpolation = "bilinear"  # torchvision's
    config.batch_size = 256
    config.epochs = 120.0
    config.optimizer.update(name="sgd", lr=0.1, ssm_lr=0.1, weight_decay=1e-4, decay_rule="all")
    config.optimizer.update(decay_epochs=(30.0, 60.0, 90.0), per_epoch=True)
    return config


def resnet_mrla(name: str, **model: Any) -> ConfigDict:
    """MRLA's recipe (arXiv:2302.03985): RLANet's for 100 epochs after 3 of warm-up, and a DropPath of 0.2 on MRLA."""
    config = resnet(name, aggregation={"drop_path": 0.2}, **model)
    config.epochs = 103.0
    config.optimizer.update(warmup_epochs=3.0, warmup_lr=1e-4, decay_epochs=(33.0, 63.0, 93.0))
    return config


def deit(name: str, **model: Any) -> ConfigDict:
    """DeiT's recipe (arXiv:2012.12877): AdamW 5e-4 x batch / 512, 300 epochs, averaged parameters."""
    config = _timm(name, {"drop_path": 0.1, **model}, rows_of_a_gpu=256)
    config.augment.repeats = 3
    config.batch_size = 1024
    config.epochs = 300.0
    config.optimizer.update(lr=1e-3, ssm_lr=1e-3, weight_decay=0.05, decay_rule="matrices", per_epoch=True)
    config.optimizer.update(warmup_epochs=5.0, warmup_lr=1e-6, warmup_prefix=False, end_lr=1e-5)
    config.ema_decay = 0.99996
    return config


def swin(name: str, *, drop_path: float, **model: Any) -> ConfigDict:
    """Swin's recipe (arXiv:2103.14030): AdamW 5e-4 x batch / 512, 300 epochs, 20 of warm-up, clipped gradients.

    The rates at the beginning, 5e-7, and at the end, 5e-6, are those for 512 images too, and are doubled here.
    """
    config = _timm(name, {"drop_path": drop_path, **model}, rows_of_a_gpu=128)
    config.batch_size = 1024
    config.epochs = 300.0
    config.optimizer.update(lr=1e-3, ssm_lr=1e-3, weight_decay=0.05, decay_rule="matrices", clip_norm=5.0)
    config.optimizer.update(warmup_epochs=20.0, warmup_lr=1e-6, warmup_prefix=False, end_lr=1e-5)
    return config


def pvt_v2(name: str, **model: Any) -> ConfigDict:
    """PVTv2's recipe (arXiv:2106.13797): DeiT's, but for the averaged parameters."""
    config = deit(name, **model)
    config.augment.mix_group = 128
    config.ema_decay = 0.0
    return config


def vit_s4nd(name: str, **model: Any) -> ConfigDict:
    """S4ND's recipe for ViT-B (arXiv:2210.06583, section 4.1, and its release)."""
    config = _s4nd(name, model, rows_of_a_gpu=128)
    config.batch_size = 1024
    config.optimizer.update(lr=1e-3, ssm_lr=1e-3, weight_decay=0.03, warmup_epochs=10.0)
    config.ema_decay = 0.99996
    return config


def convnext_s4nd(name: str, **model: Any) -> ConfigDict:
    """S4ND's recipe for ConvNeXt-T (arXiv:2210.06583, section 4.1, and its release)."""
    config = _s4nd(name, model, rows_of_a_gpu=240)
    config.batch_size, config.accumulate = 3840, 2
    config.optimizer.update(lr=4e-3, ssm_lr=1e-3, weight_decay=0.05, warmup_epochs=20.0)
    return config


def _s4nd(name: str, model: dict[str, Any], *, rows_of_a_gpu: int) -> ConfigDict:
    """A cosine of 300 epochs from the beginning of the warm-up on, and 10 epochs more at its end."""
    config = _timm(name, {"drop_path": 0.1, **model}, rows_of_a_gpu)
    config.seed = 1112
    config.augment.update(interpolation="random", repeats=3)
    config.epochs = 310.0
    config.optimizer.update(warmup_lr=1e-6, warmup_prefix=False, cosine_epochs=300.0, end_lr=1e-5, per_epoch=True)
    config.double_label_smoothing = True
    config.eval.crop_pct = 0.9
    return config


def _timm(name: str, model: dict[str, Any], rows_of_a_gpu: int) -> ConfigDict:
    """What all transformers and ConvNeXt are trained with; timm leaves colour jitter out beside RandAugment."""
    config = _common(name, model)
    config.dtype = "bfloat16"
    config.augment.update(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25)
    config.augment.update(mixup=0.8, cutmix=1.0, mix_group=rows_of_a_gpu)
    config.label_smoothing = 0.1
    return config


def _common(name: str, model: dict[str, Any]) -> ConfigDict:
    config = classification.get_config()
    config.model = {"name": name, **model}
    config.data.name = "imagenet2012"
    config.augment.update(crop_scale=(0.08, 1.0), flip=True)
    config.eval.update(crop_pct=0.875, batch_size=1024)  # of 256 pixels
    config.log_every_steps = 100
    config.published.metric = "top-1"
    return config
