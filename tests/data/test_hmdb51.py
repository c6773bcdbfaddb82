import pickle
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from ssm_jax.data.clips import ClipAugment, ClipCenter, video_duration
from ssm_jax.data.decode import BrokenExampleError
from ssm_jax.data.hmdb51 import UniformClips, hmdb51

SPLITS = "testTrainMulti_7030_splits"
WEBSITE = "serre-lab.clps.brown.edu"
COUNTS = {1: (89, 39), 2: (87, 41), 3: (89, 39)}


def lay_out(root, videos="videos"):
    """Two classes of empty files in HMDB-51's layout."""
    for name in ("run", "hand_stand"):
        folder = root / videos / name
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"{name}_{number} (x).avi").touch()
    (root / SPLITS).mkdir()
    for fold, marks in {1: "1210", 2: "2110", 3: "0112"}.items():
        for name in ("run", "hand_stand"):
            lines = [f"{name}_{number} (x).avi {mark} \n" for number, mark in enumerate(marks)]
            (root / SPLITS / f"{name}_test_split{fold}.txt").write_text("".join(lines) + "\n")
    return root


def write(path, count, rate=25):
    with av.open(path, "w") as file:
        stream = file.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), "rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


@pytest.mark.parametrize("videos", ["videos", "."])
def test_class_folders_are_found_in_videos_and_beside_the_splits(tmp_path, videos):
    dataset = hmdb51(str(lay_out(tmp_path, videos)))
    paths = [dataset.splits["train"][i]["video"] for i in range(4)]
    assert paths == [
        str(tmp_path / videos / name / f"{name}_{number} (x).avi")
        for name in ("hand_stand", "run")
        for number in (0, 2)
    ]


@pytest.mark.parametrize(("fold", "train", "test"), [(1, [0, 2], [1]), (2, [1, 2], [0]), (3, [1, 2], [3])])
def test_each_fold_marks_its_own_videos(tmp_path, fold, train, test):
    """1 is for training, 2 for testing, 0 for neither."""
    splits = hmdb51(str(lay_out(tmp_path)), fold=fold).splits
    for source, numbers in ((splits["train"], train), (splits["test"], test)):
        found = [(source[i]["video"].rpartition("/")[2], source[i]["label"]) for i in range(len(source))]
        assert found == [
            (f"{name}_{n} (x).avi", label) for label, name in enumerate(["hand_stand", "run"]) for n in numbers
        ]


def test_the_dataset_is_described(tmp_path):
    dataset = hmdb51(str(lay_out(tmp_path)), 112, frames=16)
    assert (dataset.resolution, dataset.frames, dataset.channels, dataset.multi_label) == (112, 16, 3, False)
    assert dataset.class_names == ("hand_stand", "run")
    assert dataset.title == f"{tmp_path.name}, split 1"
    np.testing.assert_allclose(np.array(dataset.mean) * 255, [110.2, 100.64, 96.0])
    np.testing.assert_allclose(np.array(dataset.std) * 255, [58.15, 56.47, 55.33])
    assert dataset.splits["val"] is dataset.splits["test"]
    assert hmdb51(str(tmp_path)).resolution == 224


@pytest.fixture
def clips(tmp_path):
    """Videos of 4.4, 1.2, 2 and 0 s, the last a broken one."""
    files = [(str(tmp_path / f"{number}.avi"), number % 2) for number in range(4)]
    for (path, _), frames in zip(files, (110, 30, 50), strict=False):
        write(path, frames)
    (tmp_path / "3.avi").write_bytes(b"broken")
    return UniformClips(tuple(files), 2.0)


def test_every_video_is_evaluated_on_all_its_whole_clips_and_on_one_at_least(clips):
    expected = [(0, 0.0), (0, 2.0), (1, 0.0), (2, 0.0), (3, 0.0)]
    assert [clips[i] for i in range(len(clips))] == [
        {"video": clips.files[video][0], "start": start, "label": video % 2} for video, start in expected
    ]


def test_groups_tell_which_clips_are_of_one_video(clips):
    np.testing.assert_array_equal(clips.groups, [0, 0, 1, 2, 3])


def test_names_tell_file_and_time(clips):
    assert clips.name(1).endswith("0.avi at 2 s")


def test_a_broken_video_is_found_when_its_clip_is_decoded(clips):
    transform = ClipCenter(frames=4, seconds=2.0, size=32, short_side=48)
    assert transform(clips[1])["image"].shape == (4, 32, 32, 3)
    with pytest.raises(BrokenExampleError, match=r"3\.avi"):
        transform(clips[4])


def test_headers_are_read_once_and_only_for_evaluation(clips, tmp_path):
    """The files are away afterwards; a copy that is sent to another process needs them no more."""
    assert len(clips) == 5
    for number in range(4):
        (tmp_path / f"{number}.avi").unlink()
    copy = pickle.loads(pickle.dumps(clips))
    assert copy == clips
    assert copy[4] == clips[4]
    np.testing.assert_array_equal(copy.groups, clips.groups)


def test_headers_may_be_read_by_several_threads(clips):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: len(clips), range(8))) == [5] * 8


def test_training_videos_have_names(tmp_path):
    source = hmdb51(str(lay_out(tmp_path))).splits["train"]
    assert source.name(1) == str(tmp_path / "videos/hand_stand/hand_stand_2 (x).avi")
    assert len(pickle.loads(pickle.dumps(source))) == 4


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"fold": 0}, "fold"),
        ({"fold": 4}, "fold"),
        ({"frames": 0}, "frames"),
        ({"seconds": 0.0}, "seconds"),
        ({"image_size": 0}, "image_size"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, name):
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        hmdb51(str(lay_out(tmp_path)), **arguments)


def complaint(root, **arguments):
    with pytest.raises(ValueError, match=r"^(dir|fold)") as error:
        hmdb51(str(root), **arguments)
    assert WEBSITE in str(error.value)
    return str(error.value)


def test_missing_splits_are_answered_with_where_they_were_looked_for(tmp_path):
    assert f"looked for {tmp_path}/{SPLITS}/CLASS_test_split2.txt" in complaint(tmp_path, fold=2)
    assert f"looked for {tmp_path}/none/{SPLITS}/CLASS" in complaint(tmp_path / "none")


def test_a_fold_without_a_class_is_answered_with_the_missing_file(tmp_path):
    (lay_out(tmp_path) / SPLITS / "run_test_split2.txt").unlink()
    assert f"has no file {tmp_path}/{SPLITS}/run_test_split2.txt" in complaint(tmp_path, fold=2)
    assert len(hmdb51(str(tmp_path), fold=1).splits["train"]) == 4


def test_a_missing_class_is_answered_with_where_it_was_looked_for(tmp_path):
    lay_out(tmp_path)
    (tmp_path / "videos" / "run").rename(tmp_path / "videos" / "running")
    message = complaint(tmp_path)
    assert "no videos of class run: " in message
    assert f"looked for {tmp_path}/videos/run and {tmp_path}/run." in message
    assert "unrar" not in message


@pytest.mark.parametrize("archive", ["videos/run.rar", "run.rar", "hmdb51_org.rar"])
def test_archives_are_to_be_unpacked(tmp_path, archive):
    lay_out(tmp_path)
    (tmp_path / "videos" / "run").rename(tmp_path / "elsewhere")
    (tmp_path / archive).touch()
    message = complaint(tmp_path)
    assert str(tmp_path / archive) in message
    assert "unrar x" in message


def test_archived_splits_are_to_be_unpacked(tmp_path):
    (tmp_path / "test_train_splits.rar").touch()
    assert "unrar x" in complaint(tmp_path)


def test_missing_videos_are_counted_and_the_first_is_named(tmp_path):
    """Of those that the fold uses: the third of 'run' is one, the fourth not."""
    lay_out(tmp_path)
    for number in (1, 2, 3):
        (tmp_path / f"videos/run/run_{number} (x).avi").unlink()
    assert f"lacks 2 of the 6 videos of the split; the first is {tmp_path}/videos/run/run_1 (x)" in complaint(tmp_path)


@pytest.mark.parametrize("line", ["run_0.avi", "run_0.avi 3", "1"])
def test_a_line_that_is_none_is_shown(tmp_path, line):
    path = lay_out(tmp_path) / SPLITS / "run_test_split1.txt"
    path.write_text(f"run_0 (x).avi 1 \n{line}\n")
    with pytest.raises(ValueError, match=rf"^dir .*line 2 of {path} is '{line}'"):
        hmdb51(str(tmp_path))


def test_the_official_splits_have_3570_and_1530_videos(shared, tmp_path):
    source = shared / "data" / "hmdb51_official_splits" / SPLITS
    if not source.is_dir():
        pytest.skip("needs the official split files")
    (tmp_path / SPLITS).symlink_to(source)
    for path in source.glob("*_test_split1.txt"):
        folder = tmp_path / path.name.removesuffix("_test_split1.txt")
        folder.mkdir()
        for line in path.read_text().splitlines():
            (folder / line.rsplit(maxsplit=1)[0]).touch()
    for fold in (1, 2, 3):
        dataset = hmdb51(str(tmp_path), fold=fold)
        assert dataset.num_classes == 51
        assert dataset.title == f"HMDB-51, split {fold}"
        train, test = (dataset.splits[name].files for name in ("train", "test"))
        assert (len(train), len(test)) == (3570, 1530)
        assert np.bincount([label for _, label in train]).tolist() == [70] * 51
        assert np.bincount([label for _, label in test]).tolist() == [30] * 51
        assert not set(train) & set(test)


@pytest.fixture
def mini(shared):
    folder = shared / "data" / "video_mini"
    if not folder.is_dir():
        pytest.skip("needs the developers' videos")
    return str(folder)


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_real_videos_are_counted_as_their_lists_do(mini, fold):
    dataset = hmdb51(mini, fold=fold)
    assert dataset.class_names == (
        "apply_eye_makeup", "arm_wrestling", "cleaning_pool", "doing_exercises", "shoot_ball", "typing",
    )  # fmt: skip
    assert (len(dataset.splits["train"]), len(dataset.splits["test"].files)) == COUNTS[fold]


def test_real_videos_open_and_are_one_clip_each(mini):
    dataset = hmdb51(mini)
    for split in ("train", "test"):
        assert all(1.4 < video_duration(path) < 2.1 for path, _ in dataset.splits[split].files)
    np.testing.assert_array_equal(dataset.splits["test"].groups, np.arange(len(dataset.splits["test"])))


def test_a_real_clip_is_decoded_for_training_and_evaluation(mini):
    dataset = hmdb51(mini)
    augment = ClipAugment(frames=30, seconds=2.0, rand_augment="rand-m7-n1", flip=True)
    train = augment(dataset.splits["train"][0], np.random.default_rng(0))
    test = ClipCenter(frames=30, seconds=2.0)(dataset.splits["test"][0])
    for example in (train, test):
        assert (example["image"].shape, example["image"].dtype) == ((30, 224, 224, 3), np.uint8)
        assert example["image"].std() > 10
