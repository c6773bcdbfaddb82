import itertools
import json
import multiprocessing
import sys
import time

import grain
import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver
from PIL import Image

from benchmarks import input_pipeline
from benchmarks.input_pipeline import EVALUATION, RECIPES, SMALL, TRAINING, Reader, Task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processor time of workers is read from /proc")

OURS = Reader("ssm_jax", 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    input_pipeline.make_images(folder, 10, 60, 45, "JPEG")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    input_pipeline.make_images(folder, 10, 32, 32, "png")
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Everything in this process and on all cores."""
    monkeypatch.setattr(input_pipeline, "pin", lambda cores: None)
    monkeypatch.setattr(input_pipeline, "apart", lambda function, *arguments: function(*arguments))
    flags.FLAGS.mark_as_parsed()
    with flagsaver.as_parsed(rounds="2", cores="1", seconds="0", rows="3", out=str(tmp_path)):
        yield


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where somebody sleeps."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(input_pipeline, "time", clock)
    return clock


@pytest.fixture
def slow(monkeypatch, clock):
    """A reader that takes a second for its first batch and a tenth for every other, when it is asked."""

    def read(task, reader):
        for seconds in itertools.chain([1.0], itertools.repeat(0.1)):
            clock.sleep(seconds)
            yield None

    monkeypatch.setitem(input_pipeline.LIBRARIES, "slow", read)
    return Reader("slow", 1)


def task(folder, recipe=TRAINING, seconds=0.0):
    return Task(str(folder), RECIPES[recipe], rows=3, seconds=seconds)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("library", ["ssm_jax", "grain"])
def test_contestants_read_batches_of_bytes(library, recipe, images, small):
    folder, side = (small, 32) if recipe == SMALL else (images, 224)
    batches = iter(input_pipeline.LIBRARIES[library](task(folder, recipe), Reader(library, 1)))
    for batch in itertools.islice(batches, 5):  # more than there are images
        assert batch["image"].shape == (3, side, side, 3)
        assert batch["image"].dtype == np.uint8
        assert set(batch["label"].tolist()) <= {0, 1}


def test_grain_reads_what_we_do_in_evaluation(images):
    """In another order."""
    ours, theirs = (
        next(iter(input_pipeline.LIBRARIES[library](task(images, EVALUATION)._replace(rows=10), Reader(library, 1))))
        for library in ("ssm_jax", "grain")
    )
    assert {x.tobytes() for x in theirs["image"]} <= {x.tobytes() for x in ours["image"]}


def test_timm_reads_what_we_do(images, small):
    for package in ("torch", "torchvision", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    assert input_pipeline.disagreement(task(images, EVALUATION)) == 0
    for recipe in (TRAINING, EVALUATION, SMALL):
        image = Image.new("RGB", (32, 32) if recipe == SMALL else (60, 45), (10, 20, 30))
        ours = RECIPES[recipe]
        transform = input_pipeline.timm_transform(ours)
        assert transform(image).shape == (3, *[ours.size or 32] * 2)
        assert str(transform(image).dtype) == "torch.uint8"


def test_a_turn_of_timms_workers(monkeypatch, images):
    for package in ("torch", "torchvision", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.undo()  # a process of its own, as JAX's threads and forked workers do not go together
    result = input_pipeline.apart(input_pipeline.turn, task(images, seconds=0.5), Reader("timm", 1, workers=1))
    assert result["images_per_second"] > 0
    assert result["cpu_seconds"] > 0


def test_rates_are_those_after_the_start(slow, images):
    result = input_pipeline.turn(task(images, seconds=0.95), slow)
    assert result["first_batch"] == pytest.approx(1.0)
    assert result["images_per_second"] == pytest.approx(3 / 0.1)  # batches of three
    assert result["megabytes"] > 1


def test_a_turn_ends_when_all_workers_have_given_as_many_batches(monkeypatch, slow, images):
    begun, batches = input_pipeline.start(task(images), slow)[0], []
    monkeypatch.setattr(input_pipeline, "start", lambda task, reader: (map(batches.append, begun), 0.0))
    input_pipeline.turn(task(images, seconds=0.45), slow._replace(workers=4))
    assert len(batches) == 8  # five would have been enough


def test_a_loop_waits_for_what_it_does_not_overlap(slow, images):
    shares = input_pipeline.wait(task(images, seconds=100.0), slow)
    # Its reader reads when it is asked, so that a batch and the step of 0.1 s / load come one after the other.
    assert shares == {str(load): pytest.approx(load / (1 + load), rel=1e-6) for load in (1.2, 0.9, 0.8, 0.5)}


def test_processor_time_and_memory_are_those_of_workers_too():
    before = input_pipeline.cpu_seconds(), input_pipeline.megabytes()
    assert before[0] == pytest.approx(time.process_time(), abs=0.5)
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    worker = context.Process(target=_work, args=(ready, done), daemon=True)
    worker.start()
    ready.wait()
    assert input_pipeline.cpu_seconds() - before[0] > 0.2
    assert input_pipeline.megabytes() - before[1] > 50
    done.set()
    worker.join()


def _work(ready, done):
    kept = np.ones(50_000_000, np.uint8)
    while time.process_time() < 0.3:
        kept.sum()
    ready.set()
    done.wait()


def test_contestants_take_turns():
    calls = []

    def call(name):
        calls.append(name)
        return {"seconds": len(calls)}

    results = input_pipeline.rounds({"a": lambda: call("a"), "b": lambda: call("b")})
    assert calls == ["a", "b"] * 2
    assert results == {"a": {"seconds": [1, 3]}, "b": {"seconds": [2, 4]}}


def test_contestants_use_as_many_threads_or_workers_as_there_are_cores(monkeypatch):
    monkeypatch.setattr(input_pipeline, "has_timm", lambda: True)
    names = [str(reader) for reader in input_pipeline.contestants(4)]
    parallel = [f"{library}, 4 {kind}" for library in ("ssm_jax", "grain") for kind in ("threads", "workers")]
    assert names == ["ssm_jax, 1 thread", *parallel, "timm, 4 workers"]


def test_images_are_as_photographs_are(tmp_path):
    input_pipeline.make_images(tmp_path, 2, 256, 256, "png")
    pixels = np.stack([np.asarray(Image.open(path).convert("L"), float) for path in tmp_path.glob("train/*/*")])
    power = (np.abs(np.fft.fft2(pixels - pixels.mean((1, 2), keepdims=True))) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(256)] * 2))
    rings = [(low, power[(frequency >= low) & (frequency < 2 * low)].mean()) for low in (1 / 64, 1 / 32, 1 / 16, 1 / 8)]
    x, y = np.log(rings).T
    slope, _ = np.polyfit(x, y, 1)
    assert slope == pytest.approx(-2, abs=0.2)  # of power, the square of the amplitude


def test_images_have_the_sizes_of_imagenets(tmp_path):
    input_pipeline.make_images(tmp_path, 3, 500, 375, "JPEG")
    assert input_pipeline.mean_kilobytes(tmp_path) == pytest.approx(110, rel=0.1)
    assert len([*tmp_path.glob("train/*/*.JPEG")]) == 3
    assert len([*tmp_path.glob("val/*/*.JPEG")]) == 2


def test_shuffling_costs_what_it_does_for_imagenet(images):
    source = input_pipeline.images_in(str(images))
    assert len(source) == 1_281_167
    assert source[10] == source[0] != source[1]
    assert source.name(13) == source.name(3)
    assert len(grain.MapDataset.source(source)) == len(source)


def test_profile_has_the_time_of_each_part(images):
    seconds = input_pipeline.profile(task(images, seconds=0.01))
    assert min(seconds.values()) > 0
    assert seconds["flip, RandAugment"] > seconds["read the file"]  # which is a part of it


def cells(table):
    return [*zip(*(column.cells for column in table.columns), strict=True)]


def test_time_of_a_part_is_without_that_of_the_parts_before():
    ends = {"read the file": 1e-4, "decode": 3e-4, "crop and resize": 6e-4, "flip, RandAugment": 7e-4}
    own = {"shuffle": 1e-5, "generator": 2e-5, "stack": 3e-5}
    rows = cells(input_pipeline.table_of_parts({name: [x, x] for name, x in {**ends, **own, "pipeline": 1e-3}.items()}))
    assert [row[1] for row in rows] == ["100", "200", "300", "100", "300", "10.0", "20.0", "30.0", "1000"]
    assert [row[2] for row in rows[:5]] == ["10.0", "20.0", "30.0", "10.0", "30.0"]


def test_processor_time_is_a_multiple_of_that_of_our_workers():
    def result(rate, cpu):
        return {"images_per_second": rate, "cpu_seconds": cpu, "first_batch": [1.0] * 2, "megabytes": [100.0] * 2}

    results = {
        "ssm_jax, 4 threads": result([100.0, 100.0], [0.01, 0.01]),
        "ssm_jax, 4 workers": result([300.0, 500.0], [0.01, 0.005]),
        "timm, 4 workers": result([300.0, 400.0], [0.012, 0.01]),
    }
    *_, row = cells(input_pipeline.table_of_readers("", results))
    assert row == ("timm, 4 workers", "350 (300-400)", "3.8", "92 (83-100)", "1.60 (1.20-2.00)", "1.0", "100")


def test_cores_are_the_images_of_a_chip_over_those_of_a_core():
    rows = {name: rest for name, *rest in cells(input_pipeline.table_of_cores(200.0))}
    assert rows["DeiT-S"] == ["1382", "6.9", "8.6"]


def test_what_training_loses_is_what_a_step_takes_longer():
    results = {"threads": {"there": [0.9, 0.5], "step": [1.0, 1.0], "waited": [0.1, 0.2]}}
    (row,) = cells(input_pipeline.table_of_training("", results))
    assert row[3:] == ("30.0 (10.0-50.0)", "15.0 (10.0-20.0)")


def test_training_is_that_of_a_config(monkeypatch, images):
    model = {"depths": (1,), "dims": (4,), "stem_width": 4}
    changes = {"batch_size": 8, "model": model, "data": {"image_size": 16}}
    monkeypatch.setitem(input_pipeline.CONFIGS, "tiny", ("configs.backbones.image_folder:resnet", changes, 1))
    with jax.numpy_dtype_promotion("standard"):  # optax has 1 - decay**count
        results = input_pipeline.train("tiny", str(images), 1, [0], 2)
    assert results.keys() == {"threads"}
    seconds = results["threads"]
    assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())
    assert np.all(np.array(seconds["waited"]) < seconds["step"])


def test_run_writes_what_it_measured(monkeypatch, images, tmp_path, capsys):
    monkeypatch.setattr(input_pipeline, "has_timm", lambda: False)
    monkeypatch.setattr(input_pipeline, "contestants", lambda cores: [OURS, Reader("grain", 1)])
    with flagsaver.as_parsed(parts="tables,profile", images=str(images), seconds="0.1"):
        input_pipeline.main([])
    record = json.loads((tmp_path / "input_pipeline.json").read_text())
    assert record["tables"].keys() == RECIPES.keys()
    for result in record["tables"].values():
        assert [*result] == ["ssm_jax, 1 thread", "grain, 1 thread"]
        assert all(len(rounds) == 2 for each in result.values() for rounds in each.values())
    assert min(record["profile"]["pipeline"]) > 0
    assert float(record["where"]["kilobytes"]) == round(input_pipeline.mean_kilobytes(images))
    assert "only ours and grain" in capsys.readouterr().out


def test_unknown_parts_are_rejected():
    with flagsaver.as_parsed(parts="tables,speed"), pytest.raises(app.UsageError, match=r"--parts.*got speed"):
        input_pipeline.main([])
