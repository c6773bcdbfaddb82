import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver
from flax import nnx

from benchmarks import backbones, compiled_backbones, operations, tpu_aot
from benchmarks.backbones import Network
from benchmarks.side_by_side import Passes
from ssm_jax import create_model, list_models

SMALL = {"depths": (2,), "dims": (4,), "stem_width": 4}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    networks = {
        "resnet18": Network(sized=False, options=SMALL),
        "resnet34": Network(baseline="resnet18", sized=False, options=SMALL),
    }
    monkeypatch.setattr(backbones, "NETWORKS", networks)
    for module in (backbones, compiled_backbones):
        monkeypatch.setattr(module, "pin", lambda cores: None)
    flags.FLAGS.mark_as_parsed()
    values = {"models": ",".join(networks), "batch": "2", "image-size": "8", "rounds": "1", "out": str(tmp_path)}
    with flagsaver.as_parsed(**values):
        yield


def without(*packages):
    """`importlib.util.find_spec` where these are not installed."""
    find = importlib.util.find_spec
    return lambda name: None if name in packages else find(name)


@pytest.mark.slow
def test_networks_are_ours_and_so_are_their_baselines(monkeypatch):
    monkeypatch.undo()
    for name, network in backbones.NETWORKS.items():
        assert name in list_models()
        assert network.baseline is None or network.baseline in backbones.NETWORKS
        size = {"img_size": 256} if network.sized else {}
        nnx.eval_shape(lambda n=name, s=size: create_model(n, num_classes=1000, rngs=nnx.Rngs(0), **s))


def test_a_step_is_the_gradient_of_the_loss_and_moves_the_statistics():
    model = backbones.build("resnet18", "float32", scan=False)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    forward, step = backbones.functions(graph)
    logits, statistics = forward(params, rest, images)
    (loss, same), gradients = step(params, rest, images)
    assert loss == pytest.approx(float(jnp.square(logits).sum() / 2), rel=1e-5)
    (features,) = nnx.merge(graph, params, rest, copy=True).features(images)
    # The gradient of the classifier is features^T logits.
    np.testing.assert_allclose(gradients["head"]["kernel"][...], features.mean((1, 2)).T @ logits, rtol=0, atol=1e-4)
    before = dict(nnx.to_flat_state(nnx.state(rest, nnx.BatchStat)))
    for new in (statistics, same):
        moved = dict(nnx.to_flat_state(new))
        assert moved.keys() == before.keys()
        assert all(np.abs(moved[path][...] - before[path][...]).max() > 0 for path in moved)


def test_time_and_memory_come_with_the_passes():
    passes, compilation = backbones.ours(backbones.build("resnet18", "bfloat16", scan=True), jnp.ones((2, 8, 8, 3)))
    logits, _ = passes.forward()
    assert (logits.shape, logits.dtype) == ((2, 1000), jnp.bfloat16)
    (_, _), gradients = passes.backward()
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert passes.peak_bytes() > compilation.temporary_bytes + sum(g.nbytes for g in jax.tree.leaves(gradients))
    assert compilation.temporary_bytes > 0
    assert min(compilation.tracing, compilation.compiling) > 0


class Tensor(np.ndarray):
    """What the check needs of PyTorch's tensors."""

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)

    def square(self):
        return np.square(self)


@pytest.mark.parametrize(
    ("logits", "gradient", "message"),
    [(1.0, 1.0, None), (1.001, 1.0, "logits differ by 1.0e-03"), (1.0, 1.01, "norms by 1.0e-02")],
)
def test_what_computes_something_else_is_rejected(logits, gradient, message):
    x = np.arange(1.0, 5.0, dtype=np.float32)
    ours = Passes(lambda: (x, None), lambda: ((0.0, None), {"w": x}), lambda: 0)
    theirs = Passes(lambda: ((logits * x).view(Tensor),), lambda: (0.0, [(gradient * x).view(Tensor)]), lambda: 0)
    if message is None:
        assert backbones.disagreement("a", ours, theirs) == (0.0, 0.0)
    else:
        with pytest.raises(ValueError, match=rf"timm's a is another function.*{message}"):
            backbones.disagreement("a", ours, theirs)


def test_ratios_are_of_medians_with_the_extremes_of_the_rounds():
    assert backbones.ratio([1.0, 2.0, 6.0], [1.0, 4.0, 5.0]) == "0.50 (0.50-1.20)"
    assert backbones.ratio([1.0], [2.0, 3.0, 4.0]) == "0.33 (0.50-0.50)"


RESULT = {
    "batch": 4,
    "first": {"ssm_jax": 9.0, "PyTorch": 0.5},
    "bytes": {"ssm_jax": 3e6, "PyTorch": 2e6},
    "forward": {"ssm_jax": [0.1, 0.1], "PyTorch": [0.2, 0.1]},
    "backward": {"ssm_jax": [0.5, 0.5], "PyTorch": [0.25, 0.25]},
}


def test_tables_show_ratios_to_the_other():
    (row,) = zip(*(column.cells for column in backbones.table_of_networks({"a": RESULT}).columns), strict=True)
    expected = "a", "PyTorch", "500.0", "100.0", "2.00 (2.00-2.00)", "0.67 (0.50-1.00)", "8.00", "3 : 2", "9.0 : 0.5"
    assert row == expected
    alone = {"batch": 1} | {part: {"ssm_jax": RESULT[part]["ssm_jax"]} for part in RESULT if part != "batch"}
    (row,) = zip(*(column.cells for column in backbones.table_of_networks({"a": alone}).columns), strict=True)
    assert row == ("a", "-", "500.0", "100.0", "-", "-", "2.00", "3", "9.0")
    (row,) = zip(*(column.cells for column in backbones.table_of_operations({"o": RESULT}).columns), strict=True)
    assert row == ("o", "500.0", "100.0", "2.00 (2.00-2.00)", "0.67 (0.50-1.00)")


def test_without_pytorch_only_ours_are_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", without("torch"))
    backbones.main([])
    assert "no PyTorch with timm" in capsys.readouterr().out
    record = json.loads((tmp_path / "backbones_float32.json").read_text())
    contestants = {name: list(result["backward"]) for name, result in record["networks"].items()}
    assert contestants == {"resnet18": ["ssm_jax"], "resnet34": ["ssm_jax", "resnet18"]}
    assert record["operations"] == {}
    assert record["where"]["jax"] == jax.__version__


def test_unknown_names_are_rejected():
    with flagsaver.as_parsed(models="resnet18,alexnet"), pytest.raises(app.UsageError, match=r"--models.*got alexnet"):
        backbones.main([])


@pytest.mark.parametrize("name", operations.operations(1))
def test_operations_have_outputs_as_large_as_their_inputs(name):
    operation = operations.operations(1)[name]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in operation.shapes]
    output = jax.eval_shape(operation.by_jax, *inputs).shape
    assert output == ((*operation.shapes[0][:-1], operation.shapes[1][1]) if "product" in name else operation.shapes[0])


@pytest.mark.parametrize(
    "operation",
    [
        operations.convolution((2, 5, 4, 6), 3),
        operations.convolution((2, 5, 4, 6), 3, groups=6),
        operations.attention((2, 5, 3, 4)),
        operations.layer_norm((2, 3, 8)),
    ],
)
def test_operations_of_pytorch_are_those_of_xla(operation):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    ours, theirs = operations.contestants(operation).values()
    np.testing.assert_allclose(theirs.forward().numpy(), ours.forward(), rtol=0, atol=1e-5)
    for mine, other in zip(ours.backward(), theirs.backward(), strict=True):
        np.testing.assert_allclose(other.numpy(), mine, rtol=0, atol=1e-5 + 1e-4 * np.abs(mine).max())


def test_timm_is_measured_beside_ours_once_it_agrees(monkeypatch, tmp_path):
    for package in ("torch", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    options = {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}
    monkeypatch.setattr(
        backbones, "NETWORKS", {"convnext_tiny": Network("convnext_tiny", sized=False, options=options)}
    )
    monkeypatch.setattr(operations, "operations", lambda batch: {"norm": operations.layer_norm((batch, 3, 4))})
    for dtype in ("float32", "bfloat16"):
        settings = flagsaver.as_parsed(models="convnext_tiny", dtype=dtype, **{"image-size": "32"})
        with settings, jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm needs it in bfloat16
            backbones.main([])
        record = json.loads((tmp_path / f"backbones_{dtype}.json").read_text())
        result = record["networks"]["convnext_tiny"]
        assert list(result["backward"]) == ["ssm_jax", "PyTorch"]
        assert all(size > 0 for size in result["bytes"].values())
        assert max(result["disagreement"]) < 1e-4
        assert list(record["operations"]["norm"]["forward"]) == ["XLA", "PyTorch"]


def test_weights_to_compare_with_leave_no_branch_closed():
    pytest.importorskip("timm", reason="timm is not installed")
    _, state = backbones.torch_module(Network(timm="resnet50", sized=False))
    assert np.abs(state["layer1.0.bn3.weight"]).max() > 0.1  # timm's starts at 0


def test_compiling_is_timed_with_and_without_loops(tmp_path):
    with flagsaver.as_parsed(models="resnet18"):
        compiled_backbones.main([])
    record = json.loads((tmp_path / "compiled_backbones.json").read_text())
    each = record["networks"]["resnet18"]
    assert list(each) == ["one by one", "loops"]
    assert all(len(rounds) == 1 and min(rounds[0]) > 0 for rounds in each.values())


def test_shares_are_of_the_chips_peaks():
    numbers = tpu_aot.Estimate(milliseconds=10.0, gigabytes=0.819, gigaflops=985.0, temporary_megabytes=0.0)
    np.testing.assert_allclose(compiled_backbones.shares(numbers), (0.5, 0.1))


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", without("libtpu"))
    with flagsaver.as_parsed(target="tpu"), pytest.raises(SystemExit, match=r"pip install -e '\.\[tpu\]'"):
        compiled_backbones.main([])


def test_estimates_for_a_tpu(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
    with flagsaver.as_parsed(models="resnet18", target="tpu"):
        compiled_backbones.main([])
    record = json.loads((tmp_path / "tpu_backbones_bfloat16.json").read_text())
    assert 0 < record["networks"]["resnet18"]["products"] < 1
