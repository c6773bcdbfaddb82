"""Small datasets in the layouts of the real ones: as many classes, images of their sizes, and a few examples."""

import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

_TRAIN, _EVAL = 8, 4  # examples; a run that needs more gets them again


def make(name: str, folder: Path) -> Path:
    """Writes the stand-in of a dataset into `folder`, which is then its `data.dir`."""
    if name in _FOLDERS:
        return _FOLDERS[name](folder)
    size, encoding, labels, evaluation = _PREPARED[name]
    shape = (None, None, 3) if name == "imagenet2012" else (*size, 3)
    image = tfds.features.Image(shape=shape, encoding_format=encoding)
    counts = {"train": _TRAIN, **dict.fromkeys(evaluation, _EVAL)}
    prepare(
        folder,
        name,
        tfds.features.FeaturesDict({"image": image, **labels}),
        {
            split: [{"image": file, **_label(labels, i)} for i, file in enumerate(_files(count, size, encoding))]
            for split, count in counts.items()
        },
    )
    return folder


def prepare(folder: Path, name: str, features: Any, splits: Mapping[str, list[dict[str, Any]]]) -> None:
    """Writes examples as TensorFlow Datasets prepares a dataset of this name."""
    with tfds.core.registered.skip_registration():

        class StandIn(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("3.0.2")
            pkg_dir_path = folder

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {split: enumerate(examples) for split, examples in splits.items()}

            def _generate_examples(self):
                raise NotImplementedError

        StandIn.name = name

    StandIn(data_dir=str(folder), file_format="array_record").download_and_prepare()


_ATTRIBUTES = {f"attribute {i}": tfds.features.Scalar(np.bool_) for i in range(40)}

_PREPARED: dict[str, tuple[tuple[int, int], str, dict[str, Any], list[str]]] = {
    "celeb_a": ((218, 178), "jpeg", {"attributes": _ATTRIBUTES}, ["validation", "test"]),
    "cifar10": ((32, 32), "png", {"label": tfds.features.ClassLabel(num_classes=10)}, ["test"]),
    "imagenet2012": ((240, 320), "jpeg", {"label": tfds.features.ClassLabel(num_classes=1000)}, ["validation"]),
}
"""Height and width, encoding, labels, and splits besides `train`."""


def _label(labels: Mapping[str, Any], i: int) -> dict[str, Any]:
    if "label" in labels:
        return {"label": i % labels["label"].num_classes}
    return {"attributes": {name: (i + j) % 3 == 0 for j, name in enumerate(_ATTRIBUTES)}}


def _files(count: int, size: tuple[int, int], encoding: str) -> Iterator[io.BytesIO]:
    """Images of noise, encoded."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(file, encoding)
        file.seek(0)
        yield file


def _image_folder(root: Path) -> Path:
    for split, name in itertools.product(("train", "val"), ("cat", "dog")):
        (root / split / name).mkdir(parents=True)
        for i, file in enumerate(_files(_EVAL, (64, 64), "png")):
            (root / split / name / f"{i}.png").write_bytes(file.getvalue())
    return root


def _coco(root: Path) -> Path:
    """Two objects in each image."""
    (root / "annotations").mkdir()
    for split, count in (("train", _TRAIN), ("val", _EVAL)):
        (root / f"{split}2017").mkdir()
        for i, file in enumerate(_files(count, (120, 160), "jpeg")):
            (root / f"{split}2017" / f"{i}.jpg").write_bytes(file.getvalue())
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "height": 120, "width": 160} for i in range(count)],
            "categories": [{"id": i, "name": f"category {i}"} for i in range(80)],
            "annotations": [
                {
                    "id": i,
                    "image_id": i // 2,
                    "category_id": i,
                    "bbox": [10.0, 10.0, 20.0, 20.0],
                    "segmentation": [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0]],
                    "area": 200.0,
                    "iscrowd": 0,
                }
                for i in range(2 * count)
            ],
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def _hmdb51(root: Path) -> Path:
    """One video of 2.4 seconds, under two names in each class."""
    splits = root / "testTrainMulti_7030_splits"
    splits.mkdir(parents=True)
    video = root / "video.avi"
    rng = np.random.default_rng(0)
    with av.open(str(video), "w") as file:
        stream = file.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(72):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), np.uint8), "rgb24")))
        file.mux(stream.encode(None))
    for i in range(51):
        (root / "videos" / f"action_{i:02}").mkdir(parents=True)
        for name in ("train", "test"):
            (root / "videos" / f"action_{i:02}" / f"{name}.avi").hardlink_to(video)
        (splits / f"action_{i:02}_test_split1.txt").write_text("train.avi 1\ntest.avi 2\n")
    return root


_FOLDERS = {"coco": _coco, "hmdb51": _hmdb51, "image_folder": _image_folder}
"""What writes those that are not prepared by TensorFlow Datasets."""
