import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from modules import drawn

from ssm_jax.layers.channel_attention import CBAM, ECA, SqueezeExcite
from ssm_jax.layers.norm import BatchNorm
from ssm_jax.models.resnet import (
    BasicBlock,
    Bottleneck,
    ResNet,
    pooled_projection,
    resnet_cifar,
    stem_3x3,
    stem_deep,
)
from ssm_jax.pretrained import load_torch

partial = functools.partial
TIMM_SE = partial(SqueezeExcite, divisor=8, use_bias=True)
GOLDEN = {
    "resnet_bottleneck": {},
    "resnet_d_odd": {
        "stem": stem_deep,
        "stem_width": 16,
        "block": partial(Bottleneck, shortcut=pooled_projection),
    },
    "resnext": {"block": partial(Bottleneck, groups=4, base_width=16)},
    "se_resnet": {"block": partial(Bottleneck, channel_attention=TIMM_SE)},
    "cbam_resnet": {"block": partial(Bottleneck, channel_attention=CBAM)},
    "resnet_train_default": {"stem": stem_deep, "stem_width": 8},
}


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def some(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def loaded(shared, name):
    """The network of a golden file, its arrays and what it was made with."""
    with np.load(shared / f"golden/timm/{name}.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    made = meta["kwargs"]
    model = nnx.eval_shape(
        lambda: ResNet(
            made["num_classes"], depths=made["layers"], dims=made["channels"], **GOLDEN[name], rngs=nnx.Rngs(0)
        )
    )
    load_torch(model, some(arrays, "param/"))
    return model, arrays, meta


def as_ours(model, arrays, name):
    """Arrays called `name`, such as gradients, as the state of the network; what they lack is the network's own."""
    model = nnx.clone(model)
    load_torch(model, some(arrays, "param/") | some(arrays, name))
    return parts(model)[1:]


def parts(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def run(model, f=lambda model, *args: model(*args)):
    """A compiled function of (params, rest, *args) that gives the result and the new rest, and these two."""
    graphdef, params, rest = parts(model)

    def pure(params, rest, *args):
        model = nnx.merge(graphdef, params, rest, copy=True)
        y = f(model, *args)
        return y, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))

    return pure, params, rest


def call(model, f, *args):
    pure, params, rest = run(model, f)
    return jax.jit(pure)(params, rest, *args)[0]


def small(num_classes=5, **options):
    """A drawn network of two stages, with possible running variances."""
    options = {"depths": (1, 2), "dims": (2, 4), "stem_width": 4} | options
    model = drawn(lambda: ResNet(num_classes, **options, rngs=nnx.Rngs(0)))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.var[...] = jnp.square(module.var[...]) + 0.5
    return model


def assert_close(ours, expected, tolerance):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_all_close(ours, expected, tolerance):
    """Leaf by leaf, each compared with its own largest number."""
    jax.tree.map_with_path(lambda path, a, b: assert_close(a, b, tolerance), ours, expected)


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - {"resnet_train_default"}))
def test_networks_are_timms(shared, name):
    model, arrays, _ = loaded(shared, name)
    model.eval()
    x = channels_last(arrays["x"])
    everything = lambda model, x: (model.stem(x), *model.features(x), model(x))  # noqa: E731
    *maps, logits = call(model, everything, x)
    for i, ours in enumerate(maps):
        assert_close(ours, channels_last(arrays[f"feat/{i}"]), 2e-6)
    assert_close(logits, arrays["logits"], 2e-6)
    if "attention" in getattr(GOLDEN[name].get("block"), "keywords", {}):
        before, after = (channels_last(arrays[f"tap/layer1.0.{module}"]) for module in ("bn3", "se"))
        assert_close(call(model, lambda model, x: model.stages[0].blocks[0].se(x), before), after, 2e-6)


def test_gradients_are_timms(shared):
    model, arrays, _ = loaded(shared, "se_resnet")
    f, params, rest = run(nnx.view(model, use_running_average=True))
    loss = lambda params, x: jnp.sum(f(params, rest, x)[0] * arrays["grad_w"])  # noqa: E731
    grads, grad_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, channels_last(arrays["x"]))
    assert_all_close(grads, as_ours(model, arrays, "grad/")[0], 1e-5)
    assert_close(grad_x, channels_last(arrays["grad_x"]), 1e-5)


def test_two_training_steps_are_timms(shared):
    model, arrays, meta = loaded(shared, "resnet_train_default")
    f, params, rest = run(model)
    made = meta["optimizer"]
    optimizer = optax.chain(
        optax.add_decayed_weights(made["weight_decay"]), optax.sgd(made["lr"], momentum=made["momentum"])
    )
    opt_state = optimizer.init(params)

    @jax.jit
    def train(params, rest, opt_state, x, labels):
        def loss(params):
            logits, new = f(params, rest, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (logits, new)

        (value, (logits, rest)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, (value, logits, grads)

    for i in (0, 1):
        x, labels = channels_last(arrays[f"x/{i}"]), jnp.asarray(arrays[f"y/{i}"].astype(np.int32))
        params, rest, opt_state, (loss, logits, grads) = train(params, rest, opt_state, x, labels)
        assert_close(loss, arrays[f"loss/{i}"], 1e-5)
        assert_close(logits, arrays[f"logits/{i}"], 1e-4)
        assert_all_close(rest, as_ours(model, arrays, f"buffer_after_forward/{i}/")[1], 1e-5)
        if i == 0:
            assert_all_close(grads, as_ours(model, arrays, "grad/")[0], 1e-4)
        assert_all_close(params, as_ours(model, arrays, f"param_after_step/{i}/")[0], 1e-4)
    f, _, _ = run(nnx.view(model, use_running_average=True))
    logits, after = jax.jit(f)(params, rest, channels_last(arrays["x/0"]))
    assert_close(logits, arrays["logits_eval_after"], 1e-4)
    assert_all_close(after, rest, 0)


def with_block(block, **options):
    return {"block": partial(block, **options)}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (partial(ResNet, depths=(2, 2, 2, 2), block=BasicBlock), 11_689_512),
        (partial(ResNet, depths=(3, 4, 6, 3), block=BasicBlock), 21_797_672),
        (partial(ResNet, depths=(3, 4, 6, 3)), 25_557_032),
        (partial(ResNet, depths=(3, 4, 23, 3)), 44_549_160),
        (partial(ResNet, depths=(3, 8, 36, 3)), 60_192_808),
        (partial(ResNet, depths=(3, 4, 6, 3), stem=stem_deep), 25_576_264),
        (partial(ResNet, depths=(3, 4, 6, 3), **with_block(Bottleneck, groups=32, base_width=4)), 25_028_904),
        (partial(ResNet, depths=(3, 4, 6, 3), **with_block(Bottleneck, base_width=128)), 68_883_240),
        (partial(ResNet, depths=(3, 4, 6, 3), **with_block(Bottleneck, channel_attention=TIMM_SE)), 28_088_024),
        (partial(ResNet, depths=(3, 4, 6, 3), **with_block(Bottleneck, channel_attention=ECA)), 25_557_118),
        (partial(ResNet, depths=(3, 4, 6, 3), **with_block(Bottleneck, channel_attention=CBAM)), 28_073_576),
    ],
)
def test_numbers_of_parameters_are_timms(build, expected):
    model = nnx.eval_shape(lambda: build(1000, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == expected


def convolution(x, layer, stride=1):
    """With loops over the taps, in float64."""
    kernel = np.asarray(layer.kernel[...], float)
    k, (_, h, w, _) = len(kernel), x.shape
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    return sum(
        padded[:, row : row + h : stride, column : column + w : stride] @ kernel[row, column]
        for row, column in np.ndindex(k, k)
    )


def batch_norm(x, layer):
    deviation = np.sqrt(x.var((0, 1, 2)) + 1e-5)
    return (x - x.mean((0, 1, 2))) / deviation * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


@pytest.mark.parametrize(("in_channels", "stride"), [(4, 1), (3, 1), (4, 2), (3, 2)])
def test_basic_block_is_two_convolutions_and_a_shortcut(in_channels, stride):
    block, x = drawn(lambda: BasicBlock(in_channels, 4, stride=stride, rngs=nnx.Rngs(0))), images(2, 5, 6, in_channels)
    expected = np.maximum(batch_norm(convolution(x, block.conv1, stride), block.bn1), 0)
    expected = batch_norm(convolution(expected, block.conv2), block.bn2)
    if (in_channels, stride) == (4, 1):
        assert block.downsample is None
        expected += x
    else:
        conv, norm = block.downsample.layers
        expected += batch_norm(convolution(x, conv, stride), norm)
    assert_close(call(block, lambda block, x: block(x), x), np.maximum(expected, 0), 1e-5)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_attention_is_the_last_of_the_branch(block):
    class Twice(nnx.Module):
        def __init__(self, channels, *, rngs):
            self.channels = channels

        def __call__(self, x):
            return 2 * x

    plain = drawn(lambda: block(8, 2, rngs=nnx.Rngs(0)))
    double = drawn(lambda: block(8, 2, channel_attention=Twice, rngs=nnx.Rngs(0)))
    assert double.se.channels == plain.out_channels == {BasicBlock: 2, Bottleneck: 8}[block]
    x = images(2, 5, 6, 8)
    branch, identity = (
        call(plain, f, x)
        for f in (lambda m, x: m.branch(x, m.conv1), lambda m, x: m.downsample(x) if m.downsample else x)
    )
    assert_close(call(plain, lambda m, x: m(x), x), np.maximum(identity + branch, 0), 1e-6)
    assert_close(call(double, lambda m, x: m(x), x), np.maximum(identity + 2 * branch, 0), 1e-6)


def test_pooled_shortcut_averages_the_positions_there_are():
    block = drawn(lambda: Bottleneck(3, 2, stride=2, shortcut=pooled_projection, rngs=nnx.Rngs(0)))
    pool, x = block.downsample.layers[0], images(2, 5, 4, 3)
    expected = [
        [x[:, row : row + 2, column : column + 2].mean((1, 2)) for column in range(0, 4, 2)] for row in range(0, 5, 2)
    ]
    assert_close(pool(jnp.asarray(x)), np.moveaxis(np.array(expected), 2, 0), 1e-6)


def test_blocks_start_as_their_shortcut():
    for block in (BasicBlock, Bottleneck):
        model = ResNet(3, depths=(2,), dims=(4,), block=block, rngs=nnx.Rngs(0))
        second = model.stages[0].blocks[1]
        x = images(2, 4, 4, second.out_channels)
        np.testing.assert_array_equal(call(second, lambda m, x: m(x), x), np.maximum(x, 0))


def test_initial_values():
    model = ResNet(50, depths=(1, 1), dims=(32, 64), rngs=nnx.Rngs(0))
    block = model.stages[1].blocks[0]
    for conv in (model.conv1, block.conv1, block.conv2, block.conv3, block.downsample.layers[0]):
        kernel = np.asarray(conv.kernel[...])
        assert np.std(kernel) == pytest.approx((2 / (kernel.shape[0] ** 2 * kernel.shape[-1])) ** 0.5, rel=0.05)
        assert np.abs(np.mean(kernel)) < 0.1 * np.std(kernel)
        assert np.abs(kernel).max() > 3 * np.std(kernel)  # normal, and not truncated
        assert conv.bias is None
    norms = {path: m for path, m in nnx.iter_modules(model) if isinstance(m, BatchNorm)}
    assert len(norms) == 9
    for path, norm in norms.items():
        np.testing.assert_array_equal(norm.scale[...], 0.0 if path[-1] == "bn3" else 1.0)
        np.testing.assert_array_equal(norm.bias[...], 0)
        np.testing.assert_array_equal(
            [norm.mean[...], norm.var[...]], [np.zeros_like(norm.mean), np.ones_like(norm.var)]
        )
    for values in (model.head.kernel[...], model.head.bias[...]):
        assert 0.9 / 16 < np.abs(values).max() <= 1 / 16


def test_stem_pooling_and_stages_have_their_sizes():
    model = small(depths=(1, 1, 1, 1), dims=(2, 4, 6, 8))
    everything = lambda model, x: (model.stem(x), *model.features(x))  # noqa: E731
    shapes = [x.shape[1:] for x in call(model, everything, images(2, 65, 47, 3))]
    assert shapes == [(33, 24, 4), (17, 12, 8), (9, 6, 16), (5, 3, 24), (3, 2, 32)]
    model = drawn(lambda: resnet_cifar(10, depth=11, rngs=nnx.Rngs(0)))
    shapes = [x.shape[1:] for x in call(model, everything, images(2, 32, 32, 3))]
    assert shapes == [(32, 32, 16), (32, 32, 64), (16, 16, 128), (8, 8, 256)]


@pytest.mark.parametrize(("depth", "blocks"), [(11, 1), (20, 2), (56, 6), (110, 12)])
def test_cifar_depths_count_convolutions_and_classifier(depth, blocks):
    model = nnx.eval_shape(lambda: resnet_cifar(10, depth=depth, rngs=nnx.Rngs(0)))
    assert [len(stage.blocks) for stage in model.stages] == [blocks] * 3
    layers = [m for path, m in nnx.iter_modules(model) if isinstance(m, nnx.Conv | nnx.Linear) and "layers" not in path]
    assert len(layers) == depth  # shortcuts are not counted


def test_cifar_networks_take_the_arguments_of_others():
    build = partial(resnet_cifar, 10, depth=20, dims=(2, 4, 8), block=BasicBlock, in_channels=1)
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    assert (model.conv1.kernel.shape, model.head.kernel.shape) == ((3, 3, 1, 16), (8, 10))


@pytest.mark.parametrize(
    ("depth", "near"), [(50, "47 or 56"), (12, "11 or 20"), (10, "11"), (2, "11"), (0, "11"), (-20, "11")]
)
def test_other_cifar_depths_are_rejected(depth, near):
    with pytest.raises(ValueError, match=f"depth must be 9 n \\+ 2, such as {near}, got {depth}"):
        resnet_cifar(10, depth=depth, rngs=nnx.Rngs(0))


def step(model, x):
    """Sum, logits, new running statistics and gradients of a step in training."""
    pure, params, rest = run(model, lambda model, x: model(x, rngs=nnx.Rngs(dropout=3)))

    def loss(params):
        logits, new = pure(params, rest, x)
        return jnp.sum(jnp.sin(logits)), (logits, new)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def unrolled():
    return step(small(depths=(3,), dims=(2,), drop_path=0.5), images(4, 16, 16, 3))


@pytest.mark.parametrize(
    "view", [{"scan": True}, {"remat": "nothing_saveable"}, {"scan": True, "remat": "dots_saveable"}], ids=str
)
def test_loops_and_rematerialization_change_no_number(unrolled, view):
    model = small(depths=(3,), dims=(2,), drop_path=0.5, **view)
    assert all(getattr(model.stages[0], k) == v for k, v in view.items())
    (loss, (logits, rest)), grads = step(model, images(4, 16, 16, 3))
    (expected_loss, (expected_logits, expected_rest)), expected_grads = unrolled
    assert_close(loss, expected_loss, 1e-5)
    assert_close(logits, expected_logits, 1e-5)
    assert_all_close(rest, expected_rest, 1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), grads, expected_grads)


def test_equal_blocks_are_one_loop():
    def convolutions(**options):
        f, params, rest = run(nnx.view(small(depths=(5,), dims=(2,), **options), deterministic=True))
        return str(jax.make_jaxpr(f)(params, rest, images(2, 32, 32, 3))).count("conv_general_dilated[")

    # One in the stem and one of 3 x 3 in each block; those of 1 x 1 are products.
    assert (convolutions(), convolutions(scan=True)) == (1 + 5, 1 + 2)


def test_every_parameter_is_used_and_every_statistic_moves():
    model = small(block=partial(Bottleneck, channel_attention=partial(CBAM, reduction=2)))
    (_, (_, new)), grads = step(model, images(2, 32, 32, 3))
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path
    jax.tree.map_with_path(lambda path, a, b: np.testing.assert_array_less(0, np.abs(a - b)), new, parts(model)[2])


def test_views_separate_dropping_from_batch_statistics():
    model, plain, x = small(drop_path=0.5), small(), images(4, 32, 32, 3)
    logits = lambda model, **options: np.asarray(call(model, lambda m, x: m(x, **options), x))  # noqa: E731
    np.testing.assert_array_equal(logits(nnx.view(model, deterministic=True)), logits(plain))
    evaluated = logits(nnx.view(model, deterministic=True, use_running_average=True))
    assert not np.allclose(evaluated, logits(plain))
    model.eval()
    np.testing.assert_array_equal(logits(model), evaluated)
    np.testing.assert_array_equal(logits(model, rate=2.0), evaluated)
    with pytest.raises(ValueError, match="rngs must be given in training with drop_path"):
        small(drop_path=0.5)(x)


def test_bfloat16_logits_agree_with_float32_to_rounding():
    x = images(4, 32, 32, 3)
    half, full = small(dtype=jnp.bfloat16), small()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    for view in ({"use_running_average": True}, {"use_running_average": False}):
        logits, expected = (call(nnx.view(m, **view), lambda m, x: m(x), x) for m in (half, full))
        assert logits.dtype == jnp.bfloat16
        error = np.abs(np.asarray(logits, np.float32) - expected).max()
        assert 0 < error < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"stem_width": 0}, "stem_width must be at least 1, got 0"),
        ({"depths": (1, 0)}, r"depths must be numbers of at least 1, got \(1, 0\)"),
        ({"depths": ()}, r"depths must be numbers of at least 1, got \(\)"),
        ({"dims": (0, 4)}, r"dims must be numbers of at least 1, got \(0, 4\)"),
        ({"dims": (4, 4, 4)}, r"depths and dims must be of the same stages, got \(1, 1\) and \(4, 4, 4\)"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"remat": "some"}, "remat must be one of none"),
        ({"block": partial(Bottleneck, groups=0)}, "groups must be at least 1, got 0"),
        ({"block": partial(Bottleneck, base_width=8)}, "base_width must be at least 16 for width=4, got 8"),
        ({"stem": stem_deep, "stem_width": 1}, "stem_width must be at least 2 for a deep stem, got 1"),
    ],
)
def test_impossible_arguments_are_rejected(arguments, message):
    arguments = {"num_classes": 3, "depths": (1, 1), "dims": (4, 4), "stem": stem_3x3} | arguments
    with pytest.raises(ValueError, match=message):
        ResNet(**arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels_are_rejected(channels):
    with pytest.raises(
        ValueError, match=rf"images must be \(batch, height, width, 3 channels\).* got shape \(2, 8, 8, {channels}\)"
    ):
        small()(jnp.ones((2, 8, 8, channels)))
