import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import assert_close, drawn, images

from ssm_jax import analysis
from ssm_jax.layers.mrla import MRLALight
from ssm_jax.layers.rla import RLA
from ssm_jax.layers.s6la import S6LAConv
from ssm_jax.layers.s6la_token import S6LAToken
from ssm_jax.models.isotropic import isotropic_conv2d
from ssm_jax.models.resnet import ResNet, stem_3x3
from ssm_jax.models.swin import SwinTransformer
from ssm_jax.models.vit import deit

CONV = functools.partial(S6LAConv, state_dim=4)
TOKEN = functools.partial(S6LAToken, state_dim=3)
RESNET = {"depths": (2, 3), "dims": (4, 4), "stem": stem_3x3, "stem_width": 8, "max_pool": False, "in_channels": 1}
DEIT = {"img_size": 16, "patch_size": 4, "d_model": 8, "depth": 3, "num_heads": 2, "in_channels": 1}
SWIN = {"img_size": 8, "patch_size": 1, "window_size": 2, "d_model": 8, "depths": (1, 2), "num_heads": (1, 1)}


def resnet(aggregation=CONV, **options):
    return lambda: ResNet(3, **RESNET | options, aggregation=aggregation, rngs=nnx.Rngs(0))


def transformer(aggregation=TOKEN, **options):
    return lambda: deit(3, **DEIT | options, aggregation=aggregation, rngs=nnx.Rngs(0))


def swin(**options):
    aggregation = functools.partial(TOKEN, **options)
    return lambda: SwinTransformer(3, **SWIN, in_channels=1, aggregation=aggregation, rngs=nnx.Rngs(0))


NETWORKS = {
    "conv": resnet(),
    "conv branch": resnet(functools.partial(CONV, state_source="branch_out", share="block")),
    "conv zoh add": resnet(functools.partial(CONV, discretization="zoh", fuse="add")),
    "class": transformer(),
    "class branch zoh": transformer(functools.partial(TOKEN, state_source="branch_out", discretization="zoh")),
    "mean": transformer(functools.partial(TOKEN, token="mean", share="stage"), distilled=True),
    "swin project": swin(stage_state="project"),
    "plain resnet": resnet(None),
    "plain transformer": transformer(None),
    "rla": resnet(functools.partial(RLA, state_dim=4)),
    "mrla": transformer(functools.partial(MRLALight, head_dim=4)),
}


def made(build):
    """With normal parameters, kernels such that maps keep their size."""
    graphdef, params, rest = nnx.split(drawn(build), nnx.Param, ...)
    scaled = jax.tree.map(lambda leaf: leaf / np.sqrt(max(leaf[..., 0].size, 1)).astype(leaf.dtype), params)
    return nnx.merge(graphdef, scaled, jax.tree.map(lambda leaf: 1 + jnp.abs(leaf), rest))


def pictures(model):
    return jnp.asarray(images(2, *((8, 6) if isinstance(model, ResNet) else (16, 16)), 1))


def recorded(model):
    return jax.jit(analysis.record)(model, pictures(model))


@functools.cache
def example(name):
    """A network and its records."""
    model = made(NETWORKS[name])
    return model, recorded(model)


def evaluated(model):
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


@jax.jit
def by_hand(model):
    """For each stage the state at its start, and for each layer its input, output and states before and after it."""
    model = evaluated(model)
    x, h, seen = model.stem(pictures(model)), None, []
    for stage in model.stages:
        module, layers = stage.aggregation, []
        first = h = module.start(x, h)
        for block, cell in zip(stage.blocks, module.cells, strict=True):
            y, new = module(block, cell, x, h, 0.0)
            layers.append((x, y, h, new))
            x, h = y, new
        seen.append((first, layers))
    return seen


def test_a_record_of_a_resnet_is_what_goes_through_it():
    model, records = example("conv")
    seen = by_hand(model)
    for record, (first, layers) in zip(records, seen, strict=True):
        assert_close(record.start, first) if np.any(first) else np.testing.assert_array_equal(record.start, first)
        assert record.branches is None
        for output, state, (_, y, _, h) in zip(record.outputs, record.states, layers, strict=True):
            assert_close(output, y)
            assert_close(state, h)
    assert [record.outputs[-1].shape for record in records] == [(2, 8, 6, 16), (2, 4, 3, 16)]


def test_a_record_of_a_transformer_has_its_blocks_outputs_before_positions_read():
    model, (record,) = example("class")
    blocks = evaluated(model).blocks
    shared = blocks.aggregation
    for i, (block, cell) in enumerate(zip(blocks.blocks, shared.cells, strict=True)):
        if i:
            s = shared.select(record.outputs[i - 1])
            x = shared._read(shared.cells[i - 1], record.outputs[i - 1], s, record.states[i - 1], None)
            assert_close(record.outputs[i], block(x, 0.0))
        before = record.states[i - 1] if i else record.start
        assert_close(record.states[i], shared.update(cell, shared.select(record.outputs[i]), before))


@pytest.mark.parametrize(
    "name", ["conv", "conv branch", "conv zoh add", "class", "class branch zoh", "mean", "swin project"]
)
def test_states_by_the_scan_are_those_of_the_layers(name):
    model, records = example(name)
    offline = jax.jit(analysis.offline_states)(model, records)
    for states, record in zip(offline, records, strict=True):
        assert len(states) == len(record.outputs) == len(record.states)
        assert_close(states, jnp.stack(record.states))


@pytest.mark.parametrize("name", ["conv", "class"])
def test_the_network_is_not_changed_whatever_way_it_runs(name):
    model, records = example(name)
    model = nnx.view(model, scan=True, remat="nothing_saveable")
    graphdef, state = nnx.split(model)
    before = jax.tree.map(np.array, nnx.to_pure_dict(state))
    jax.make_jaxpr(lambda images: analysis.record(model, images))(pictures(model))
    jax.tree.map(assert_close, recorded(model)[-1].outputs, records[-1].outputs)
    graphdef_after, after = nnx.split(model)
    assert graphdef == graphdef_after
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(after))


@pytest.mark.parametrize(
    ("name", "states"),
    [("plain resnet", [(), ()]), ("plain transformer", [()]), ("rla", [(2, 8, 6, 4), (2, 4, 3, 4)])],
)
def test_networks_with_other_or_no_states_are_recorded_too(name, states):
    _, records = example(name)
    shapes = [np.shape(0 if record.states[-1] is None else record.states[-1]) for record in records]
    assert shapes == states
    assert [record.start is None for record in records] == [shape == () for shape in states]
    assert np.isfinite(records[0].outputs[-1]).all()


def test_what_mrla_adds_counts_as_read():
    _, (record,) = example("mrla")
    assert [read.shape for read in record.reads] == [(2, 4, 4)] * 3
    assert all(np.all((read > 0) & (read < 1)) for read in record.reads)


def test_networks_without_s6la_have_no_scan_over_their_layers():
    for name, has in [("plain resnet", "no aggregation"), ("rla", "RLA")]:
        with pytest.raises(ValueError, match=rf"^model must have S6LA in all stages; stage 0 has {has}\.$"):
            analysis.offline_states(*example(name))


def test_networks_without_stacks_of_layers_are_refused():
    model = nnx.eval_shape(lambda: isotropic_conv2d(3, d_model=4, n_layers=1, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"^model must have its layers in stacks, and Isotropic has none\.$"):
        analysis.record(model, jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("name", ["conv", "class"])
def test_delta_is_that_of_the_layers_and_memory_its_inverse_times_a(name):
    model, records = example(name)
    deltas, memories = (jax.jit(f)(model, records) for f in (analysis.deltas, analysis.memories))
    stages = getattr(evaluated(model), "stages", None) or [evaluated(model).blocks]
    for stage, record, delta, memory in zip(stages, records, deltas, memories, strict=True):
        module = stage.aggregation
        for i, (cell, output) in enumerate(zip(module.cells, record.outputs, strict=True)):
            dynamics = module.dynamics or cell.dynamics
            A = np.asarray(dynamics.decay.A)
            if isinstance(module, S6LAConv):
                d = cell.norm(dynamics.project(output))[..., :4]
                expected = np.log1p(np.exp(np.asarray(d + dynamics.decay.dt_bias[...][None, None, None], float)))
            else:
                expected = np.asarray(dynamics.inputs(module.select(output))[0], float)[..., None] + 0 * A
            kept = expected * -A < 80  # beyond, the factor is zero in float32
            assert kept.mean() > 0.9
            np.testing.assert_allclose(delta[i][kept], expected[kept], rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(memory[i][kept], 1 / (expected * -A)[kept], rtol=1e-3)


def test_contributions_are_the_terms_of_the_sum_over_layers():
    model, records = example("conv")
    module = evaluated(model).stages[1].aggregation
    pairs = [module.coefficients(c, x) for c, x in zip(module.cells, records[1].outputs, strict=True)]
    a, b = ([np.asarray(part, float) for part in parts] for parts in zip(*pairs, strict=True))
    start = np.asarray(records[1].start, float).reshape(2, 4, 2, 3, 2, 4).mean((2, 4))
    rows, expected = jax.jit(analysis.contributions)(model, records)[1], np.zeros((3, 4))
    for t in range(3):
        terms = [start * np.prod(a[: t + 1], axis=0)]
        terms += [np.prod(a[s + 1 : t + 1], axis=0) * b[s] for s in range(t + 1)]
        assert_close(np.sum(terms, axis=0), np.asarray(records[1].states[t]), 1e-4)
        expected[t, : t + 2] = [np.abs(term).mean() for term in terms]
    assert_close(rows, expected)


@pytest.mark.parametrize("name", ["conv", "conv zoh add"])
def test_branches_read_what_the_first_convolution_makes_of_the_state(name):
    model, records = example(name)
    seen = by_hand(model)
    for stage, record, (_, layers) in zip(evaluated(model).stages, records, seen, strict=True):
        cells = stage.aggregation.cells
        for block, cell, read, (x, _, h, _) in zip(stage.blocks, cells, record.reads, layers, strict=True):
            of_state = cell.read(h) if name == "conv" else block.conv1(cell.read(h))
            r, s = (np.linalg.norm(part, axis=-1) for part in (of_state, block.conv1(x)))
            np.testing.assert_allclose(read, r / (r + s), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(records[0].reads[0], 0)
    assert [read.shape for read in records[1].reads] == [(2, 8, 6), (2, 4, 3), (2, 4, 3)]


def test_positions_read_on_the_grid_of_the_image():
    model, (record,) = example("mean")
    shared = evaluated(model).blocks.aggregation
    for cell, output, state, read in zip(shared.cells, record.outputs, record.states, record.reads, strict=True):
        after = shared._read(cell, output, shared.select(output), state, None)
        r, s = (np.linalg.norm(part[:, 2:], axis=-1) for part in (after - output, output))
        np.testing.assert_allclose(read, (r / (r + s)).reshape(2, 4, 4), rtol=1e-3, atol=1e-4)
