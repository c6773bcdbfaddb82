r"""S4ND in a small ConvNeXt and a small ViT, against both without it, on 20 classes of ImageNet at 64 x 64.

    python -m experiments.sweep --config=configs/sweeps/tiny_imagenet.py --config.data_dir=FOLDER

FOLDER has `tiny_imagenet20/` as TensorFlow Datasets prepares it. The paper's networks (S4ND, section 4.1) are
configs/s4nd/imagenet_*.py. What comes after a colon are the tables, `convnext`, `vit` or both, with a comma between.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import classification, sweeps

CONVNEXT = {"img_size": 64, "depths": (1, 1, 2, 1), "dims": (32, 64, 128, 256)}
VIT = {"img_size": 64, "patch_size": 8, "d_model": 96, "depth": 4}


def get_config(argument: str = "convnext,vit") -> ConfigDict:
    chosen = argument.split(",")
    convnext = {
        "convnext": sweeps.row("ConvNeXt-M", run("convnext_micro", **CONVNEXT, sizes=(32, 48, 64))),
        "s4nd": sweeps.row("S4ND-ConvNeXt-M", run("convnext_micro_s4nd", **CONVNEXT, sizes=(32, 48, 64))),
    }
    vit = {
        "vit": sweeps.row("ViT", run("vit_base", **VIT, num_heads=3, epochs=6.0)),
        "s4nd": sweeps.row("ViT-S4ND", run("vit_base_s4nd", **VIT, epochs=6.0)),
    }
    of_convnext = "ConvNeXt-M with stages of 1, 1, 2, 1 blocks of width 32 to 256; also tested at lower resolutions."
    of_vit = "ViT with 4 blocks of width 96, patches of 8 x 8 pixels."
    tables = {
        "convnext": sweeps.table("ConvNeXt on tiny_imagenet20", of_convnext, convnext),
        "vit": sweeps.table("ViT on tiny_imagenet20", of_vit, vit),
    }
    if unknown := set(chosen) - set(tables):
        raise ValueError(
            f"--config=configs/sweeps/tiny_imagenet.py:TABLES takes any of {', '.join(tables)}, got "
            f"{', '.join(sorted(unknown))!r}."
        )
    return sweeps.sweep("s4nd", {name: table for name, table in tables.items() if name in chosen})


def run(name: str, *, epochs: float = 4.0, sizes: tuple[int, ...] = (), **model: Any) -> ConfigDict:
    """AdamW, random crops and mirror images; `sizes` are the further resolutions of a test."""
    config = classification.get_config()
    config.model = {"name": name, "drop_path": 0.1, **model}
    config.data.name = "tiny_imagenet20"
    config.augment.update(crop_padding=4, flip=True)
    config.batch_size = 50
    config.epochs = epochs
    config.optimizer.update(lr=1e-3, ssm_lr=1e-3, weight_decay=0.05, warmup_epochs=1.0)
    config.label_smoothing = 0.1
    config.eval.update(every_epochs=epochs / 4, batch_size=250, resolutions=sizes)
    config.checkpoint_every_epochs = epochs / 12
    config.log_every_steps = 100
    return config
