"""Networks as functions for JAX alone; tests/experiments/test_export.py has them in another process."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from modules import assert_close, drawn, images

import ssm_jax
from ssm_jax.export import PLATFORMS, export_function, weights
from ssm_jax.ops.backend import traced_for
from ssm_jax.training.sharding import make_mesh

FOUR = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
S4ND = {"mixer": {"d_state": 4}}
PYRAMID = {**FOUR, "num_heads": (1, 1, 2, 2)}
TOKENS = {"d_model": 16, "depth": 2, "num_heads": 2, "img_size": 32}
IMAGE, VIDEO = (32, 32, 3), (4, 32, 32, 3)

NETWORKS = {
    "resnet50": ({**FOUR, "stem_width": 8}, IMAGE),
    "resnet50_s6la": ({**FOUR, "stem_width": 8}, IMAGE),
    "resnet50_se": ({**FOUR, "stem_width": 8}, IMAGE),
    "resnet50_mrla_light": ({**FOUR, "stem_width": 8}, IMAGE),
    "deit_tiny": (TOKENS, IMAGE),
    "deit_tiny_s6la": (TOKENS, IMAGE),
    "vit_base_s4nd": ({"d_model": 16, "depth": 1, "img_size": 48, "patch_size": 4, **S4ND}, (48, 48, 3)),  # 144 tokens
    "swin_tiny": ({"d_model": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}, IMAGE),
    "pvt_v2_b0_s6la": (PYRAMID, IMAGE),
    "convnext_tiny_s6la": (FOUR, IMAGE),
    "convnext_tiny_s4nd": ({**FOUR, "img_size": 32, "stem_channels": 4, **S4ND}, IMAGE),
    "convnext_tiny_s3d": (FOUR, VIDEO),
    "convnext_tiny_3d_s4nd": ({**FOUR, "img_size": (4, 32, 32), **S4ND}, VIDEO),
    "isotropic_conv2d": ({"d_model": 8, "n_layers": 1}, IMAGE),
    "isotropic_s4nd": ({"d_model": 8, "n_layers": 1, **S4ND}, IMAGE),
}
FAST = "isotropic_s4nd", "deit_tiny_s6la"


def network(name, **options):
    model = drawn(lambda: ssm_jax.create_model(name, num_classes=5, **NETWORKS[name][0] | options, rngs=nnx.Rngs(0)))
    small = jax.tree.map(lambda x: 0.3 * x, nnx.state(model, nnx.Param))
    statistics = jax.tree.map(lambda x: 1 + 0 * x, nnx.state(model, nnx.BatchStat))  # variances are positive
    nnx.update(model, small, statistics)
    return model


def split(model, **arguments):
    """The network for evaluation as a function of its values and images, and these values."""
    model = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    graphdef, state = nnx.split(model)
    return jax.jit(lambda values, x: nnx.merge(graphdef, values)(x, **arguments)), nnx.to_pure_dict(state)


def evaluated(model, x, **arguments):
    """What the network gives, as it is for evaluation."""
    call, values = split(model, **arguments)
    return call(values, x)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in NETWORKS])
def test_a_network_is_a_function_of_any_number_of_images(name):
    model, x = network(name), images(3, *NETWORKS[name][1])
    written = export_function(model, x.shape[1:]).serialize()
    function = jax.export.deserialize(written)
    assert function.platforms == tuple(PLATFORMS)
    call, values, expected = jax.jit(function.call), weights(model), evaluated(model, x)
    assert np.ptp(expected) > 0.1
    for rows in (1, 3):
        assert_close(call(values, x[:rows]), expected[:rows], 1e-5)


def test_a_function_computes_as_the_network_does_on_this_backend():
    """Others have other ways: 144 positions are convolved by FFTs on CPUs, and by matrix products on TPUs."""
    model, x = network("vit_base_s4nd"), images(2, 48, 48, 3)
    function = export_function(model, x.shape[1:])
    call, values = split(model)
    with traced_for("tpu"):
        elsewhere = call.lower(values, x)
    programs = jax.jit(function.call).lower(weights(model), x), call.lower(values, x), elsewhere
    flops = [program.compile().cost_analysis()["flops"] for program in programs]
    assert flops[0] == flops[1] != flops[2]


def test_arguments_and_what_makes_the_input_are_in_the_function():
    model = network("isotropic_s4nd")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)

    def prepare(pixels):
        return pixels.astype(np.float32) / 255

    function = export_function(model, (16, 16, 3), dtype=np.uint8, prepare=prepare, rate=2.0)
    assert_close(jax.jit(function.call)(weights(model), pixels), evaluated(model, prepare(pixels), rate=2.0))


def test_several_devices_share_the_images_without_a_word():
    """A function is of no mesh, so that it runs on any."""
    model, x = network("isotropic_s4nd", mixer={"d_state": 4, "conv": "fft"}), images(8, 8, 8, 3)
    mesh = make_mesh({"data": 8})
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"outside of jax\.set_mesh"):
        export_function(model, x.shape[1:])
    function = export_function(model, x.shape[1:])
    with jax.set_mesh(mesh):
        call = jax.jit(jax.shard_map(function.call, in_specs=(P(), P("data")), out_specs=P("data")))
        program = call.lower(weights(model), x).compile()
        assert_close(call(weights(model), x), evaluated(model, x))
    assert not re.search(r" (all|collective|reduce)-\w+\(", program.as_text())


def test_images_that_the_network_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"^images must be"):
        export_function(network("deit_tiny"), (33, 33, 3))
