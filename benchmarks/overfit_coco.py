r"""Whether detectors learn: Mask R-CNN is trained on few images, and scored on the same.

    python -m benchmarks.overfit_coco --data=FOLDER --workdir=runs/overfit_coco [--epochs=160] [--size=256]

FOLDER is a small COCO as it is unpacked, with annotations and train2017/. This is a run of configs/s6la's Mask R-CNN on
its training images at `--size`, but with ResNet-18 and S6LA and narrow heads, by AdamW from random parameters: batch
norms are trained, nothing is frozen or flipped. It goes through all that a run on COCO does: reading, training,
evaluation by pycocotools. Fails if box AP is not above 0.5 and mask AP above 0.4 at the end. Started again, it goes on.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from configs.s6la import coco_mask_rcnn_resnet50_s6la
from experiments.train import train, workdir_flag

DATA = flags.DEFINE_string("data", None, "A small COCO.", required=True)
EPOCHS = flags.DEFINE_float("epochs", 160.0, "Times that each image is seen.")
SIZE = flags.DEFINE_integer("size", 256, "Longer side of the images.")

BOX_AP, MASK_AP = 0.5, 0.4
"""What is to be reached."""


def trained_alone(data: Path, folder: Path) -> Path:
    """A COCO whose images for evaluation are those for training: links to `data` in `folder`."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        links = {
            folder / f"{split}2017": data / "train2017",
            folder / "annotations" / f"instances_{split}2017.json": data / "annotations/instances_train2017.json",
        }
        for link, target in links.items():
            if not link.is_symlink():
                link.symlink_to(target.resolve())
    return folder


def main(_: list[str]) -> None:
    """Trains, and fails if the scores are too low."""
    logging.set_verbosity(logging.WARNING)
    config = coco_mask_rcnn_resnet50_s6la.get_config()
    epochs = EPOCHS.value
    with config.unlocked():
        config.model.backbone = {"name": "resnet18_s6la", "norm_eval": False}
        config.model.fpn, config.model.box = {"out_channels": 64}, {"samples": 64}
        config.model.mask = {"widths": (64, 64, 64, 64), "width": 64}
        config.data.dir = str(trained_alone(Path(DATA.value), Path(workdir_flag.value + "_data")))
        config.data.sides = (SIZE.value, SIZE.value)
        config.batch_size = config.eval.batch_size = 4
        config.augment.flip = False
        config.epochs = epochs
        config.optimizer.update(name="adamw", lr=1e-3, ssm_lr=1e-3, clip_norm=10.0, frozen=())
        config.optimizer.update(warmup_epochs=10.0, warmup_lr=1e-5, decay_epochs=())
        config.eval.every_epochs = config.checkpoint_every_epochs = epochs / 8
    scores = train(config, workdir_flag.value)[SIZE.value]
    print(f"on the training images: box AP {scores['bbox_AP']:.3f}, mask AP {scores['segm_AP']:.3f}")
    if not (scores["bbox_AP"] > BOX_AP and scores["segm_AP"] > MASK_AP):
        sys.exit(f"error: box AP is to be above {BOX_AP}, mask AP above {MASK_AP}")


if __name__ == "__main__":
    app.run(main)
