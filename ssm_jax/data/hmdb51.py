"""HMDB-51 (Kuehne et al., ICCV 2011), as it is unpacked, and sources of videos and of their clips."""

import concurrent.futures
import functools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from ssm_jax.data.clips import check_positive, uniform_clip_starts, video_duration
from ssm_jax.data.datasets import Dataset, outline
from ssm_jax.data.decode import BrokenExampleError

_SPLITS = "testTrainMulti_7030_splits"
_HOME = (
    "HMDB-51 is at https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/: videos as "
    f"hmdb51_org.rar, an archive of one archive per class, and {_SPLITS} as test_train_splits.rar."
)


@dataclass(frozen=True)
class Videos:
    """Video files with a label each: `video`, the path, and `label`."""

    files: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.files[index]
        return {"video": path, "label": label}

    def name(self, index: int) -> str:
        """The file's path."""
        return self.files[index][0]


@dataclass(frozen=True)
class UniformClips:
    """All clips of `seconds` of all videos, one after the other: `video`, `start` in seconds, and `label`.

    How many there are is in the headers of the files, which are read when first needed, and once: copies for other
    processes have the answer. What is left of a video at its end is in no clip, but every video has one; so have those
    whose headers cannot be read, for the reader of the clip to find out about them.
    """

    files: tuple[tuple[str, int], ...]
    seconds: float

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        video, start = self._clips[index]
        path, label = self.files[video]
        return {"video": path, "start": start, "label": label}

    def name(self, index: int) -> str:
        """The file's path and the time."""
        video, start = self._clips[index]
        return f"{self.files[video][0]} at {start:g} s"

    @property
    def groups(self) -> np.ndarray:
        """The video's number for each clip, (clips,) of int64: predictions are averaged over those of one video."""
        return np.array([video for video, _ in self._clips])

    @functools.cached_property
    def _clips(self) -> list[tuple[int, float]]:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            durations = pool.map(_duration, [path for path, _ in self.files])
            return [
                (video, start)
                for video, duration in enumerate(durations)
                for start in uniform_clip_starts(duration, self.seconds)
            ]


def hmdb51(
    dir: str | None = None, image_size: int | None = None, *, fold: int = 1, frames: int = 30, seconds: float = 2.0
) -> Dataset:
    """HMDB-51: 6,766 videos of 51 actions, or videos of any other classes laid out like it.

    `dir` (by default ~/hmdb51) has `CLASS/*.avi`, itself or in `videos/`, and
    `testTrainMulti_7030_splits/CLASS_test_split{1,2,3}.txt`, with lines of a file's name and 1 (train), 2 (test) or 0
    (unused). Classes are those that have such files. `train` is of whole videos, `val` and `test` are the same: all
    clips of the videos for testing, in their order.

    Args:
        dir: the folder.
        image_size: height and width of a clip for the model; 224 by default.
        fold: 1, 2 or 3, the split's number.
        frames: of a clip, for the model.
        seconds: that a clip lasts.

    Raises:
        ValueError: beginning with the name of the argument, if files are missing or the argument cannot be.
    """
    if fold not in (1, 2, 3):
        raise ValueError(f"fold must be 1, 2 or 3, got {fold}.")
    known = outline("hmdb51")
    check_positive(frames=frames, seconds=seconds)
    root = epath.Path(dir or "~/hmdb51").expanduser()
    classes = _classes(root, fold)
    folders = _class_folders(root, classes)
    lists = [_listed(root / _SPLITS / f"{name}_test_split{fold}.txt") for name in classes]
    _check_files(folders, lists)

    def files(mark: int) -> tuple[tuple[str, int], ...]:
        return tuple(
            (str(folder / name), label)
            for label, (folder, videos) in enumerate(zip(folders, lists, strict=True))
            for name, marked in videos
            if marked == mark
        )

    clips = UniformClips(files(2), seconds)
    title = f"{known.title if len(classes) == known.classes else root.name}, split {fold}"
    splits = {"train": Videos(files(1)), "val": clips, "test": clips}
    return known.dataset(splits, classes, image_size=image_size, title=title, frames=frames)


def _duration(path: str) -> float:
    """In seconds; 0 if the file's header cannot be read."""
    try:
        return video_duration(path)
    except BrokenExampleError:
        return 0.0


def _classes(root: epath.Path, fold: int) -> tuple[str, ...]:
    """Names of all classes with a file for any of the splits, after checking that all have one for this."""
    folder = root / _SPLITS
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    matches = [re.fullmatch(r"(.+)_test_split[123]\.txt", name) for name in names]
    classes = tuple(sorted({match[1] for match in matches if match}))
    if absent := [name for name in classes if f"{name}_test_split{fold}.txt" not in names]:
        raise ValueError(f"fold={fold} has no file {folder}/{absent[0]}_test_split{fold}.txt. {_HOME}")
    if not classes:
        raise ValueError(
            f"dir holds no splits of HMDB-51: looked for {folder}/CLASS_test_split{fold}.txt.{_packed(root)} {_HOME}"
        )
    return classes


def _class_folders(root: epath.Path, classes: tuple[str, ...]) -> list[epath.Path]:
    """The folder of each class, in `videos` or where that is."""
    folders = []
    for name in classes:
        places = [place for place in (root / "videos" / name, root / name) if place.is_dir()]
        if not places:
            raise ValueError(
                f"dir holds no videos of class {name}: looked for {root}/videos/{name} and {root}/{name}."
                f"{_packed(root)} {_HOME}"
            )
        folders.append(places[0])
    return folders


def _packed(root: epath.Path) -> str:
    """What to do where archives are still packed, if any are."""
    archives = [path for folder in (root / "videos", root) for path in sorted(folder.glob("*.rar"))]
    if not archives:
        return ""
    return f' There is {archives[0]}: unpack all .rar files, as in `for f in *.rar; do unrar x "$f"; done`.'


def _listed(path: epath.Path) -> list[tuple[str, int]]:
    """File names and marks 0 (unused), 1 (train) or 2 (test)."""
    videos = []
    for number, line in enumerate(path.read_text().rstrip().splitlines(), start=1):
        name, _, mark = line.strip().rpartition(" ")
        if mark not in ("0", "1", "2") or not name:
            raise ValueError(f"dir has lines other than 'NAME.avi 0|1|2': line {number} of {path} is {line!r}.")
        videos.append((name.strip(), int(mark)))
    return videos


def _check_files(folders: list[epath.Path], lists: list[list[tuple[str, int]]]) -> None:
    """Raises ValueError if videos for training or testing are not where they should be."""
    absent, total = [], 0
    for folder, videos in zip(folders, lists, strict=True):
        there = {path.name for path in folder.iterdir()}
        used = [name for name, mark in videos if mark]
        total += len(used)
        absent += [folder / name for name in used if name not in there]
    if absent:
        raise ValueError(
            f"dir lacks {len(absent)} of the {total} videos of the split; the first is {absent[0]}. {_HOME}"
        )
