import json
import struct

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event

from ssm_jax.training import metrics
from ssm_jax.training.metrics import MetricWriter, ProgressBar, Throughput, read_metrics


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


def test_throughput_is_images_by_seconds_since_the_restart(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    throughput = Throughput()
    now = 102.0
    throughput.add(10)
    throughput.add(10)
    now = 104.0
    assert throughput.rate == 5.0
    throughput.restart()
    now = 105.0
    assert throughput.rate == 0.0
    throughput.add(7)
    assert throughput.rate == 7.0


def test_where_there_is_no_terminal_only_lines_are_printed(capsys):
    with ProgressBar(total_steps=10, step=0) as progress:
        progress.update(5, loss=1.0, accuracy=0.5, images_per_second=10.0)
        progress.print("step 5 [bold] of 10")
    assert "step 5" in capsys.readouterr().out.splitlines()[0]


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
