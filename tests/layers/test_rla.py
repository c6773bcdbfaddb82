import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import assert_close, drawn, images, size, together

import ssm_jax
from ssm_jax.layers.aggregation import Stage
from ssm_jax.layers.rla import RLA
from ssm_jax.models.resnet import BasicBlock, Bottleneck, ResNet

SMALL = {"depths": (1, 3), "dims": (4, 4), "stem_width": 8}


def normal(*shape, seed=0):
    return jnp.asarray(images(*shape, seed=seed))


def stage_form(depth=1, *, last=True, **options):
    """RLA of a stage, and its blocks."""
    dtypes = {name: options[name] for name in ("dtype",) if name in options}
    blocks = [drawn(lambda: Bottleneck(8, 2, **dtypes, rngs=nnx.Rngs(0)), seed=i) for i in range(depth)]
    stage = Stage(blocks, 8, last=last)
    return drawn(lambda: RLA(stage, **{"state_dim": 4} | options, rngs=nnx.Rngs(0))), blocks


def network(**options):
    aggregation = functools.partial(RLA, state_dim=4)
    return drawn(lambda: ResNet(5, **SMALL | {"aggregation": aggregation} | options, rngs=nnx.Rngs(0)), seed=3)


def counted(name):
    return nnx.eval_shape(lambda: ssm_jax.create_model(name, num_classes=1000, rngs=nnx.Rngs(0)))


def batch_norm(norm, x):
    axes = tuple(range(x.ndim - 1))
    y = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
    return y * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def convolved(kernel, x):
    """A convolution with a kernel of odd height and width, tap by tap."""
    kernel = np.asarray(kernel[...], float)
    rows, columns = kernel.shape[:2]
    padded = np.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    h, w = x.shape[1:3]
    taps = np.ndindex(rows, columns)
    return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i, j in taps)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "parameters"), [(50, 25.871), (101, 45.003), (152, 60.771)])
def test_networks_have_the_counted_parameters(depth, parameters):
    assert round(size(counted(f"resnet{depth}_rla")) / 1e6, 3) == parameters


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "multiply_adds"), [(50, 4.455), (101, 8.334)])
def test_networks_have_the_counted_multiply_adds(depth, multiply_adds):
    model = counted(f"resnet{depth}_rla")
    assert round(ssm_jax.summary(model, (1, 224, 224, 3)).total.multiply_adds / 1e9, 3) == multiply_adds


def test_what_it_adds_to_a_network_are_five_kinds_of_parameters():
    aggregated, plain = (nnx.eval_shape(lambda name=name: network(**name)) for name in ({}, {"aggregation": None}))
    read, out, recurrent, norms, head = 4 * 4 * 4, 2 * 16 * 4, 2 * 9 * 4 * 4, 4 * 8, 8 + 4 * 5
    assert size(aggregated) - size(plain) == read + out + recurrent + norms + head


def test_the_state_is_normalised_bounded_and_convolved_after_every_block():
    module, blocks = stage_form(2)
    x, h = jnp.abs(normal(2, 3, 5, 8)), normal(2, 3, 5, 4, seed=1)
    expected = np.asarray(h, float)
    for block, cell in zip(blocks, module.cells, strict=True):
        _, branch = block.residual(x, first=together(block, cell.read, h))
        summed = expected + convolved(module.out.kernel, np.asarray(branch, float))
        expected = convolved(module.recurrent.kernel, np.tanh(batch_norm(cell.norm, summed)))
        x, h = module(block, cell, x, h, 0.0)
        assert_close(h, expected)


def test_published_is_what_the_authors_code_computes():
    module, (block,) = stage_form(**RLA.presets["published"])
    x, h = jnp.abs(normal(2, 3, 5, 8)), normal(2, 3, 5, 4, seed=1)
    y, state = module(block, module.cells[0], x, h, 0.0)
    summed = np.asarray(h, float) + convolved(module.out.kernel, np.asarray(y, float))
    assert_close(state, convolved(module.recurrent.kernel, np.tanh(batch_norm(module.cells[0].norm, summed))))


def test_the_shortcut_does_not_read_the_state():
    module, (block,) = stage_form()
    block.bn3.scale[...] = block.bn3.bias[...] = jnp.zeros(8)
    x = jnp.abs(normal(2, 4, 4, 8))
    y, _ = module(block, module.cells[0], x, normal(2, 4, 4, 4, seed=1), 0.0)
    np.testing.assert_array_equal(y, x)


def test_states_are_averaged_where_a_block_halves_the_map():
    block = drawn(lambda: BasicBlock(8, 6, stride=2, rngs=nnx.Rngs(0)))
    module = drawn(lambda: RLA(Stage([block], 6), state_dim=4, rngs=nnx.Rngs(0)), seed=1)
    x, h = jnp.abs(normal(2, 4, 6, 8)), normal(2, 4, 6, 4, seed=1)
    _, state = module(block, module.cells[0], x, h, 0.0)
    _, branch = block.residual(x, first=lambda x: block.conv1(x) + module.cells[0].read(h))
    pooled = h.reshape(2, 2, 2, 3, 2, 4).mean((2, 4))
    assert_close(state, module.update(module.cells[0], branch, pooled))
    assert state.shape == (2, 2, 3, 4)


def test_states_start_at_zero_and_go_on_from_stage_to_stage():
    module, _ = stage_form()
    x, h = normal(2, 3, 3, 8), normal(2, 3, 3, 4)
    np.testing.assert_array_equal(module.start(x, None), np.zeros((2, 3, 3, 4)))
    assert module.start(x, h) is h


def test_the_classifier_sees_the_average_of_the_last_state():
    model = nnx.view(network(), use_running_average=True)
    assert [stage.head_channels for stage in model.stages] == [0, 4]
    maps, h = model._encode(normal(2, 16, 16, 3), None)
    norm = model.stages[1].aggregation.head_norm
    seen = np.concatenate([maps[1].mean((1, 2)), np.maximum(norm(h), 0).mean((1, 2))], axis=-1)
    assert_close(model(normal(2, 16, 16, 3)), seen @ model.head.kernel[...] + np.asarray(model.head.bias[...])[None])


@functools.cache
def trained(**how):
    """A loss, batch statistics and gradients."""
    graphdef, params, rest = nnx.split(nnx.view(network(), **how), nnx.Param, ...)

    def loss(params, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return jnp.sum(jnp.sin(model(x))), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    (value, statistics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, normal(4, 16, 16, 3))
    return value, statistics, nnx.to_pure_dict(grads)


def test_loops_and_rematerialisation_change_no_number():
    plain, other = trained(), trained(scan=True, remat="nothing_saveable")
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain[2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest), plain, other)


def test_every_parameter_is_used():
    for path, gradient in jax.tree.leaves_with_path(trained()[2]):
        assert np.isfinite(gradient).all(), path
        # The first block reads zeros.
        first = [key.key for key in path[:5]] == ["stages", 0, "aggregation", "cells", 0]
        assert np.any(gradient) or (first and path[-2].key == "read"), path


def test_half_precision_keeps_the_state_in_float32():
    module, (block,) = stage_form(dtype=jnp.bfloat16)
    x = normal(2, 3, 3, 8).astype(jnp.bfloat16)
    y, h = module(block, module.cells[0], x, module.start(x, None), 0.0)
    assert y.dtype == jnp.bfloat16
    assert h.dtype == jnp.float32
    assert module.readout(y.mean((1, 2)), h).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "state_dim must be at least 1, got 0"),
        ({"state_source": "h"}, "state_source must be one of branch_out, block_out, got 'h'"),
    ],
    ids=str,
)
def test_impossible_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        stage_form(**options)


def test_blocks_have_to_be_residual():
    with pytest.raises(ValueError, match="RLA is for the blocks of a ResNet"):
        RLA(Stage([nnx.Linear(2, 2, rngs=nnx.Rngs(0))], 2), rngs=nnx.Rngs(0))
