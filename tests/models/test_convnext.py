import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import assert_close, drawn, images, split

from ssm_jax.layers import S4ND
from ssm_jax.layers.stems import Convolution, FactorizedConv, Pooled
from ssm_jax.models.convnext import ConvNeXt, convnext_3d_s4nd, convnext_s3d, convnext_s4nd
from ssm_jax.pretrained import load_torch

TINY = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "img_size": 32}
MICRO = {"depths": (3, 3, 3, 3), "dims": (64, 128, 256, 512), "img_size": 160}
VIDEO = (30, 224, 224)
STEMS = ["patch", "depthwise_patch", "new_patch", "new_s4nd_patch", "s4nd_patch", "s4nd", "default"]


def call(f, x, **options):
    return np.asarray(jax.jit(lambda x: f(x, **options))(x))


def count(build, *arguments, **options):
    model = nnx.eval_shape(lambda: build(*arguments, **options, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def small_s4nd(num_classes=5, **options):
    options = TINY | {"mixer": {"d_state": 4, "mode": "diag"}, "layer_scale": 0.5, "stem_channels": 6} | options
    return drawn(lambda: convnext_s4nd(num_classes, **options, rngs=nnx.Rngs(0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "options", "expected"),
    [
        (ConvNeXt, {}, 28_589_128),
        (ConvNeXt, MICRO | {"num_classes": 40}, 9_237_608),
        (convnext_s4nd, {"stem": "patch"}, 29_980_456),
        # The release's dense stem has a D, one number for each of 3 channels, and does not use it.
        (convnext_s4nd, {}, 30_007_057 - 3),
        (convnext_s4nd, {"downsample": "s4nd"}, 29_409_457 - 3),
        (convnext_s4nd, MICRO | {"num_classes": 40, "downsample": "s4nd"}, 9_644_209 - 3),
        (convnext_s4nd, MICRO | {"num_classes": 40, "downsample": "s4nd", "stem": "s4nd_patch"}, 9_628_040),
        (ConvNeXt, {"num_classes": 51, "img_size": VIDEO}, 28_513_107),
        (convnext_s3d, {"num_classes": 51, "img_size": VIDEO}, 27_859_406),
        (convnext_s4nd, {"num_classes": 51, "img_size": VIDEO, "stem": "patch"}, 30_113_235),
        (convnext_3d_s4nd, {"num_classes": 51}, 31_381_587),
    ],
)
def test_networks_of_the_papers_have_their_numbers_of_parameters(build, options, expected):
    assert count(build, **{"num_classes": 1000} | options) == expected


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden/timm/convnext.npz") as arrays:
        arrays = dict(arrays)
    kwargs = json.loads(str(arrays["meta"]))["kwargs"]
    options = {"depths": kwargs["depths"], "dims": kwargs["dims"], "layer_scale": kwargs["ls_init_value"]}
    model = nnx.eval_shape(lambda: ConvNeXt(kwargs["num_classes"], **options, rngs=nnx.Rngs(0)))
    load_torch(model, {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")})
    return model, arrays


def test_logits_and_stage_maps_are_timms(golden):
    model, arrays = golden
    x = np.moveaxis(arrays["x"], 1, -1)
    logits, maps = jax.jit(lambda x: (model(x), model.features(x)))(x)
    assert_close(logits, arrays["logits"])
    assert len(maps) == 4
    for i, ours in enumerate(maps):
        assert_close(np.moveaxis(ours, -1, 1), arrays[f"feat/{i}"])


def test_gradients_are_timms(golden):
    model, arrays = golden
    f, params = split(model)
    x = jnp.asarray(np.moveaxis(arrays["x"], 1, -1))
    weights = jnp.asarray(arrays["grad_w"])
    grads, grad_x = jax.jit(jax.grad(lambda p, x: jnp.sum(f(p, x) * weights), argnums=(0, 1)))(params, x)
    assert_close(np.moveaxis(grad_x, -1, 1), arrays["grad_x"])
    official = nnx.eval_shape(lambda: nnx.clone(model))
    load_torch(official, {k.removeprefix("grad/"): v for k, v in arrays.items() if k.startswith("grad/")})
    jax.tree.map(assert_close, grads, nnx.to_pure_dict(nnx.state(official)))


IMAGES = {"dims": (8, 12, 16, 20), "depths": (1, 1, 2, 1), "img_size": 32, "stem_channels": 6}
RELEASE = {
    "2d_diag_patch": IMAGES | {"stem": "patch"},
    "2d_diag_s4nd_patch": IMAGES | {"stem": "s4nd_patch", "downsample": "s4nd"},
    "2d_diag_new_s4nd_patch": IMAGES | {"downsample": "s4nd"},
    "2d_dplr_new_s4nd_patch": IMAGES | {"downsample": "s4nd"},
    "3d_dplr": {"dims": (6, 8, 10, 12), "depths": (1, 1, 1, 1), "img_size": (4, 32, 32), "stem": "patch"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASE)
def test_logits_of_s4nd_networks_are_the_releases(shared, name):
    with np.load(shared / f"golden/s4nd/model_convnext{name}.npz") as arrays:
        arrays = dict(arrays)
    mode = "dplr" if "dplr" in name else "diag"
    # The release's low-rank kernels at other rates are those of a given length, see DPLRKernel.
    mixer = {"mode": mode, "d_state": 8, "init": "diag-lin"} | ({"l_kernel": 0} if mode == "dplr" else {})
    model = nnx.eval_shape(lambda: convnext_s4nd(7, mixer=mixer, **RELEASE[name], rngs=nnx.Rngs(0)))
    load_torch(model, {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")})
    tags = [key.removesuffix("/x") for key in arrays if key.endswith("/x")]
    assert len(tags) == (1 if name.startswith("3d") else 2)
    for tag in tags:
        x = np.moveaxis(arrays[f"{tag}/x"], 1, -1).astype(np.float32)
        assert_close(call(model, x, rate=float(arrays[f"{tag}/rate"])), arrays[f"{tag}/y"], 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("downsample", ["conv", "s4nd", "s4nd_gelu"])
@pytest.mark.parametrize("stem", STEMS)
def test_every_stem_and_downsampling_gives_maps_of_a_quarter_to_a_32nd(stem, downsample):
    options = TINY | {"mixer": {"d_state": 4}, "stem": stem, "downsample": downsample}
    model = nnx.eval_shape(lambda: convnext_s4nd(5, **options, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    f = lambda state, x: nnx.merge(graphdef, state, copy=True).features(x)  # noqa: E731
    maps = jax.eval_shape(f, state, jnp.zeros((2, 32, 64, 3)))
    assert [x.shape for x in maps] == [(2, 8, 16, 8), (2, 4, 8, 12), (2, 2, 4, 16), (2, 1, 2, 20)]


@pytest.mark.parametrize(
    ("build", "img_size", "lengths"),
    [(convnext_s4nd, 64, [(16, 16), (8, 8), (4, 4), (2, 2)]), (convnext_3d_s4nd, (6, 64, 32), [(3, 16, 8)])],
)
def test_kernels_are_as_long_as_the_map_of_their_stage(build, img_size, lengths):
    options = {"depths": (1, 1, 1, 1), "dims": (2, 2, 2, 2), "img_size": img_size, "mixer": {"d_state": 4}}
    model = nnx.eval_shape(lambda: build(3, **options, rngs=nnx.Rngs(0)))
    found = [stage.blocks[0].mixer.l_max for stage in model.stages]
    assert found[: len(lengths)] == lengths


def test_global_stem_reaches_over_the_image_and_the_dense_one_over_16_pixels():
    stem = lambda name: small_s4nd(stem=name).stem.pooled.mixer  # noqa: E731
    assert stem("s4nd_patch").l_max == (32, 32)
    assert stem("new_s4nd_patch").l_max == (16, 16)


def test_pooled_is_mixer_mean_over_patches_and_gated_linear_unit():
    pooled = drawn(
        lambda: Pooled(
            Convolution(3, lengths=(4, 6), param_dtype=jnp.float32, rngs=nnx.Rngs(0)),
            3,
            5,
            window=(2, 3),
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    x = images(2, 4, 6, 3)
    y = call(pooled.mixer, x).reshape(2, 2, 2, 2, 3, 3).mean(axis=(2, 4))
    y = y @ np.asarray(pooled.fc.kernel[...]) + np.asarray(pooled.fc.bias[...])
    expected = y[..., :5] / (1 + np.exp(-y[..., 5:]))
    np.testing.assert_allclose(call(pooled, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "strides", "padding", "groups"),
    [((3, 7, 7), (1, 1, 1), (1, 3, 3), 4), ((2, 4, 4), (2, 4, 4), (0, 0, 0), 1), ((1, 2, 2), (1, 2, 2), (0, 0, 0), 1)],
)
def test_factorised_convolution_is_that_with_the_outer_product_of_its_filters(kernel, strides, padding, groups):
    arguments = {"strides": strides, "padding": [(p, p) for p in padding], "feature_group_count": groups}
    factorised = drawn(lambda: FactorizedConv(4, 8, kernel, **arguments, rngs=nnx.Rngs(0)))
    full = drawn(lambda: nnx.Conv(4, 8, kernel, **arguments, rngs=nnx.Rngs(0)))
    outer = np.asarray(factorised.time[...])[:, None, None, None, None] * np.asarray(factorised.space.kernel[...])
    full.kernel[...], full.bias[...] = jnp.asarray(outer), factorised.space.bias[...]
    x = images(2, 5, 12, 8, 4)
    expected = call(full, x)
    np.testing.assert_allclose(call(factorised, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_filters_over_time_start_as_means():
    model = nnx.eval_shape(lambda: convnext_s3d(3, **TINY | {"img_size": (4, 32, 32)}, rngs=nnx.Rngs(0)))
    assert model.stem.conv.time.shape == (2,)
    assert model.downsamples[0].conv.time.shape == (1,)
    conv = FactorizedConv(2, 2, (3, 7, 7), padding=[(1, 1), (3, 3), (3, 3)], rngs=nnx.Rngs(0))
    np.testing.assert_allclose(conv.time[...], np.full(3, 1 / 3))


@pytest.mark.parametrize("build", [ConvNeXt, convnext_s3d, convnext_3d_s4nd])
def test_video_keeps_half_of_its_frames_to_the_end(build):
    options = TINY | {"img_size": (6, 64, 64)}
    model = nnx.eval_shape(lambda: build(3, **options, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    f = lambda state, x: nnx.merge(graphdef, state, copy=True).features(x)  # noqa: E731
    maps = jax.eval_shape(f, state, jnp.zeros((2, 6, 64, 64, 3)))
    assert [x.shape for x in maps] == [(2, 3, 16, 16, 8), (2, 3, 8, 8, 12), (2, 3, 4, 4, 16), (2, 3, 2, 2, 20)]


def test_rate_reaches_every_state_space():
    model = small_s4nd(stem="s4nd_patch", downsample="s4nd")
    x, layers = images(2, 32, 32, 3), [m for _, m in nnx.iter_modules(model) if isinstance(m, S4ND)]
    assert len(layers) == 1 + 3 + 5
    rates = []
    sample = S4ND.sample_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S4ND, "sample_kernels", lambda self, *a, rate: rates.append(rate) or sample(self, *a, rate=rate))
        jax.eval_shape(lambda x: model(x, rate=2.0), jnp.asarray(x))
    assert rates == [2.0] * len(layers)


def test_a_convolutional_network_ignores_the_rate():
    model = drawn(lambda: ConvNeXt(3, **TINY, rngs=nnx.Rngs(0)))
    x = images(2, 32, 32, 3)
    np.testing.assert_array_equal(call(model, x, rate=2.0), call(model, x))


@pytest.mark.slow
def test_loops_and_rematerialisation_change_no_number():
    results = []
    for how in ({}, {"remat": "nothing_saveable"}, {"scan": True, "remat": "dots_saveable"}):
        f, params = split(small_s4nd(depths=(1, 1, 3, 1), drop_path=0.5, **how))
        loss = lambda p, x, f=f: jnp.sum(f(p, x, rngs=nnx.Rngs(dropout=1)) ** 2)  # noqa: E731
        results.append(jax.jit(jax.value_and_grad(loss))(params, jnp.asarray(images(4, 32, 32, 3))))
    for result in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(a).max()), results[0], result
        )


def test_blocks_with_state_spaces_are_equal_to_a_loop():
    model = nnx.eval_shape(lambda: convnext_s4nd(5, **TINY | {"depths": (1, 1, 4, 1)}, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(nnx.view(model, scan=True))
    f = lambda state, x: nnx.merge(graphdef, state, copy=True)(x)  # noqa: E731
    program = jax.make_jaxpr(f)(state, jnp.zeros((1, 32, 32, 3)))
    assert [eqn.params["length"] for eqn in program.eqns if eqn.primitive.name == "scan"].count(4) == 1


def test_initial_values_are_the_originals():
    build = lambda: convnext_s4nd(  # noqa: E731
        1000, depths=(1, 1, 1, 1), dims=(8, 8, 64, 64), mixer={"d_state": 4, "mode": "diag"}, rngs=nnx.Rngs(0)
    )
    model = jax.jit(lambda: nnx.to_pure_dict(nnx.state(build())))()
    block = model["stages"][3]["blocks"][0]
    np.testing.assert_array_equal(block["gamma"], np.full(64, 1e-6, np.float32))
    for weights in (block["mlp"]["fc1"], block["mlp"]["fc2"], model["downsamples"][2]["conv"], model["head"]):
        assert np.std(weights["kernel"]) == pytest.approx(0.02, rel=0.03)
        assert abs(np.mean(weights["kernel"])) < 1e-3
        np.testing.assert_array_equal(weights["bias"], 0)
    fc = model["stem"]["pooled"]["fc"]["kernel"]  # the release leaves this one as PyTorch makes it
    assert np.abs(fc).max() <= 32**-0.5
    assert np.std(fc) == pytest.approx((3 * 32) ** -0.5, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["s4nd_patch", "new_s4nd_patch", "s4nd"])
def test_every_parameter_is_used(stem):
    f, params = split(small_s4nd(stem=stem, downsample="s4nd"))
    x = jnp.asarray(images(2, 32, 32, 3))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(f(params, x)))))(params)
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


def test_bfloat16_logits_agree_with_float32_to_rounding():
    half, full = small_s4nd(dtype=jnp.bfloat16), small_s4nd()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    x = images(2, 32, 32, 3)
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm needs it
        logits, expected = call(half, x), call(full, x)
    assert logits.dtype == jnp.bfloat16
    assert 0 < np.abs(logits.astype(np.float32) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
        ({"depths": (1, 2, 3)}, r"depths must be four numbers of at least 1, got \(1, 2, 3\)"),
        ({"dims": (8, 8, 0, 8)}, "dims must be four numbers of at least 1"),
        ({"img_size": 16}, r"img_size must be at least \(32, 32\), got 16"),
        ({"img_size": (1, 32, 32)}, r"img_size must be at least \(2, 32, 32\)"),
        ({"img_size": (4, 4, 32, 32)}, "img_size must be one, two or three numbers"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ({"head_dropout": 1.0}, "head_dropout must be in"),
        ({"remat": "dots"}, "remat must be one of none, .*got 'dots'"),
        ({"stem": "new"}, "stem must be one of patch, .*got 'new'"),
        ({"downsample": "pool"}, "downsample must be one of conv, .*got 'pool'"),
    ],
    ids=str,
)
def test_impossible_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: convnext_s4nd(**{"num_classes": 3} | TINY | arguments, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("shape", [(2, 32, 32, 1), (2, 32, 32), (2, 4, 32, 32, 3), (2, 31, 32, 3)])
def test_wrong_images_are_rejected(shape):
    model = nnx.eval_shape(lambda: ConvNeXt(3, **TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="images must be"):
        model.features(jnp.zeros(shape))
