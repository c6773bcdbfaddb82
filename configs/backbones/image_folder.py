r"""A small network of each family on an image folder of small pictures: train/CLASS/*.JPEG, val/CLASS/*.JPEG.

    python -m experiments.train --config=configs/backbones/image_folder.py:swin --workdir=runs/swin \
        --config.data.dir=FOLDER

Families: resnet, vit, deit, swin, pvt_v2, convnext, convnext_s4nd, vit_s4nd. For 64 x 64 pixels, on a CPU; no recipe
of a paper.
"""

from ml_collections import ConfigDict

from configs.common import classification

SIZE = 64
FAMILIES = {
    "resnet": {"name": "resnet50", "depths": (1, 1, 2, 1), "dims": (32, 64, 128, 256)},
    "vit": {"name": "vit_base", "img_size": SIZE, "patch_size": 8, "d_model": 96, "depth": 4, "num_heads": 3},
    "deit": {"name": "deit_tiny_distilled", "img_size": SIZE, "patch_size": 8, "d_model": 96, "depth": 4},
    "swin": {
        "name": "swin_tiny",
        "img_size": SIZE,
        "patch_size": 2,
        "d_model": 32,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 8),
        "window_size": 4,
    },
    "pvt_v2": {"name": "pvt_v2_b0", "depths": (1, 1, 2, 1)},
    "convnext": {"name": "convnext_tiny", "img_size": SIZE, "depths": (1, 1, 3, 1), "dims": (32, 64, 128, 256)},
    "convnext_s4nd": {
        "name": "convnext_tiny_s4nd",
        "img_size": SIZE,
        "depths": (1, 1, 3, 1),
        "dims": (32, 64, 128, 256),
        "mixer": {"d_state": 16, "bandlimit": 0.5},
    },
    "vit_s4nd": {
        "name": "vit_base_s4nd",
        "img_size": SIZE,
        "patch_size": 8,
        "d_model": 96,
        "depth": 4,
        "mixer": {"d_state": 16},
    },
}
VARIANTS = tuple(FAMILIES)


def get_config(family: str = "") -> ConfigDict:
    if family not in FAMILIES:
        raise ValueError(
            "--config=configs/backbones/image_folder.py:FAMILY needs a FAMILY of "
            f"{', '.join(FAMILIES)}, got {family!r}."
        )
    config = classification.get_config()
    config.model = FAMILIES[family] | {"drop_path": 0.1}
    config.data.update(name="image_folder", image_size=SIZE)
    config.augment.update(crop_padding=4, flip=True)
    config.batch_size = 50
    config.epochs = 10.0
    config.optimizer.update(lr=1e-3, ssm_lr=1e-3, weight_decay=0.05, warmup_epochs=0.5)
    config.label_smoothing = 0.1
    config.eval.update(every_epochs=1.0, batch_size=100)
    config.log_every_steps = 20
    return config
