import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from modules import assert_close, drawn, images, size

import ssm_jax
from ssm_jax.layers import S6LAConv, S6LAToken
from ssm_jax.layers.channel_attention import ECA, SqueezeExcite

RESNET = {"depths": (1, 2), "dims": (4, 8), "stem_width": 4}
DEIT = {"img_size": 16, "patch_size": 4, "d_model": 8, "num_heads": 2, "depth": 2}


def abstract(name, **options):
    small = RESNET if name.startswith("resnet") else DEIT
    return nnx.eval_shape(lambda: ssm_jax.create_model(name, num_classes=3, **small, **options, rngs=nnx.Rngs(0)))


def test_arguments_of_the_method_reach_every_stage():
    model = abstract("resnet50_s6la", aggregation={"state_dim": 6, "discretization": "zoh"})
    for stage in model.stages:
        assert isinstance(stage.aggregation, S6LAConv)
        assert (stage.aggregation.state_dim, stage.aggregation.discretization) == (6, "zoh")
    model = abstract("deit_tiny_s6la", aggregation={"state_dim": 6})
    assert isinstance(model.blocks.aggregation, S6LAToken)
    assert model.blocks.aggregation.state_dim == 6


def test_presets_are_arguments_that_can_be_overridden():
    literal = abstract("resnet50_s6la", preset="literal").stages[0].aggregation
    assert literal.cells[0].norm is None
    assert (
        abstract("resnet50_s6la", preset="literal", aggregation={"input_norm": True})
        .stages[0]
        .aggregation.cells[0]
        .norm
    )
    like_rla = abstract("resnet50_s6la", preset="rla_like")
    assert like_rla.stages[0].aggregation.state_source == "branch_out"
    assert like_rla.head.kernel.shape == (32 + 32, 3)
    literal = abstract("deit_tiny_s6la", preset="literal").blocks.aggregation
    assert (literal.input_norm, literal.read_norm) == (False, False)
    assert abstract("resnet50_rla", preset="published").stages[0].aggregation.state_source == "block_out"


@pytest.mark.parametrize("name", ["resnet50", "deit_tiny"])
def test_channel_attention_is_in_every_block(name):
    for end, kind in [("se", SqueezeExcite), ("eca", ECA)]:
        model = abstract(f"{name}_{end}")
        stacks = model.stages if name == "resnet50" else [model.blocks]
        assert all(isinstance(block.se, kind) for stack in stacks for block in stack.blocks)
        assert all(stack.aggregation is None for stack in stacks)


def test_channel_attention_goes_with_an_aggregation():
    both = abstract("resnet50_s6la", channel_attention="eca")
    assert isinstance(both.stages[1].blocks[0].se, ECA)
    assert isinstance(both.stages[1].aggregation, S6LAConv)
    assert size(both) > size(abstract("resnet50_s6la"))


def test_attention_to_the_channels_of_tokens_is_that_of_a_map():
    for kind in (SqueezeExcite, ECA):
        module = drawn(lambda kind=kind: kind(16, rngs=nnx.Rngs(0)))
        x = jnp.asarray(images(2, 3, 4, 16))
        assert_close(module(x.reshape(2, 12, 16)), module(x).reshape(2, 12, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "small"}, "preset must be one of default, literal, rla_like, got 'small'"),
        ({"channel_attention": "sa"}, "channel_attention must be one of none, se, eca, cbam, got 'sa'"),
        ({"aggregation": {"state_dim": 0}}, "state_dim must be a whole number of at least 1, got 0"),
        ({"aggregation": {"dtype": "float64"}}, "aggregation must not have dtype: the network gives its own"),
        ({"aggregation": {"d_state": 4}}, "model 'resnet50_s6la': .*unexpected keyword argument 'd_state'"),
    ],
    ids=str,
)
def test_impossible_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        abstract("resnet50_s6la", **options)


def test_what_cannot_be_used_is_rejected():
    with pytest.raises(ValueError, match="aggregation must be left out: nothing aggregates these layers, got"):
        abstract("resnet50_se", aggregation={"state_dim": 4})
    with pytest.raises(ValueError, match=r"CBAM needs maps \(batch, height, width, channels\), got shape"):
        jax.eval_shape(
            lambda m, x: m(x), abstract("deit_tiny_s6la", channel_attention="cbam"), jnp.ones((1, 16, 16, 3))
        )


@pytest.mark.parametrize("name", ["resnet50_s6la", "deit_tiny_s6la"])
def test_a_batch_over_several_devices_gives_the_same_logits_and_is_never_gathered(name):
    small = RESNET if name.startswith("resnet") else DEIT
    model = drawn(lambda: ssm_jax.create_model(name, num_classes=3, **small, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    f = jax.jit(lambda state, x: nnx.merge(graphdef, state, copy=True)(x))
    x = jnp.asarray(images(16, 16, 16, 3))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    state_everywhere = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    assert_close(f(state_everywhere, divided), f(state, x), 1e-4)
    program = f.lower(state_everywhere, divided).compile().as_text()
    assert "all-gather" not in program
    assert "all-to-all" not in program
    assert ("all-reduce" in program) == name.startswith("resnet")  # batch statistics
