import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver
from flax import nnx
from PIL import Image

from benchmarks import aggregation, backbones
from benchmarks.backbones import Network
from ssm_jax import create_model

SMALL = Network(sized=False, options={"depths": (2,), "dims": (4,), "stem_width": 4})
WIDTHS = {"resnet18": 4, "resnet18_rla": 8, "resnet18_s6la": 6}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    def create(name, **options):  # methods are no more than other widths here
        return create_model("resnet18", **options | {"dims": (WIDTHS[name],)})

    monkeypatch.setattr(backbones, "create_model", create)
    monkeypatch.setattr(backbones, "AGGREGATED", {"resnet18": ("rla", "s6la")})
    monkeypatch.setattr(backbones, "NETWORKS", dict.fromkeys(WIDTHS, SMALL))
    monkeypatch.setattr(aggregation, "LIMITS", {"resnet18": {"step": 1.25, "memory": 1.10}})
    monkeypatch.setattr(aggregation, "pin", lambda cores: None)
    flags.FLAGS.mark_as_parsed()
    values = {"models": "resnet18", "batch": "2", "image-size": "8", "rounds": "2", "out": str(tmp_path)}
    with flagsaver.as_parsed(**values):
        yield


def test_what_is_compared_are_networks_with_limits(monkeypatch):
    monkeypatch.undo()  # that these networks are ours is tested with the others in test_backbones.py
    assert aggregation.LIMITS.keys() == backbones.AGGREGATED.keys()
    for name in backbones.AGGREGATED:
        plain, *others = (aggregation.network(name, method) for method in aggregation.methods(name))
        assert plain == name
        assert [backbones.NETWORKS[other].baseline for other in others] == [name] * len(others)


def test_every_method_is_between_two_calls_of_the_plain_network(monkeypatch):
    def times(functions, *, rounds, longest, calls):
        assert calls == 1  # on a CPU
        # Each turn takes a second longer than the last, and `a` twice as long as its turn would.
        return {turn: [float(i) * function()] * rounds for i, (turn, function) in enumerate(functions.items(), 1)}

    monkeypatch.setattr(aggregation, "times", times)
    result = aggregation.beside_plain({"plain": lambda: 1, "a": lambda: 2, "b": lambda: 1})
    assert {name: each["seconds"] for name, each in result.items()} == {"plain": [2, 2], "a": [8, 8], "b": [6, 6]}
    # What only grows with time cancels.
    assert {name: each["ratios"] for name, each in result.items()} == {"plain": [1, 1], "a": [2, 2], "b": [1, 1]}


@pytest.mark.parametrize(("backend", "calls"), [("cpu", 1), ("gpu", 10)])
def test_on_an_accelerator_a_turn_is_several_calls(monkeypatch, backend, calls):
    counts = {"plain": 0, "a": 0}

    def count(name):
        counts[name] += 1

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    result = aggregation.beside_plain({name: lambda name=name: count(name) for name in counts})
    turns = 3 * calls  # two rounds, and one that is not counted
    assert counts == {"plain": 4 * turns, "a": turns}  # plain's own turn, before it, before a, and after all
    assert [len(each["seconds"]) for each in result.values()] == [2, 2]


def test_no_parameter_stays_zero():
    model = backbones.build("resnet18", "float32", scan=False)
    before = {path: np.asarray(p) for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert any((p == 0).all() for p in before.values())
    aggregation.stir(model)
    after = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    assert all((p[...] != 0).all() and p.dtype == before[path].dtype for path, p in after.items())
    assert model(jnp.ones((2, 8, 8, 3))).shape == (2, 1000)


def measurement(step, memory):
    return {
        "parameters": 1_500_000,
        "tracing": 1.0,
        "compiling": 3.0 * memory,
        "temporary_bytes": int(1e7 * memory),
        "peak_bytes": int(2e7 * memory),
        "step": {"seconds": [0.1 * s for s in step], "ratios": step},
        "forward": {"seconds": [0.05, 0.05], "ratios": [1.0, 1.0]},
    }


RESULTS = {
    "plain": measurement([0.9, 1.0, 1.02], 1.0),
    "rla": measurement([1.5, 1.6, 1.7], 1.2),
    "s6la": measurement([1.1, 1.2, 1.5], 1.4),
}


def test_costs_are_multiples_of_the_plain_networks():
    relative = aggregation.measured(RESULTS)
    assert relative["plain"] == {"step": [0.9, 1.0, 1.02], "forward": [1.0, 1.0], "memory": [1.0], "compiling": [1.0]}
    assert relative["s6la"]["step"] == [1.1, 1.2, 1.5]
    assert relative["s6la"]["memory"] == [pytest.approx(1.4)]
    assert relative["s6la"]["compiling"] == [pytest.approx((1 + 3 * 1.4) / 4)]
    table = aggregation.table_of_measurements("resnet18", RESULTS)
    *_, row = zip(*(column.cells for column in table.columns), strict=True)
    step, forward = ("120.0", "1.20 (1.10-1.50)"), ("50.0", "1.00 (1.00-1.00)")
    assert row == ("s6la", "1.500", *step, *forward, "14", "1.40", "28", "1.0 + 4.2", "1.30")


def test_estimates_are_too_also_where_the_chip_needs_no_memory():
    results = {
        "plain": {"milliseconds": 2.0, "temporary_megabytes": 0.0},
        "s6la": {"milliseconds": 3.0, "temporary_megabytes": 0.0},
    }
    relative = aggregation.estimated(results)
    assert relative["s6la"]["step"] == [1.5]
    assert np.isnan(relative["s6la"]["memory"]).all()
    assert [bar.met for bar in aggregation.bars("resnet18", relative)] == [False, False]


def test_bars_are_of_medians_to_the_plain_network_and_to_the_rivals():
    bars = aggregation.bars("resnet18", aggregation.measured(RESULTS))
    expected = [
        ("step, of plain's", 1.2, "at most 1.25", True),
        ("memory, of plain's", 1.4, "at most 1.10", False),
        ("step, of rla's", 0.75, "less than 1", True),
        ("memory, of rla's", 1.4 / 1.2, "less than 1", False),
    ]
    assert [(bar.cost, pytest.approx(bar.value), bar.wanted, bar.met) for bar in bars] == expected
    equal = {method: {"step": [1.25], "memory": [1.10]} for method in ("rla", "s6la")}
    assert [bar.met for bar in aggregation.bars("resnet18", equal)] == [True, True, False, False]
    assert aggregation.bars("resnet18", {"plain": equal["rla"], "rla": equal["rla"]}) == []


def test_picture_shows_medians_and_limits():
    relative = aggregation.measured(RESULTS)
    for kept, limits in [(relative, [1.25, 1.10]), ({"plain": relative["plain"]}, [])]:
        (axes,) = aggregation.picture({"resnet18": kept}, "title").axes
        heights = [bar.get_y() + bar.get_height() for bar in axes.patches]
        shown = [np.median(of[kind]) for kind in ("step", "forward", "memory") for of in kept.values()]
        np.testing.assert_allclose(heights, shown)
        lines = [path.vertices for each in axes.collections for path in each.get_paths() if len(path) == 2]
        assert [start[1] for start, end in lines if start[0] < end[0]] == limits  # those of the extremes are upright
        assert [label.get_text() for label in axes.get_xticklabels()] == list(kept)


@pytest.mark.slow
def test_run_writes_what_it_measured(tmp_path, capsys):
    with flagsaver.as_parsed(dtype="bfloat16"):
        aggregation.main([])
    record = json.loads((tmp_path / "aggregation_bfloat16.json").read_text())
    results = record["networks"]["resnet18"]
    assert list(results) == ["plain", "rla", "s6la"]
    parameters = [result["parameters"] for result in results.values()]
    assert parameters[0] < parameters[2] < parameters[1]  # as the widths
    for result in results.values():
        # Gradients of all parameters are results.
        assert result["peak_bytes"] > result["temporary_bytes"] + 4 * result["parameters"]
        for part in ("step", "forward"):
            assert [len(result[part][field]) for field in ("seconds", "ratios")] == [2, 2]
            assert min(result[part]["seconds"]) > 0
    assert record["where"]["jax"] == jax.__version__
    assert [record["where"][flag] for flag in ("batch", "dtype")] == ["2", "bfloat16"]
    (bar, *_), printed = record["bars"]["resnet18"], capsys.readouterr().out
    assert f"resnet18, S6LA's step, of plain's: {bar['value']:.3f}, at most 1.25 is wanted" in printed
    with Image.open(tmp_path / "aggregation_bfloat16.png") as picture:
        assert picture.width > 500


def test_methods_can_be_left_out_but_not_the_plain_network():
    assert aggregation.methods("resnet18") == ["plain", "rla", "s6la"]
    with flagsaver.as_parsed(aggregations="s6la"):
        assert aggregation.methods("resnet18") == ["plain", "s6la"]


@pytest.mark.parametrize("flag", ["models", "aggregations"])
def test_unknown_names_are_rejected(flag):
    values = {flag: "s6la,alexnet"}
    with flagsaver.as_parsed(**values), pytest.raises(app.UsageError, match=rf"--{flag} must be of .*got alexnet"):
        aggregation.main([])


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with flagsaver.as_parsed(target="tpu"), pytest.raises(SystemExit, match=r"pip install -e '\.\[tpu\]'"):
        aggregation.main([])


def test_estimates_for_a_tpu(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
    with flagsaver.as_parsed(target="tpu"):
        aggregation.main([])
    record = json.loads((tmp_path / "tpu_aggregation_bfloat16.json").read_text())
    results = record["networks"]["resnet18"]
    assert list(results) == ["plain", "rla", "s6la"]
    assert all(0 < result["products"] < 1 for result in results.values())
    value = results["s6la"]["milliseconds"] / results["plain"]["milliseconds"]
    assert record["bars"]["resnet18"][0]["value"] == pytest.approx(value)
    with Image.open(tmp_path / "tpu_aggregation_bfloat16.png") as picture:
        assert picture.width > 500
