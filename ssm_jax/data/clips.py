"""From video files to clips of one size: random for training, in the middle for evaluation; on the host.

Clips are what pytorchvideo's samplers and its `create_video_transform` make of a video, but for the resizing, which is
Pillow's: bilinear, with antialiasing, of 8-bit images. Where a video is enlarged, as all of HMDB-51's are, the two
agree up to rounding; where it is made smaller, torch leaves pixels out.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from etils import epath
from PIL import Image, ImageOps

from ssm_jax.data.augment import center_crop
from ssm_jax.data.decode import BrokenExampleError, label_array
from ssm_jax.data.rand_augment import RandAugment

_BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True, kw_only=True)
class ClipAugment:
    """The training transform: a clip from anywhere in the video, RandAugment, resizing, a crop, a mirror image.

    All that is random is drawn once per clip and is the same in each of its frames.

    Args:
        frames: of the result.
        seconds: that the clip lasts; its start is uniform over all that leave it in the video.
        size: height and width of the result.
        short_side: least and greatest length, in pixels and both possible, of the shorter side before the crop.
        flip: mirrors every second clip, on average, left to right.
        rand_augment: a policy in timm's notation, such as "rand-m7-n1"; see `RandAugment`. It is applied to frames of
            the file's size. "": none.
        fill: colour that RandAugment gives to places outside of the image, 0 .. 255; by default HMDB-51's mean.

    Raises:
        ValueError: beginning with the field's name.
    """

    frames: int
    seconds: float
    size: int = 224
    short_side: tuple[int, int] = (256, 320)
    flip: bool = False
    rand_augment: str = ""
    fill: tuple[int, ...] = (110, 101, 96)

    def __post_init__(self):
        check_positive(frames=self.frames, seconds=self.seconds, size=self.size)
        if len(self.short_side) != 2 or not self.size <= self.short_side[0] <= self.short_side[1]:
            raise ValueError(
                f"short_side must be (low, high) with size={self.size} <= low <= high, got {self.short_side}."
            )
        if self.rand_augment:
            RandAugment(self.rand_augment, self.fill)

    def __call__(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Decodes and augments a clip.

        Args:
            example: `video`, a file's path, and `label`.
            rng: all randomness is taken from it.

        Returns:
            `image`, (frames, size, size, 3) uint8, and `label`, int32.

        Raises:
            BrokenExampleError: if the video cannot be decoded where the clip is.
        """
        start = rng.uniform(0, max(0, video_duration(example["video"]) - self.seconds))
        images = decode_clip(example["video"], start, self.seconds, self.frames)
        if self.rand_augment:
            augment = RandAugment(self.rand_augment, self.fill, "bilinear").draw(rng)
            images = [augment(image) for image in images]
        shorter = int(rng.integers(self.short_side[0], self.short_side[1] + 1))
        width, height = (shorter * side // min(images[0].size) for side in images[0].size)
        left, top = int(rng.integers(width - self.size + 1)), int(rng.integers(height - self.size + 1))
        box = (left, top, left + self.size, top + self.size)
        images = [_resized_crop(image, width, height, box) for image in images]
        if self.flip and rng.integers(2):
            images = [ImageOps.mirror(image) for image in images]
        return {"image": _stacked(images), "label": label_array(example["label"])}


@dataclass(frozen=True, kw_only=True)
class ClipCenter:
    """The evaluation transform: the middle of each frame of a given clip, resized.

    Args:
        frames: of the result.
        seconds: that the clip lasts.
        size: height and width of the result.
        short_side: length, in pixels, of the shorter side before the crop.

    Raises:
        ValueError: beginning with the field's name.
    """

    frames: int
    seconds: float
    size: int = 224
    short_side: int = 256

    def __post_init__(self):
        check_positive(frames=self.frames, seconds=self.seconds, size=self.size)
        if self.short_side < self.size:
            raise ValueError(f"short_side must be at least size={self.size}, got {self.short_side}.")

    def __call__(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """Decodes and cuts a clip that begins at `start`, in seconds; the rest is as for `ClipAugment`."""
        images = decode_clip(example["video"], example["start"], self.seconds, self.frames)
        images = [center_crop(image, self.short_side, self.size, _BILINEAR) for image in images]
        return {"image": _stacked(images), "label": label_array(example["label"])}


def decode_clip(path: str, start: float, seconds: float, frames: int) -> list[Image.Image]:
    """Decodes a clip and chooses `frames` of its n frames: the i-th is number floor(i (n - 1) / (frames - 1)).

    A frame is in the clip if it is first shown at or after `start` and before `start + seconds`; time 0 is that of
    the file's first frame. Where the video ends earlier, n is smaller and frames are repeated if they are too few.
    A file that is cut short, or damaged somewhere, has the frames before that place.

    Args:
        path: of a video file, in any of FFmpeg's formats.
        start: of the clip, in seconds, to the microsecond.
        seconds: that the clip lasts.
        frames: of the result.

    Returns:
        Images of mode "RGB"; repeated ones are the same object. Rotation in a file's header is ignored.

    Raises:
        BrokenExampleError: if there is no frame in the clip.
        OSError: if the file cannot be opened.
    """
    with _opened(path) as video:
        window = _frames_between(video, start, start + seconds)
        if not window:
            raise BrokenExampleError(f"{path} cannot be decoded from {start:g} s to {start + seconds:g} s.")
        chosen = [i * (len(window) - 1) // max(frames - 1, 1) for i in range(frames)]
        # PyAV's default, a thread per core, takes several times as long for frames this small.
        convert = functools.partial(VideoReformatter().reformat, format="rgb24", threads=1)
        images = {i: Image.fromarray(convert(window[i]).to_ndarray()) for i in set(chosen)}
    return [images[i] for i in chosen]


def video_duration(path: str) -> float:
    """The length of a video in seconds as the file's header has it, or 0 where it has none.

    Raises:
        BrokenExampleError: if the file is no video.
        OSError: if the file cannot be opened.
    """
    with _opened(path) as video:
        stream = video.streams.video[0]
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return (video.duration or 0) / av.time_base


def uniform_clip_starts(duration: float, seconds: float) -> list[float]:
    """The starts of consecutive clips that fit into a video, and 0 if none does: what is left over is in no clip.

    As pytorchvideo's UniformClipSampler, with its tolerance of a microsecond.
    """
    return [i * seconds for i in range(max(1, math.floor((duration + 1e-6) / seconds)))]


def check_positive(**values: int | float) -> None:
    """Raises ValueError, beginning with the name of one that is not positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[InputContainer]:
    """A file with a video in it, to be decoded in the caller's thread; FFmpeg's errors become ours."""
    with epath.Path(path).open("rb") as file:
        try:
            with av.open(file, "r") as video:
                if not video.streams.video:
                    raise BrokenExampleError(f"{path} has no video in it.")
                video.streams.video[0].codec_context.thread_count = 1
                yield video
        except av.FFmpegError as error:
            raise BrokenExampleError(f"{path} cannot be decoded: {error}") from error


def _frames_between(video: InputContainer, start: float, end: float) -> list[av.VideoFrame]:
    """The frames from `start` to before `end`, in seconds; as decoded, so mostly of 1.5 bytes a pixel."""
    # Not the header's: timestamps of .avi files are off where frames are stored in another order than shown in.
    zero = next((pts for pts, _ in _decoded(video)), None)
    if zero is None:
        return []
    stream = video.streams.video[0]
    time_base: Any = stream.time_base

    def timestamp(time: float) -> int:
        return zero + math.ceil(Fraction(time).limit_denominator(10**6) / time_base)

    # Some formats find a key frame by when it is decoded. One that is decoded before `start` and shown after it is of
    # no use for the frames between the two: for these it has to be the key frame before.
    begin, stop, first = timestamp(start), timestamp(end), stream.start_time or 0
    head, frames = None, iter(())
    for target in (begin, timestamp(start - 1), first):
        frames = _decoded(video, max(first, target))
        head = next(frames, None)
        if head is not None and head[0] <= begin:
            break
    frames = itertools.chain([head] if head else [], frames)
    window = itertools.takewhile(lambda shown: shown[0] < stop, frames)
    return [frame for pts, frame in window if pts >= begin]


def _decoded(video: InputContainer, start: int | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
    """Timestamps and frames as they are shown, from the last key frame up to `start` on, to the end or to a damage."""
    with contextlib.suppress(av.FFmpegError):
        if start is not None:
            video.seek(start, stream=video.streams.video[0])
        for frame in video.decode(video.streams.video[0]):
            if frame.pts is not None:
                yield frame.pts, frame


def _resized_crop(image: Image.Image, width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """`image.resize((width, height)).crop(box)`, bilinear, in two thirds of the time: Pillow does one axis first."""
    left, top, right, bottom = box
    columns = image.resize((width, image.height), _BILINEAR).crop((left, 0, right, image.height))
    return columns.resize((right - left, height), _BILINEAR).crop((0, top, right - left, bottom))


def _stacked(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])
