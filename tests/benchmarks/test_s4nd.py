import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from flax import nnx
from PIL import Image

from benchmarks import s4nd, side_by_side
from ssm_jax import S4ND


def test_functions_are_called_in_turns_and_the_first_turn_is_not_counted():
    calls = []
    seconds = side_by_side.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}


def test_a_turn_can_be_several_calls_of_which_the_last_is_waited_for(monkeypatch):
    log = []
    ticks = iter([0, 12, 0, 6])  # two turns, of 12 and of 6 seconds
    monkeypatch.setattr(side_by_side, "_settle", lambda: None)
    monkeypatch.setattr(side_by_side.time, "process_time", lambda: next(ticks))
    monkeypatch.setattr(side_by_side.jax, "block_until_ready", lambda result: log.append("wait"))
    assert side_by_side.times({"a": lambda: log.append("a")}, rounds=1, calls=3) == {"a": [2]}
    assert log == ["a", "a", "a", "wait"] * 2


def test_median_is_of_the_counted_calls(monkeypatch):
    ticks = iter([0, 100, 0, 5, 0, 1, 0, 2])  # four calls of 100, 5, 1 and 2 seconds
    monkeypatch.setattr(side_by_side, "_settle", lambda: None)
    monkeypatch.setattr(side_by_side.time, "process_time", lambda: next(ticks))
    assert side_by_side.medians({"a": lambda: None}, rounds=3, longest=1000.0) == {"a": 2}


def test_slow_functions_drop_out_of_later_rounds(monkeypatch):
    clock = iter(range(1000))
    calls = []
    monkeypatch.setattr(side_by_side, "_settle", lambda: None)
    monkeypatch.setattr(side_by_side.time, "process_time", lambda: next(clock))
    side_by_side.medians({"a": lambda: calls.append("a")}, rounds=50, longest=3.0)
    assert len(calls) == 3


def test_passes_are_the_function_and_its_gradients():
    x, y = jnp.arange(3.0), jnp.full(3, 2.0)
    passes = side_by_side.jax_passes(lambda x, y: x * y, x, y)
    np.testing.assert_allclose(passes.forward(), x * y)
    np.testing.assert_allclose(passes.backward(), (x * y * y, x * x * y))  # of half the sum of squares
    assert passes.peak_bytes() >= 2 * x.nbytes


def test_geometric_mean():
    assert s4nd.geometric_mean([1.0, 4.0, 16.0]) == pytest.approx(4.0)


RESULT = {
    "forward": {"S4ND": 1e-3, "kernels": 5e-4, "release": 3e-3},
    "backward": {"S4ND": 2e-3, "kernels": 1e-3, "release": 8e-3},
    "bytes": {"S4ND": 2e6, "kernels": 1e6, "release": 9e6},
}


def test_tables_show_ratios_to_our_layer():
    time, memory = s4nd.tables({"one": RESULT}, "diag")
    assert [list(column.cells) for column in time.columns] == [["one"], ["2.0 (1.0)"], ["1.0 (0.5)"], ["4.00 (3.00)"]]
    assert [list(column.cells) for column in memory.columns] == [["one"], ["2"], ["1"], ["4.50"]]


def test_picture_shows_the_ratios():
    (axes,) = s4nd.picture({"one": RESULT, "two": RESULT}, "diag", "a device").axes
    assert [bar.get_y() + bar.get_height() for bar in axes.patches] == [4.0, 4.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "two"]


@pytest.mark.slow
def test_run_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    shapes = {"small": s4nd.Shape(2, (4, 3), 4, (3, 3), 2), "sequence": s4nd.Shape(2, (5,), 4, None)}
    monkeypatch.setattr(s4nd, "SHAPES", shapes)
    monkeypatch.setattr(s4nd, "_RESOLUTIONS", (2, 4))
    monkeypatch.setattr(s4nd, "_GROWTH", [(1, 2)])
    monkeypatch.setattr(s4nd, "_SHARE_BATCH", 1)
    monkeypatch.setattr(s4nd, "pin", lambda cores: None)
    flags.FLAGS.mark_as_parsed()
    with flagsaver.as_parsed(shapes="small,sequence", rounds="1", out=str(tmp_path)):
        s4nd.main([])
    record = json.loads((tmp_path / "s4nd_diag.json").read_text())
    assert list(record["shapes"]) == ["small", "sequence"]
    assert "XLA, depthwise" in record["shapes"]["small"]["backward"]
    assert "XLA, depthwise" not in record["shapes"]["sequence"]["backward"]
    assert all(seconds > 0 for seconds in record["shapes"]["small"]["backward"].values())
    assert record["where"]["jax"] == jax.__version__
    assert [list(each["seconds"]) for each in record["growth"].values()] == [["2", "4"]]
    # How large the share is depends on what else the machine does.
    assert record["kernel_share"] > 0
    assert f"kernel generation: {100 * record['kernel_share']:.1f} %" in capsys.readouterr().out
    with Image.open(tmp_path / "s4nd_diag.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize("mode", ["diag", "dplr"])
@pytest.mark.parametrize("lengths", [(7,), (130,), (4, 3), (3, 4, 2)])
def test_layers_in_pytorch_are_ours(mode, lengths):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.torch_s4nd import PlainS4ND, SeparableS4ND

    layer = S4ND(4, dims=len(lengths), mode=mode, linear_output=True, rngs=nnx.Rngs(0))
    u = np.random.default_rng(0).normal(size=(2, *lengths, 4)).astype(np.float32)
    expected, backward = jax.vjp(lambda u: layer(u), u)
    (expected_u,) = backward(expected)
    for module in (PlainS4ND(layer), SeparableS4ND(layer)):
        x = torch.tensor(np.moveaxis(u, -1, 1).copy(), requires_grad=True)
        y = module(x)
        (y.square().sum() / 2).backward()
        for ours, theirs in [(expected, y.detach()), (expected_u, x.grad)]:
            np.testing.assert_allclose(np.moveaxis(theirs.numpy(), 1, -1), ours, rtol=0, atol=1e-5 * np.abs(ours).max())


@pytest.mark.parametrize("mode", ["diag", "dplr"])
def test_layers_in_pytorch_stay_on_the_device_of_their_input(mode):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.torch_s4nd import PlainS4ND, SeparableS4ND

    layer = S4ND(4, dims=2, mode=mode, linear_output=True, rngs=nnx.Rngs(0))
    for module in (PlainS4ND(layer), SeparableS4ND(layer)):
        y = module.to("meta")(torch.zeros(2, 4, 5, 3, device="meta"))  # a device other than the CPU, without values
        assert (y.device.type, y.shape) == ("meta", (2, 4, 5, 3))


def test_a_folder_without_the_release_is_rejected(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.torch_s4nd import official_layer

    with pytest.raises(FileNotFoundError, match=r"--torch-s4 must be a checkout of state-spaces/s4.*" + str(tmp_path)):
        official_layer(tmp_path)
