import functools
import re

import jax
import jax.numpy as jnp
import modules
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ssm_jax import S4ND, create_model
from ssm_jax.layers.channel_attention import CBAM, ECA, SqueezeExcite
from ssm_jax.layers.position import resample_positions
from ssm_jax.models.resnet import Bottleneck, pooled_projection, stem_deep
from ssm_jax.models.swin import resample_relative_positions
from ssm_jax.ops import truncate
from ssm_jax.pretrained import load_torch, save_safetensors
from ssm_jax.pretrained.files import read_state
from ssm_jax.pretrained.names import dialects

CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (4, 6, 8, 10), "img_size": 32}
S4 = {"mixer": {"d_state": 4}, "stem_channels": 3}
RESNET = {"depths": (2, 1), "dims": (4, 6), "stem_width": 4}
VIT = {"img_size": 16, "patch_size": 4, "d_model": 8, "depth": 2, "num_heads": 2}
SWIN = {"depths": (2, 2), "num_heads": (1, 2), "d_model": 4, "img_size": 32, "window_size": 4}
PVT = {"depths": (1, 2, 1, 1), "dims": (4, 8, 10, 16), "num_heads": (1, 2, 2, 4)}
ISOTROPIC = {"d_model": 4, "n_layers": 2}


def block(attention):
    return functools.partial(Bottleneck, channel_attention=attention, shortcut=pooled_projection)


MODELS = {
    "convnext": ("convnext_tiny", CONVNEXT),
    "convnext s4nd": ("convnext_tiny_s4nd", CONVNEXT | S4),
    "convnext s4nd global": ("convnext_tiny_s4nd", CONVNEXT | S4 | {"stem": "s4nd_patch", "downsample": "s4nd"}),
    "convnext s4nd blocks": ("convnext_tiny_s4nd", CONVNEXT | S4 | {"stem": "patch"}),
    "convnext s3d": ("convnext_tiny_s3d", CONVNEXT | {"img_size": (4, 32, 32)}),
    "resnet": ("resnet50", RESNET),
    "resnet basic": ("resnet18", RESNET),
    "resnet-d se": ("resnet50", RESNET | {"block": block(SqueezeExcite), "stem": stem_deep}),
    "resnet eca": ("resnet50", RESNET | {"block": block(ECA)}),
    "resnet cbam": ("resnet50", RESNET | {"block": block(CBAM)}),
    "resnet s6la": ("resnet50_s6la", RESNET),
    "vit": ("vit_base", VIT),
    "deit": ("deit_tiny", VIT),
    "deit s6la": ("deit_tiny_s6la", VIT),
    "deit distilled": ("deit_tiny_distilled", VIT),
    "vit s4nd": ("vit_base_s4nd", {key: VIT[key] for key in VIT if key != "num_heads"} | {"mixer": {"d_state": 4}}),
    "swin": ("swin_tiny", SWIN),
    "pvt": ("pvt_v2_b0", PVT),
    "pvt linear": ("pvt_v2_b2_li", PVT),
    "isotropic": ("isotropic_s4nd", ISOTROPIC | {"mixer": {"d_state": 4}}),
    "isotropic conv": ("isotropic_conv2d", ISOTROPIC),
}


def builder(name, num_classes=5, **overrides):
    model, arguments = MODELS[name]
    return lambda: create_model(model, num_classes=num_classes, **arguments | overrides, rngs=nnx.Rngs(0))


def values(model):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(nnx.state(model))}


def assert_equal(a, b):
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], strict=True, err_msg=path)


@pytest.fixture
def saved(tmp_path):
    """A network by name, and the state dict that is written of it."""

    def save(name, **overrides):
        model = modules.drawn(builder(name, **overrides))
        save_safetensors(model, tmp_path / "saved.safetensors", overwrite=True)
        return model, read_state(tmp_path / "saved.safetensors")

    return save


@pytest.mark.parametrize("abstract", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_saved_weights_come_back_exactly(saved, name, abstract):
    model, state = saved(name)
    loaded = nnx.eval_shape(builder(name)) if abstract else modules.drawn(builder(name), seed=1)
    load_torch(loaded, state)
    assert_equal(loaded, model)


OFFICIAL = {
    "timm/convnext": ("convnext", {"dims": (8, 12, 16, 20)}),
    "timm/deit": ("deit", {"img_size": 64, "patch_size": 8, "d_model": 48, "depth": 3, "num_heads": 3}),
    "timm/pvt_v2": ("pvt", {"depths": (2, 1, 2, 1), "dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}),
    "timm/resnet_bottleneck": ("resnet", {"depths": (2, 1, 2, 1), "dims": (8, 12, 16, 20), "stem_width": 64}),
    "timm/swin_w4": (
        "swin",
        {"img_size": 64, "d_model": 12, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 6, 12), "window_size": 4},
    ),
    "s4nd/model_vit_s4nd_dplr": (
        "vit s4nd",
        {"img_size": 32, "patch_size": 8, "d_model": 8, "depth": 2, "mixer": {"d_state": 8}},
    ),
}
DIAG, DPLR = ({"mode": mode, "d_state": 8, "init": "diag-lin"} for mode in ("diag", "dplr"))
for name, kind, options in [
    ("2d_diag_patch", "convnext s4nd blocks", {"mixer": DIAG}),
    ("2d_diag_s4nd_patch", "convnext s4nd global", {"mixer": DIAG}),
    ("2d_diag_new_s4nd_patch", "convnext s4nd", {"mixer": DIAG, "downsample": "s4nd"}),
    ("2d_dplr_new_s4nd_patch", "convnext s4nd", {"mixer": DPLR, "downsample": "s4nd"}),
]:
    OFFICIAL[f"s4nd/model_convnext{name}"] = kind, {"dims": (8, 12, 16, 20), "stem_channels": 6, **options}
OFFICIAL["s4nd/model_convnext3d_dplr"] = (
    "convnext s4nd blocks",
    {"mixer": DPLR, "img_size": (4, 32, 32), "depths": (1, 1, 1, 1), "dims": (6, 8, 10, 12)},
)


@pytest.mark.parametrize("name", OFFICIAL)
def test_saved_names_and_shapes_are_the_official_ones(shared, saved, name):
    with np.load(shared / f"golden/{name}.npz") as arrays:
        official = {key.removeprefix("param/"): arrays[key] for key in arrays if key.startswith("param/")}
        num_classes = arrays["logits" if "logits" in arrays else "rate1/y"].shape[1]
    model, overrides = OFFICIAL[name]
    _, state = saved(model, num_classes=num_classes, **overrides)
    described = lambda state: {key: (value.shape, value.dtype.kind) for key, value in state.items()}  # noqa: E731
    counters = {key for key in official if key.endswith("num_batches_tracked")}
    assert described(state) == described({key: official[key] for key in official.keys() - counters})


def affine(name, other):
    return [(f"{name}.weight", f"{other}.weight"), (f"{name}.bias", f"{other}.bias")]


def torchvision_convnext(depths=CONVNEXT["depths"]):
    """Pairs of timm's name and torchvision's."""
    yield from affine("stem.0", "features.0.0")
    yield from affine("stem.1", "features.0.1")
    for i, depth in enumerate(depths):
        if i > 0:
            yield from affine(f"stages.{i}.downsample.0", f"features.{2 * i}.0")
            yield from affine(f"stages.{i}.downsample.1", f"features.{2 * i}.1")
        for j in range(depth):
            timm, here = f"stages.{i}.blocks.{j}", f"features.{2 * i + 1}.{j}"
            yield f"{timm}.gamma", f"{here}.layer_scale"
            for name, number in [("conv_dw", 0), ("norm", 2), ("mlp.fc1", 3), ("mlp.fc2", 5)]:
                yield from affine(f"{timm}.{name}", f"{here}.block.{number}")
    yield from affine("head.norm", "classifier.0")
    yield from affine("head.fc", "classifier.2")


def authors_convnext(depths=CONVNEXT["depths"]):
    yield from affine("stem.0", "downsample_layers.0.0")
    yield from affine("stem.1", "downsample_layers.0.1")
    for i, depth in enumerate(depths):
        if i > 0:
            yield from affine(f"stages.{i}.downsample.0", f"downsample_layers.{i}.0")
            yield from affine(f"stages.{i}.downsample.1", f"downsample_layers.{i}.1")
        for j in range(depth):
            timm, here = f"stages.{i}.blocks.{j}", f"stages.{i}.{j}"
            yield f"{timm}.gamma", f"{here}.gamma"
            for name, other in [
                ("conv_dw", "dwconv"),
                ("norm", "norm"),
                ("mlp.fc1", "pwconv1"),
                ("mlp.fc2", "pwconv2"),
            ]:
                yield from affine(f"{timm}.{name}", f"{here}.{other}")
    yield from affine("head.norm", "norm")
    yield from affine("head.fc", "head")


def torchvision_vit():
    yield "cls_token", "class_token"
    yield "pos_embed", "encoder.pos_embedding"
    yield from affine("patch_embed.proj", "conv_proj")
    for i in range(VIT["depth"]):
        timm, here = f"blocks.{i}", f"encoder.layers.encoder_layer_{i}"
        yield f"{timm}.attn.qkv.weight", f"{here}.self_attention.in_proj_weight"
        yield f"{timm}.attn.qkv.bias", f"{here}.self_attention.in_proj_bias"
        yield from affine(f"{timm}.attn.proj", f"{here}.self_attention.out_proj")
        for name, other in [("norm1", "ln_1"), ("norm2", "ln_2"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3")]:
            yield from affine(f"{timm}.{name}", f"{here}.{other}")
    yield from affine("norm", "encoder.ln")
    yield from affine("head", "heads.head")


def swin(patches, stage, downsample, fc1, fc2):
    yield from affine("patch_embed.proj", patches[0])
    yield from affine("patch_embed.norm", patches[1])
    for i, depth in enumerate(SWIN["depths"]):
        if i > 0:
            yield f"layers.{i}.downsample.reduction.weight", f"{downsample.format(i)}.reduction.weight"
            yield from affine(f"layers.{i}.downsample.norm", f"{downsample.format(i)}.norm")
        for j in range(depth):
            timm, here = f"layers.{i}.blocks.{j}", f"{stage(i)}.{j}"
            table = "attn.relative_position_bias_table"
            yield f"{timm}.{table}", f"{here}.{table}"
            for name in ("norm1", "norm2", "attn.qkv", "attn.proj"):
                yield from affine(f"{timm}.{name}", f"{here}.{name}")
            yield from affine(f"{timm}.mlp.fc1", f"{here}.{fc1}")
            yield from affine(f"{timm}.mlp.fc2", f"{here}.{fc2}")
    yield from affine("norm", "norm")
    yield from affine("head.fc", "head")


def torchvision_swin():
    return swin(("features.0.0", "features.0.2"), lambda i: f"features.{2 * i + 1}", "features.2", "mlp.0", "mlp.3")


def authors_swin():
    patches = ("patch_embed.proj", "patch_embed.norm")
    return swin(patches, lambda i: f"layers.{i}.blocks", "layers.0.downsample", "mlp.fc1", "mlp.fc2")


def authors_pvt():
    for i, depth in enumerate(PVT["depths"]):
        timm = "patch_embed" if i == 0 else f"stages.{i}.downsample"
        for part in ("proj", "norm"):
            yield from affine(f"{timm}.{part}", f"patch_embed{i + 1}.{part}")
        for j in range(depth):
            timm, here = f"stages.{i}.blocks.{j}", f"block{i + 1}.{j}"
            attention = ["attn.q", "attn.kv", "attn.proj"] + (["attn.sr", "attn.norm"] if i < 3 else [])
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2", *attention):
                yield from affine(f"{timm}.{name}", f"{here}.{name}")
            yield from affine(f"{timm}.mlp.dwconv", f"{here}.mlp.dwconv.dwconv")
        yield from affine(f"stages.{i}.norm", f"norm{i + 1}")
    yield from affine("head", "head")


DIALECTS = {
    "torchvision's convnext": ("convnext", torchvision_convnext),
    "authors' convnext": ("convnext", authors_convnext),
    "torchvision's vit": ("deit", torchvision_vit),
    "torchvision's swin": ("swin", torchvision_swin),
    "authors' swin": ("swin", authors_swin),
    "authors' pvt": ("pvt", authors_pvt),
}


def translated(state, pairs):
    """A state by timm's names, by others."""
    pairs = dict(pairs)
    assert pairs.keys() == state.keys()
    layer_scale = lambda name, value: value[:, None, None] if name.endswith("layer_scale") else value  # noqa: E731
    return {pairs[name]: layer_scale(pairs[name], value) for name, value in state.items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_names_of_other_programs_are_understood(saved, dialect):
    name, pairs = DIALECTS[dialect]
    model, state = saved(name)
    state = translated(state, pairs())
    state |= {"x.relative_position_index": np.ones(3), "x.attn_mask": np.ones(3), "x.num_batches_tracked": np.ones(())}
    loaded = nnx.eval_shape(builder(name))
    load_torch(loaded, state)
    assert_equal(loaded, model)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_errors_speak_the_language_of_the_file(saved, dialect):
    name, pairs = DIALECTS[dialect]
    state = translated(saved(name)[1], pairs())
    missing = sorted(state)[7]
    shape = state.pop(missing).shape
    with pytest.raises(ValueError, match="do not fit") as error:
        load_torch(nnx.eval_shape(builder(name)), state)
    assert str(error.value).splitlines()[1:] == [f"  {missing} {shape} is missing"]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["swin", "isotropic"])
def test_every_problem_is_reported_or_counted(saved, name, seed):
    rng = np.random.default_rng(seed)
    _, state = saved(name)
    body = [key for key in state if not key.startswith(("head", "decoder"))]
    body = [key for key in body if not key.endswith(("l_kernel", "_table"))]
    counts = rng.integers(0, 9, 3)
    missing, misshaped = np.split(rng.permutation(body)[: counts[:2].sum()], counts[:1])
    unexpected = [f"new.{i}" for i in range(counts[2])]
    broken = {key: state[key] for key in rng.permutation(list(state)) if key not in missing}
    broken |= {key: np.ones((*state[key].shape, 2)) for key in misshaped} | {key: np.ones(1) for key in unexpected}
    model = modules.drawn(builder(name), seed=1)
    before = values(model)
    if not counts.any():
        load_torch(model, broken)
        return
    with pytest.raises(ValueError, match="do not fit") as error:
        load_torch(model, broken)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert len(lines) <= 18
    for keys, said in [
        (misshaped, lambda key: f"{key} has shape {(*state[key].shape, 2)} instead of {state[key].shape}"),
        (missing, lambda key: f"{key} {state[key].shape} is missing"),
        (unexpected, lambda key: f"{key} is unexpected"),
    ]:
        expected = sorted(said(key) for key in keys)
        expected = expected[:5] + [f"and {len(expected) - 5} more of these"] * (len(expected) > 5)
        assert lines[: len(expected)] == expected
        lines = lines[len(expected) :]
    assert not lines
    for path, value in values(model).items():
        assert value is before[path] or np.array_equal(value, before[path])


@pytest.mark.parametrize("name", ["resnet", "convnext", "deit distilled", "swin", "pvt", "isotropic"])
def test_another_number_of_classes_needs_another_head(saved, name):
    model, state = saved(name, num_classes=7)
    load = functools.partial(load_torch, modules.drawn(builder(name), seed=1))
    with pytest.raises(
        ValueError, match=r"(?s)has shape \(7, .*reset_head=True keeps the network's own values"
    ) as error:
        load(state)
    assert "missing" not in str(error.value)
    fresh, loaded = (modules.drawn(builder(name), seed=1) for _ in range(2))
    load_torch(loaded, state, reset_head=True)
    expected, own = values(model), values(fresh)
    for path, value in values(loaded).items():
        np.testing.assert_array_equal(value, own[path] if path.startswith("['head") else expected[path])


def test_weights_without_a_head_need_the_networks_own(saved):
    _, state = saved("deit")
    state = {name: value for name, value in state.items() if not name.startswith("head")}
    with pytest.raises(ValueError, match=r"(?s)head\.bias .* is missing.*reset_head=True") as error:
        load_torch(modules.drawn(builder("deit")), state)
    assert len(str(error.value).splitlines()) == 4
    load_torch(modules.drawn(builder("deit")), state, reset_head=True)
    with pytest.raises(ValueError, match="reset_head must be False for an abstract network"):
        load_torch(nnx.eval_shape(builder("deit")), state, reset_head=True)


@pytest.mark.parametrize("name", ["deit_tiny", "resnet50"])
def test_weights_of_the_plain_network_go_into_one_whose_layers_are_aggregated(name, tmp_path):
    small = {"depth": 2} if name == "deit_tiny" else {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4), "stem_width": 4}
    plain = modules.drawn(lambda: create_model(name, num_classes=3, **small, rngs=nnx.Rngs(0)))
    save_safetensors(plain, tmp_path / "plain.safetensors")
    model = modules.drawn(lambda: create_model(f"{name}_s6la", num_classes=3, **small, rngs=nnx.Rngs(0)), seed=1)
    own = values(model)
    with pytest.raises(ValueError, match=r"(?s)aggregation\..* is missing.*\n  reset_aggregation=True keeps"):
        load_torch(model, tmp_path / "plain.safetensors")
    load_torch(model, tmp_path / "plain.safetensors", reset_aggregation=True)
    plain = values(plain)
    assert any("aggregation" in path for path in own)
    for path, value in values(model).items():
        np.testing.assert_array_equal(value, own[path] if "aggregation" in path else plain[path], err_msg=path)


@pytest.mark.parametrize(("name", "tokens"), [("deit", 1), ("deit distilled", 2)])
def test_positions_are_resampled_for_another_size_of_images(saved, name, tokens):
    model, state = saved(name)
    larger = nnx.eval_shape(builder(name, img_size=24))
    load_torch(larger, state)
    expected = resample_positions(model.pos_embed[...], (4, 4), (6, 6))
    np.testing.assert_array_equal(larger.pos_embed[...], expected)
    np.testing.assert_array_equal(larger.pos_embed[:, :tokens], model.pos_embed[:, :tokens])
    np.testing.assert_array_equal(larger.head.kernel[...], model.head.kernel[...])


def test_positions_that_are_no_square_are_not_resampled(saved):
    _, state = saved("deit")
    state["pos_embed"] = state["pos_embed"][:, :-1]
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 16, 8\) instead of \(1, 17, 8\)"):
        load_torch(nnx.eval_shape(builder("deit")), state)


def test_relative_positions_are_resampled_for_windows_of_another_size(saved):
    model, state = saved("swin")
    larger = nnx.eval_shape(builder("swin", window_size=8, img_size=(64, 32)))
    load_torch(larger, state)
    windows = [stage.blocks[0].attn.window for stage in larger.stages]
    assert windows == [(8, 8), (8, 4)]
    for stage, other, window in zip(model.stages, larger.stages, windows, strict=True):
        for ours, theirs in zip(stage.blocks, other.blocks, strict=True):
            expected = resample_relative_positions(ours.attn.relative_position_bias_table[...], window)
            np.testing.assert_array_equal(theirs.attn.relative_position_bias_table[...], expected)


@pytest.mark.parametrize("given", [np.float16, np.float64, jnp.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_values_take_the_dtype_of_the_variables(saved, given, wanted):
    model, state = saved("resnet")
    loaded = nnx.eval_shape(builder("resnet", param_dtype=wanted))
    load_torch(loaded, {name: value.astype(given) for name, value in state.items()})
    assert loaded.conv1.kernel.dtype == wanted
    assert loaded.bn1.mean.dtype == jnp.float32
    expected = np.asarray(model.conv1.kernel[...]).astype(given).astype(wanted)
    np.testing.assert_array_equal(loaded.conv1.kernel[...], expected)


def test_the_network_does_not_share_memory_with_the_weights(saved):
    model, state = saved("deit")
    state = {name: np.array(value) for name, value in state.items()}
    loaded = nnx.eval_shape(builder("deit"))
    load_torch(loaded, state)
    for value in state.values():
        value[...] = 0
    assert_equal(loaded, model)


def test_a_sharded_network_stays_sharded(saved, mesh):
    model, state = saved("deit")
    kernel = model.head.kernel[...]
    loaded = modules.drawn(builder("deit"), seed=1)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    nnx.update(loaded, jax.device_put(nnx.state(loaded), NamedSharding(mesh, PartitionSpec())))
    loaded.head.kernel[...] = jax.device_put(loaded.head.kernel[...], sharding)
    load_torch(loaded, state)
    assert loaded.head.kernel[...].sharding == sharding
    assert loaded.head.bias[...].sharding == NamedSharding(mesh, PartitionSpec())
    np.testing.assert_array_equal(loaded.head.kernel[...], kernel)


def low_rank(l_kernel=None, **options):
    options = {"dims": 2, "mode": "dplr", "d_state": 4, "init": "diag-lin", "bidirectional": True, **options}
    return lambda: S4ND(2, l_kernel=l_kernel, **options, rngs=nnx.Rngs(0))


def stable(build, seed=0):
    """With low-rank systems near those that networks have."""
    layer = modules.drawn(build, seed)
    for kernel in layer.kernels:
        kernel.A_real[...] *= 0.1
        kernel.P[...] *= 0.1
        kernel.inv_dt[...] -= 2.0
    return layer


def after_forward_passes(layer, state, lengths):
    """Its state in the release after forward passes: read-outs C (I - Abar^length), and the lengths."""
    state = dict(state)
    with jax.enable_x64(True):
        for axis, (kernel, length) in enumerate(zip(layer.kernels, lengths, strict=True)):
            flat = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), nnx.state(kernel))
            kernel = nnx.merge(nnx.graphdef(kernel), flat)
            A, _, C, dt = kernel.continuous()
            C = np.asarray(truncate(A, C, kernel._low_rank(), dt, length))
            name = f"kernel.{axis}.C"
            assert state[name].shape == (*C.shape, 2)  # one read-out channel: the same order
            state[name] = np.stack([C.real, C.imag], -1)
            state[f"kernel.{axis}.l_kernel"] = np.array(length)
    return state


def test_read_outs_are_the_true_ones_after_forward_passes_of_the_release(tmp_path):
    layer = stable(low_rank())
    save_safetensors(layer, tmp_path / "layer.safetensors")
    state = read_state(tmp_path / "layer.safetensors")
    assert [state[f"kernel.{axis}.l_kernel"] for axis in range(2)] == [0, 0]
    trained = after_forward_passes(layer, state, (5, 9))
    assert np.abs(trained["kernel.1.C"] - state["kernel.1.C"]).max() > 0.1
    for l_kernel in (None, (5, 9)):
        loaded = nnx.eval_shape(low_rank(l_kernel))
        load_torch(loaded, trained)
        for ours, theirs in zip(layer.kernels, loaded.kernels, strict=True):
            np.testing.assert_allclose(theirs.C[...], ours.C[...], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"kernel\.1\.l_kernel is 9, the network's 8"):
        load_torch(nnx.eval_shape(low_rank((5, 8))), trained)


def test_dense_layers_have_a_skip_in_the_release_that_they_do_not_use(tmp_path):
    build = low_rank(out_channels=3, channels=2, trank=2)
    layer = modules.drawn(build)
    save_safetensors(layer, tmp_path / "layer.safetensors")
    state = read_state(tmp_path / "layer.safetensors")
    assert state["D"].shape == (2, 2)
    assert state["kernel.0.C"].shape == (2 * 2 * 3 * 2, 2, 2, 2)
    for direction, rank, out, channel in np.ndindex(2, 2, 3, 2):
        ours = layer.kernels[0].C[:, direction, rank, 3 * channel + out]
        theirs = state["kernel.0.C"][((2 * direction + rank) * 3 + out) * 2 + channel]
        np.testing.assert_array_equal(np.moveaxis(theirs, -1, 0), ours)
    loaded = nnx.eval_shape(build)
    load_torch(loaded, state | {"D": np.ones((2, 2))})
    assert_equal(loaded, layer)


def test_weights_are_read_from_files(saved, tmp_path):
    model, _ = saved("resnet")
    loaded = nnx.eval_shape(builder("resnet"))
    load_torch(loaded, tmp_path / "saved.safetensors")
    assert_equal(loaded, model)
    missing = tmp_path / "missing.pth"
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
        load_torch(loaded, missing)


def test_the_state_dict_is_the_one_asked_for(saved):
    model, state = saved("resnet")
    loaded = nnx.eval_shape(builder("resnet"))
    load_torch(loaded, {"model": {}, "model_ema": {f"module.{name}": x for name, x in state.items()}}, key="model_ema")
    assert_equal(loaded, model)


@pytest.mark.parametrize(
    ("stem", "names"),
    [
        ("patch", ["stem.stem.0", "stem.stem.1"]),
        ("depthwise_patch", ["stem.stem.0", "stem.stem.1", "stem.stem.3", "stem.stem.5"]),
        ("new_patch", ["stem.stem.0", "stem.stem.2", "stem.stem.4"]),
        ("new_s4nd_patch", ["stem.stem.kernel.0", "stem.stem.kernel.1", "stem.post_stem.1", "stem.post_stem.3"]),
        ("s4nd_patch", ["stem.pre_stem", "stem.stem.s4conv.kernel.0", "stem.stem.fc", "stem.post_stem"]),
        ("s4nd", ["stem.pre_stem.0", "stem.pre_stem.1", "stem.stem.s4conv.kernel.0", "stem.stem.fc"]),
        ("default", ["stem.stem.0", "stem.stem.1", "stem.stem.3"]),
    ],
)
def test_stems_have_the_releases_names(stem, names):
    options = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4), "img_size": 32, "mixer": {"d_state": 2, "mode": "diag"}}
    model = nnx.eval_shape(
        lambda: create_model("convnext_tiny_s4nd", num_classes=2, stem=stem, **options, rngs=nnx.Rngs(0))
    )
    spoken = dialects(model, [path for path, _ in nnx.to_flat_state(nnx.state(model))])["S4's release"]
    stems = {name.rpartition(".")[0] for name in spoken.values() if name.startswith("stem.")}
    assert set(names) <= stems
    halving = {"stages.0.norm_layer.weight", "stages.0.downsample.conv.weight"}
    assert halving <= set(spoken.values()) if stem in ("s4nd", "default") else not halving & set(spoken.values())
    assert len(set(spoken.values())) == len(spoken)


def test_factorised_convolutions_have_the_releases_names():
    options = {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4), "img_size": (4, 32, 32)}
    model = nnx.eval_shape(lambda: create_model("convnext_tiny_s3d", num_classes=2, **options, rngs=nnx.Rngs(0)))
    spoken = dialects(model, [path for path, _ in nnx.to_flat_state(nnx.state(model))])["S4's release"]
    for name in ("stem.stem.0", "stages.1.downsample.conv", "stages.2.blocks.0.conv_dw.conv"):
        assert {f"{name}.weight", f"{name}.bias", f"{name}.time_weight"} <= set(spoken.values())
