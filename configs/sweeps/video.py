r"""Small ConvNeXts over video, inflated from networks over images: I3D, S3D and S4ND (S4ND, section 4.2).

    python -m experiments.sweep --config=configs/sweeps/video.py --config.data_dir=FOLDER --config.video_dir=VIDEOS

FOLDER has `tiny_imagenet20/` as TensorFlow Datasets prepares it, on which a ConvNeXt and an S4ND-ConvNeXt are trained
first. VIDEOS is in HMDB-51's layout. Trained on 12 frames of 0.96 seconds, 12.5 a second, and tested on 24 too, 25
a second, which S4ND is told as the `rate` of its time axis. The paper has no such test. Its own size is
configs/s4nd/hmdb51_*.py.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.common import hmdb51, sweeps
from configs.sweeps import tiny_imagenet

NETWORK = {name: tiny_imagenet.CONVNEXT[name] for name in ("depths", "dims")}
IMAGES = {"convnext": {"name": "convnext_tiny"}, "s4nd": {"name": "convnext_tiny_s4nd", "stem": "patch"}}
VIDEO = {
    "i3d": ("I3D", "convnext_tiny_i3d", "convnext"),
    "s3d": ("S3D", "convnext_tiny_s3d", "convnext"),
    "s4nd": ("S4ND-3D", "convnext_tiny_3d_s4nd", "s4nd"),
}


def get_config() -> ConfigDict:
    before = {
        name: sweeps.row(
            network["name"],
            tiny_imagenet.run(epochs=3.0, **network, **tiny_imagenet.CONVNEXT, **mixer(network["name"])),
        )
        for name, network in IMAGES.items()
    }
    rows = {
        name: sweeps.row(label, videos(network), weights_of=f"images/{start}")
        for name, (label, network, start) in VIDEO.items()
    }
    size = "Stages of 1, 1, 2, 1 blocks of width 32 to 256"
    tables = {
        "images": sweeps.table("Networks over images, of which those over video are made", f"{size}.", before),
        "videos": sweeps.table(
            "Inflated ConvNeXts on video",
            f"{size}; trained on 12 frames of 48 x 48. Validation is on the test clips.",
            rows,
        ),
    }
    return sweeps.sweep("s4nd", tables)


def videos(name: str) -> ConfigDict:
    """The paper's recipe, of short training with a larger rate for few videos."""
    config = hmdb51.convnext(name, rand_augment="", img_size=(12, 48, 48), **NETWORK, **mixer(name))
    config.dtype = "float32"
    config.data.update(frames=12, seconds=0.96, image_size=48)
    config.augment.short_side = (48, 60)
    config.batch_size, config.accumulate = 8, 1
    config.epochs = 12.0
    config.optimizer.update(lr=3e-4, ssm_lr=3e-4, warmup_epochs=2.0)
    config.eval.update(every_epochs=4.0, short_side=48, batch_size=16, frames=(12, 24))
    config.checkpoint_every_epochs = 4.0
    return config


def mixer(name: str) -> dict[str, Any]:
    """Smaller state spaces than the paper's, where there are any."""
    return {"mixer": {"d_state": 16}} if name.endswith("s4nd") else {}
