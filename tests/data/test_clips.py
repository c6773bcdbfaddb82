import contextlib
import dataclasses
import math
import pickle
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from ssm_jax.data.clips import ClipAugment, ClipCenter, decode_clip, uniform_clip_starts, video_duration
from ssm_jax.data.decode import BrokenExampleError

FRAMES = 60
NTSC = Fraction(30000, 1001)
BILINEAR = Image.Resampling.BILINEAR

VIDEOS = {
    "film.avi": ("mpeg4", 25, 0),
    "camera.avi": ("mpeg4", 30, 0),
    "ntsc.avi": ("mpeg4", NTSC, 0),
    # "bidirectional": the order that frames are stored in is not the one that they are shown in
    "bidirectional.avi": ("mpeg4", 25, 2),
    "bidirectional.mp4": ("mpeg4", 25, 2),
    "h264.mp4": ("libx264", 30, 3),
}


def write(path, codec, rate, pictures, bidirectional=0, pixels="yuv420p"):
    """Writes (h, w, 3) uint8 pictures as a video, a key frame at least every twelfth."""
    with av.open(path, "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = pixels, 800_000
        context = stream.codec_context
        context.gop_size, context.max_b_frames, context.thread_count = 12, bidirectional, 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def encodes(codec):
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of grey frames, the k-th of level 4 k, and one of a picture that stands still."""
    folder = tmp_path_factory.mktemp("videos")
    grey = [np.full((48, 64, 3), 4 * number, np.uint8) for number in range(FRAMES)]
    for name, (codec, rate, bidirectional) in VIDEOS.items():
        if encodes(codec):
            write(folder / name, codec, rate, grey, bidirectional)
    write(folder / "still.avi", "mjpeg", 25, [picture()] * 30, pixels="yuvj420p")
    return folder


def picture():
    """(48, 64, 3): smooth, without symmetry, and different everywhere."""
    y, x = np.mgrid[:48, :64]
    return np.stack([4 * x, 5 * y, 128 + 60 * np.sin(x / 5 + y / 9)], axis=-1).astype(np.uint8)


def all_frames(path):
    """The slow oracle of decoding: (frames, h, w, 3), from the first to the last, in the order they are shown in."""
    with av.open(path) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def stacked(images):
    return np.stack([np.asarray(image) for image in images])


def numbers(clip):
    """Which frames these are, by their grey level, of which coding changes little."""
    return [round(float(np.mean(frame)) / 4) for frame in np.asarray(clip)]


@pytest.mark.parametrize("name", VIDEOS)
def test_every_clip_has_exactly_the_frames_shown_in_its_time(folder, name):
    """Wherever it starts, on a frame or between two."""
    codec, rate, _ = VIDEOS[name]
    if not encodes(codec):
        pytest.skip(f"PyAV was built without {codec}")
    everything = all_frames(folder / name)
    assert numbers(everything) == list(range(FRAMES))
    for half_frames in range(0, 2 * FRAMES - 1, 7):
        start = Fraction(half_frames, 2) / rate
        for seconds in (Fraction(1, 5), Fraction(2)):
            shown = [k for k in range(FRAMES) if start <= k / Fraction(rate) < start + seconds]
            chosen = [shown[math.floor(i * (len(shown) - 1) / 6)] for i in range(7)]
            clip = stacked(decode_clip(str(folder / name), float(start), float(seconds), frames=7))
            np.testing.assert_array_equal(clip, everything[chosen], err_msg=f"{half_frames / 2} frames, {seconds} s")


def test_thirty_of_sixty_frames_are_every_second_one_up_to_the_last(folder):
    """torch.linspace(0, 59, 30).long()."""
    chosen = numbers(stacked(decode_clip(str(folder / "camera.avi"), 0.0, 2.0, frames=30)))
    assert chosen == [*range(0, 30, 2), *range(30, 58, 2), 59]


def test_few_frames_are_repeated(folder):
    """torch.linspace(0, 2, 7).long() of the last three."""
    images = decode_clip(str(folder / "film.avi"), 57 / 25, 2.0, frames=7)
    assert numbers(stacked(images)) == [57, 57, 57, 58, 58, 58, 59]


def test_one_frame_is_the_first(folder):
    assert numbers(stacked(decode_clip(str(folder / "film.avi"), 1.0, 1.0, frames=1))) == [25]


def test_times_are_exact_to_the_microsecond(folder):
    """3 * 0.2 is a bit more than 0.6, and 15 / 25 s the time of frame 15."""
    assert numbers(stacked(decode_clip(str(folder / "film.avi"), 3 * 0.2, 0.2, frames=5))) == [15, 16, 17, 18, 19]


def test_images_are_rgb(folder):
    image, *_ = decode_clip(str(folder / "still.avi"), 0.0, 1.0, frames=2)
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert np.abs(np.asarray(image).astype(int) - picture()).mean() < 4


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("film.avi", 2.4), ("camera.avi", 2.0), ("ntsc.avi", 2.002), ("bidirectional.mp4", 2.4)],
)
def test_a_video_lasts_as_long_as_its_frames(folder, name, seconds):
    assert video_duration(str(folder / name)) == pytest.approx(seconds, abs=1e-9)


def test_a_container_without_a_length_per_stream_has_one_of_its_own(tmp_path):
    write(tmp_path / "video.mkv", "mpeg4", 25, [picture()] * 10)
    assert video_duration(str(tmp_path / "video.mkv")) == pytest.approx(0.4)


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"no video\n" * 500])
@pytest.mark.parametrize("read", [video_duration, lambda path: decode_clip(path, 0.0, 2.0, 30)])
def test_a_file_that_is_no_video_is_named(tmp_path, content, read):
    path = tmp_path / "broken.avi"
    path.write_bytes(content)
    with pytest.raises(BrokenExampleError, match=r"broken\.avi cannot be decoded"):
        read(str(path))


def test_sound_alone_is_no_video(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    with pytest.raises(BrokenExampleError, match=r"sound\.wav has no video"):
        decode_clip(str(tmp_path / "sound.wav"), 0.0, 1.0, 4)


def test_an_absent_file_is_not_taken_for_a_broken_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        decode_clip(str(tmp_path / "absent.avi"), 0.0, 1.0, 4)


def test_a_video_cut_short_has_the_frames_before(folder, tmp_path):
    """Its header and its index, which is at the end, are of no use; its last frame may be left in part, or refused."""
    whole = (folder / "film.avi").read_bytes()
    path = tmp_path / "cut.avi"
    path.write_bytes(whole[: len(whole) * 6 // 10])
    left = 0
    with av.open(path) as file, contextlib.suppress(av.InvalidDataError):
        for _ in file.decode(video=0):
            left += 1
    assert 10 < left < FRAMES
    clip = stacked(decode_clip(str(path), 0.0, 2.0, frames=left))
    np.testing.assert_array_equal(clip[:-1], all_frames(folder / "film.avi")[: left - 1])
    assert numbers(stacked(decode_clip(str(path), (left - 3) / 25, 2.0, frames=3)))[:2] == [left - 3, left - 2]
    with pytest.raises(BrokenExampleError, match=r"cut\.avi cannot be decoded from 2 s to 4 s"):
        decode_clip(str(path), 2.0, 2.0, frames=4)


def test_a_video_without_its_only_index_is_broken(folder, tmp_path):
    """An .mp4 file's is at the end."""
    whole = (folder / "bidirectional.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(BrokenExampleError, match=r"cut\.mp4 cannot be decoded"):
        decode_clip(str(tmp_path / "cut.mp4"), 0.0, 2.0, 4)


@pytest.mark.parametrize(
    ("duration", "seconds", "starts"),
    [
        (0.0, 2.0, [0]),
        (1.5, 2.0, [0]),
        (2.0, 2.0, [0]),
        (3.9, 2.0, [0]),
        (4.0 - 1e-7, 2.0, [0, 2]),
        (4.0, 2.0, [0, 2]),
        (6.1, 2.0, [0, 2, 4]),
        (6.1, 0.5, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5]),
    ],
)
def test_uniform_clips_start_as_those_of_pytorchvideo(duration, seconds, starts):
    """Values of UniformClipSampler(seconds), until `is_last_clip`."""
    assert uniform_clip_starts(duration, seconds) == starts


def augmented(folder, name, seed, **fields):
    transform = ClipAugment(**{"frames": 4, "seconds": 0.4, "size": 32, "short_side": (40, 52), **fields})
    example = {"video": str(folder / name), "label": 7, "source": "left out"}
    return transform(example, np.random.default_rng(seed))


def test_a_training_clip_has_one_shape_and_type(folder):
    example = augmented(folder, "film.avi", 0, rand_augment="rand-m7-n1", flip=True)
    assert example.keys() == {"image", "label"}
    assert (example["image"].shape, example["image"].dtype) == ((4, 32, 32, 3), np.uint8)
    assert (example["label"], example["label"].dtype) == (7, np.int32)


def test_a_training_clip_is_a_function_of_the_generator(folder):
    fields = {"rand_augment": "rand-m7-mstd0.5-n2", "flip": True}
    clips = [augmented(folder, "still.avi", seed, **fields)["image"] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


@pytest.mark.parametrize("rand_augment", ["", "rand-m9-mstd0.5-n3-p1"])
def test_all_frames_of_a_clip_are_augmented_alike(folder, rand_augment):
    """The frames of the file are equal."""
    clips = [augmented(folder, "still.avi", seed, rand_augment=rand_augment, flip=True)["image"] for seed in range(12)]
    for clip in clips:
        np.testing.assert_array_equal(clip, np.broadcast_to(clip[:1], clip.shape))
    assert len({clip.tobytes() for clip in clips}) == len(clips)


def test_rand_augment_changes_colours(folder):
    with_and_without = [
        [augmented(folder, "film.avi", seed, rand_augment=policy)["image"] for seed in range(10)]
        for policy in ("", "rand-m9-n3-p1")
    ]
    spread = [np.std([clip.astype(float).std(axis=(1, 2)) for clip in clips]) for clips in with_and_without]
    assert spread[0] < 1 < spread[1]


def test_training_clips_start_anywhere_that_leaves_them_in_the_video(folder):
    """On frame 1 at the earliest (0 has no width) and on 50 of 60 at the latest, all equally often."""
    clips = [numbers(augmented(folder, "film.avi", seed, frames=2, size=1)["image"]) for seed in range(100)]
    firsts, lasts = np.array(clips).T
    np.testing.assert_array_equal(lasts, firsts + 9)
    assert 1 <= firsts.min() <= 3
    assert 48 <= firsts.max() <= 50
    assert abs(firsts.mean() - 25.5) < 4.5


def test_videos_shorter_than_a_clip_are_taken_whole(folder):
    clip = augmented(folder, "film.avi", 0, frames=60, seconds=5.0, size=1)["image"]
    assert numbers(clip) == list(range(60))


def test_a_training_clip_is_a_crop_of_the_resized_frame_or_of_its_mirror_image(folder):
    """Of any length of the short side, anywhere, mirrored every second time."""
    frame = Image.fromarray(all_frames(folder / "still.avi")[0])
    resized = {
        (short, mirror): np.asarray(frame.resize((64 * short // 48, short), BILINEAR))[:, :: -1 if mirror else 1]
        for short in range(40, 43)
        for mirror in (False, True)
    }
    found = [
        find(resized, augmented(folder, "still.avi", seed, short_side=(40, 42), flip=True)["image"][0])
        for seed in range(60)
    ]
    shorts, mirrors, tops, lefts = map(np.array, zip(*found, strict=True))
    assert set(shorts) == {40, 41, 42}
    assert 18 < mirrors.sum() < 42
    for places, room in ((tops, 8), (lefts, 21)):
        assert places.min() <= 1
        assert places.max() >= room - 1


def find(resized, crop):
    """(short, mirror, top, left) of the one image and place in it that has this crop."""
    size = len(crop)
    found = [
        (*which, top, left)
        for which, image in resized.items()
        for top in range(image.shape[0] - size + 1)
        for left in range(image.shape[1] - size + 1)
        if np.array_equal(image[top : top + size, left : left + size], crop)
    ]
    assert len(found) == 1
    return found[0]


def test_without_flip_no_clip_is_mirrored(folder):
    clips = [augmented(folder, "still.avi", seed)["image"].astype(int) for seed in range(10)]
    assert all((np.diff(clip[..., 0].mean(axis=(0, 1))) > 0).all() for clip in clips)


def test_the_evaluation_clip_is_the_middle(folder):
    """48 x 64 -> 32 x 42 -> rows 4 .. 28 and columns 9 .. 33."""
    transform = ClipCenter(frames=3, seconds=0.4, size=24, short_side=32)
    example = transform({"video": str(folder / "still.avi"), "start": 0.2, "label": 3})
    frame = Image.fromarray(all_frames(folder / "still.avi")[0]).resize((42, 32), BILINEAR)
    np.testing.assert_array_equal(example["image"], np.stack([np.asarray(frame)[4:28, 9:33]] * 3))
    assert (example["label"], example["label"].dtype) == (3, np.int32)


def test_the_evaluation_clip_begins_where_it_is_told(folder):
    transform = ClipCenter(frames=5, seconds=1.0, size=32, short_side=32)
    example = transform({"video": str(folder / "film.avi"), "start": 1.0, "label": 0})
    assert numbers(example["image"]) == [25, 31, 37, 43, 49]


def test_enlarging_is_bilinear_interpolation_between_pixel_centres(folder):
    """As torch's `interpolate(mode="bilinear", align_corners=False)`, up to rounding after each axis."""

    def matrix(size, larger):
        where = np.clip((np.arange(larger) + 0.5) * size / larger - 0.5, 0, size - 1)
        return np.maximum(0, 1 - np.abs(where[:, None] - np.arange(size)))

    frame = all_frames(folder / "still.avi")[0].astype(float)
    expected = np.einsum("yh,xw,hwc->yxc", matrix(48, 96), matrix(64, 128), frame)
    clip = ClipCenter(frames=1, seconds=1.0, size=96, short_side=96)(
        {"video": str(folder / "still.avi"), "start": 0.0, "label": 0}
    )
    np.testing.assert_allclose(clip["image"][0], expected[:, 16:112], atol=1.01)


@pytest.mark.parametrize(
    ("transform", "fields"),
    [
        (ClipAugment, {"frames": 0}),
        (ClipAugment, {"seconds": 0.0}),
        (ClipAugment, {"size": 0}),
        (ClipAugment, {"short_side": (200, 320)}),
        (ClipAugment, {"short_side": (300, 256)}),
        (ClipAugment, {"rand_augment": "m7"}),
        (ClipAugment, {"rand_augment": "rand-m7", "fill": (300, 0, 0)}),
        (ClipCenter, {"frames": -1}),
        (ClipCenter, {"seconds": -2.0}),
        (ClipCenter, {"short_side": 200}),
    ],
)
def test_a_wrong_field_is_named(transform, fields):
    with pytest.raises(ValueError, match=f"^{list(fields)[-1]} "):
        transform(**{"frames": 30, "seconds": 2.0, **fields})


def test_transforms_can_be_sent_to_other_processes():
    for transform in (
        ClipAugment(frames=30, seconds=2.0, rand_augment="rand-m7-n1"),
        ClipCenter(frames=8, seconds=1.0),
    ):
        assert pickle.loads(pickle.dumps(transform)) == transform
        assert dataclasses.replace(transform, size=112).size == 112
