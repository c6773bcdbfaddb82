import collections
import json
import struct
from typing import ClassVar

import jax
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX.proto.event_pb2 import Event

from ssm_jax.training import metrics
from ssm_jax.training.metrics import MetricWriter, ProgressBar, Throughput, memory, read_metrics


def events(workdir):
    """What TensorBoard reads from a run's event files: (step, name, value)."""
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[12 + length + 4 :]
    return found


def test_rows_are_read_as_they_were_written(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.1 + 0.2, "accuracy": 0.5})
        writer.write(2, {"loss": 1e-30})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.1 + 0.2, "accuracy": 0.5},
        {"step": 2, "loss": 1e-30},
    ]


def test_rows_are_there_as_soon_as_they_are_written(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_every_line_is_json(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_run_without_metrics_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_half_written_last_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_complete_last_line_without_its_end_is_left_out(tmp_path):
    """Else the next row would be appended to it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with MetricWriter(tmp_path, step=2) as writer:
        writer.write(3, {})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]


def test_going_on_cuts_off_the_rows_that_come_again(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0})
    with MetricWriter(tmp_path, step=3) as writer:
        writer.write(4, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_going_on_mends_a_half_written_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    with MetricWriter(tmp_path, step=2) as writer:
        writer.write(3, {})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_starting_from_scratch_drops_all_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with MetricWriter(tmp_path):
        pass
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 0.5, "train/accuracy": 0.25})
        writer.write(2, {"train/loss": 0.125})
    assert events(tmp_path) == [(1, "train/loss", 0.5), (1, "train/accuracy", 0.25), (2, "train/loss", 0.125)]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


class Kept:
    """A writer that notes what it is told."""

    def __init__(self):
        self.told = []

    def write(self, step, metrics):
        self.told.append((step, dict(metrics)))

    def flush(self):
        self.told.append("flush")

    def close(self):
        self.told.append("close")


def test_other_writers_get_all_rows(tmp_path):
    first, second = Kept(), Kept()
    with MetricWriter(tmp_path, others=[lambda: first, lambda: second]) as writer:
        writer.write(1, {"loss": 1.0})
        writer.flush()
        writer.write(2, {"loss": 2.0})
    assert first.told == second.told == [(1, {"loss": 1.0}), "flush", (2, {"loss": 2.0}), "close"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_other_processes_make_no_writers(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricWriter(tmp_path, others=[lambda: pytest.fail("made")]) as writer:
        writer.write(1, {"loss": 1.0})
        writer.flush()


def test_a_writer_that_cannot_be_made_leaves_the_others_closed(tmp_path):
    kept = Kept()
    with pytest.raises(ZeroDivisionError):
        MetricWriter(tmp_path, others=[lambda: kept, lambda: 1 / 0])
    assert kept.told == ["close"]


def test_tensorboard_has_what_was_flushed(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
        writer.flush()
        assert events(tmp_path) == [(1, "loss", 0.5)]


class Objects(MemoryFileSystem):
    """An object store: nothing can be appended to. The files are there for as long as the class."""

    protocol = ("gcs", "gs")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    written: ClassVar = collections.Counter()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode
        self.written[path.rpartition("/")[2]] += mode == "wb"
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch):
    """A directory whose name begins with gs://, in memory."""
    from etils.epath import backend

    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: Objects(skip_instance_cache=True))
    monkeypatch.setitem(epath.gpath._PREFIX_TO_BACKEND, "gs", backend.fsspec_backend)
    Objects.store.clear()
    Objects.written.clear()
    return epath.Path("gs://bucket/run")


def test_rows_in_an_object_store_are_there_when_they_are_flushed(bucket):
    with MetricWriter(bucket) as writer:
        for step in range(1, 100):
            writer.write(step, {"loss": 1.0})
        assert read_metrics(bucket) == []
        writer.flush()
        assert [row["step"] for row in read_metrics(bucket)] == [*range(1, 100)]
        writer.write(100, {"loss": 1.0})
    assert read_metrics(bucket)[-1]["step"] == 100
    assert Objects.written["metrics.jsonl"] == 3  # at the start, when flushed, at the end


def test_rows_in_an_object_store_come_once_a_minute(bucket, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    with MetricWriter(bucket) as writer:
        writer.write(1, {"loss": 1.0})
        now += 61
        writer.write(2, {"loss": 1.0})
        writer.write(3, {"loss": 1.0})
        assert [row["step"] for row in read_metrics(bucket)] == [1, 2]


def test_a_run_in_an_object_store_goes_on(bucket):
    with MetricWriter(bucket) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0})
    with MetricWriter(bucket, step=3) as writer:
        writer.write(4, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(bucket)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert any(path.name.startswith("events.out.tfevents") for path in bucket.iterdir())


def test_throughput_is_images_by_seconds_since_the_restart(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    throughput = Throughput()
    now = 102.0
    throughput.add(10)
    throughput.add(10)
    now = 104.0
    assert throughput.row["images_per_second"] == 5.0
    throughput.restart()
    now = 105.0
    assert throughput.row == {}
    throughput.add(7)
    assert throughput.row["images_per_second"] == 7.0


def test_throughput_by_device_and_time_waited_for_input(monkeypatch):
    now = 0.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    throughput = Throughput(devices=4, ideal_seconds=0.05)
    assert throughput.row == {}
    with throughput.waiting():
        now = 1.0
    throughput.add(8)
    now = 3.0
    with throughput.waiting():
        now = 4.0
    row = throughput.row
    assert row == {"images_per_second": 2, "images_per_second_per_device": 0.5, "mfu": 0.1, "input_wait": 0.5}
    throughput.restart()
    throughput.add(8)
    now = 5.0
    assert throughput.row["input_wait"] == 0


def test_without_a_known_peak_there_is_no_utilisation():
    throughput = Throughput()
    throughput.add(1)
    assert "mfu" not in throughput.row


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_memory_is_that_of_the_device_with_most(monkeypatch):
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 7}, {"bytes_in_use": 4, "peak_bytes_in_use": 9}]
    monkeypatch.setattr(jax, "local_devices", lambda: [*map(Device, stats)])
    assert memory() == {"memory_bytes": 5, "memory_peak_bytes": 9}


def test_a_device_that_does_not_tell_its_memory_has_none(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert memory() == {}


def test_where_there_is_no_terminal_lines_are_printed_now_and_then(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    with ProgressBar(total_steps=1000, step=0) as progress:
        progress.print("begins [bold]")
        for step in range(1, 6):
            now += 12
            progress.update(step, {"loss": 1.0, "accuracy": 0.5, "grad_norm": 2.0}, images_per_second=10.0)
    begin, line = capsys.readouterr().out.splitlines()
    assert begin == "begins "
    assert line == "step 3/1,000  loss 1.0000  accuracy 0.5000  10 images/s  3:19:24 left"


def test_other_processes_print_nothing(capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with ProgressBar(total_steps=10, step=0) as progress:
        progress.print("step 5")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("length", [10, 300])
def test_long_lines_are_not_broken(capsys, length):
    with ProgressBar(total_steps=10, step=0) as progress:
        progress.print("x" * length)
    assert "x" * length in capsys.readouterr().out
