r"""Which of COCO's 80 categories are in a photo: a small ConvNeXt with S4ND, as a test of data with many labels.

    python -m experiments.train --config=configs/backbones/coco.py --workdir=runs/coco --config.data.dir=FOLDER

FOLDER has annotations/instances_{train,val}2017.json, train2017/ and val2017/. No recipe of a paper.
"""

from ml_collections import ConfigDict

from configs.common import classification

SIZE = 128


def get_config() -> ConfigDict:
    config = classification.get_config()
    config.model = {
        "name": "convnext_tiny_s4nd",
        "img_size": SIZE,
        "depths": (2, 2, 6, 2),
        "dims": (48, 96, 192, 384),
        "mixer": {"d_state": 16, "bandlimit": 0.5},
        "drop_path": 0.1,
    }
    config.data.update(name="coco", image_size=SIZE)
    config.augment.update(crop_scale=(0.25, 1.0), flip=True, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25)
    config.batch_size = 256
    config.epochs = 60.0
    config.optimizer.update(lr=1e-3, ssm_lr=1e-3, weight_decay=0.05, warmup_epochs=3.0, decay_rule="matrices")
    config.ema_decay, config.ema_warmup = 0.999, True
    config.eval.update(every_epochs=1.0, batch_size=256)
    return config
