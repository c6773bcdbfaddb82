import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import NETWORK, batch, loss_of, losses, modes, small
from flax import nnx
from jax.extend import core
from modules import drawn

from ssm_jax import create_model
from ssm_jax.detection import Backbone, create_detector
from ssm_jax.detection.backbone import Unused

SIZE = (96, 160)

NETWORKS = {
    **{f"resnet50{end}": {} for end in ("", "_se", "_eca", "_cbam", "_rla", "_mrla_base", "_mrla_light", "_s6la")},
    **{name: {} for name in ("resnet101", "swin_tiny", "swin_tiny_s6la", "pvt_v2_b0", "pvt_v2_b0_s6la")},
    **{name: {} for name in ("convnext_tiny", "convnext_tiny_s6la")},
    "convnext_tiny_s4nd": {"img_size": SIZE},
}
DIMS = {
    "resnet": (256, 512, 1024, 2048),
    "swin": (96, 192, 384, 768),
    "convnext": (96, 192, 384, 768),
    "pvt": (32, 64, 160, 256),
}


@functools.cache
def abstract(name, **options):
    return nnx.eval_shape(lambda: Backbone(name, **NETWORKS.get(name, {}) | options, rngs=nnx.Rngs(0)))


def split(module):
    """What a module is in training, and its parameters and other variables."""
    return nnx.split(modes(module)[0], nnx.Param, ...)


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_a_quarter_to_a_thirtysecond_of_the_images(name):
    backbone = abstract(name)
    graphdef, state = nnx.split(modes(backbone)[1])
    images = jax.ShapeDtypeStruct((2, *SIZE, 3), jnp.float32)
    maps = jax.eval_shape(lambda state, images: nnx.merge(graphdef, state)(images), state, images)
    dims = DIMS[re.split("[0-9_]", name)[0]]
    assert backbone.channels == dims
    assert [x.shape for x in maps] == [(2, 96 // s, 160 // s, c) for s, c in zip((4, 8, 16, 32), dims, strict=True)]


def without_gradient(f, params, *arguments):
    """Names of the parameters whose gradient is 0 whatever the arguments are: it does not depend on any of them."""
    jaxpr = jax.make_jaxpr(jax.grad(f))(params, *arguments).jaxpr
    known = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(isinstance(var, core.Var) and var in known for var in equation.invars):
            known.update(equation.outvars)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params))]
    return [name for name, var in zip(names, jaxpr.outvars, strict=True) if var not in known]


def losses_sum(graphdef):
    def loss(params, rest, images, sizes, objects, key):
        detector = nnx.merge(graphdef, params, rest, copy=True)
        return sum(detector.losses(images, sizes, objects, key=key).values())

    return loss


@pytest.mark.parametrize(
    ("name", "detector"),
    [*((name, "faster_rcnn") for name in NETWORKS), ("swin_tiny", "retinanet"), ("resnet50", "mask_rcnn")],
)
def test_all_parameters_of_a_detector_have_a_gradient(name, detector):
    backbone = {"name": name, "depths": (2, 2, 2, 2), **NETWORKS[name]}
    model = nnx.eval_shape(lambda: create_detector(detector, backbone=backbone, num_classes=3, rngs=nnx.Rngs(0)))
    graphdef, params, rest = split(model)
    inputs = jax.eval_shape(lambda: batch(1, side=96, masks=True))
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert without_gradient(losses_sum(graphdef), params, rest, *inputs, key) == []


def test_a_classifier_would_have_no_gradient():
    network = nnx.eval_shape(lambda: create_model("resnet50_rla", num_classes=3, rngs=nnx.Rngs(0)))
    graphdef, params, rest = split(nnx.view(network, use_running_average=True))
    f = lambda params, rest, x: sum(y.sum() for y in nnx.merge(graphdef, params, rest, copy=True).features(x))  # noqa: E731
    names = without_gradient(f, params, rest, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    assert {name for name in names if "head" in name} == {
        *(f"['head']['{leaf}']" for leaf in ("kernel", "bias")),
        *(f"['stages'][3]['aggregation']['head_norm']['{leaf}']" for leaf in ("scale", "bias")),
    }
    # The state after the last block is computed, and read by nothing.
    last = "['stages'][3]['aggregation']['cells'][2]['norm']"
    assert set(names) - {name for name in names if "head" in name} == {f"{last}['scale']", f"{last}['bias']"}


def test_gradients_are_not_zero_in_numbers():
    backbone = NETWORK | {"name": "resnet50_rla", "aggregation": {"state_dim": 4}}
    detector = small("retinanet", backbone=backbone)
    assert len(nnx.to_flat_state(nnx.state(detector, Unused))) > 0
    _, gradients, _ = losses(detector, *batch())
    zero = [path for path, gradient in nnx.to_flat_state(gradients) if not np.any(gradient[...])]
    # The first block reads the state that RLA starts with, 0.
    assert zero == [("backbone", "network", "stages", 0, "aggregation", "cells", 0, "read", "kernel")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base", "must have maps of strides 4, 8, 16 and 32, got 16"),
        ("deit_tiny", "must have maps of strides 4, 8, 16 and 32, got 16"),
        ("isotropic_conv2d", "must have maps of strides 4, 8, 16 and 32, got 1"),
        ("resnet_cifar", "must have maps of strides 4, 8, 16 and 32, got 1, 2, 4"),
        ("convnext_tiny_3d_s4nd", r"must be a network for images of any size.*\(batch, time, height, width"),
    ],
)
def test_other_networks_are_rejected(name, reason):
    with pytest.raises(ValueError, match=rf"backbone '{name}' {reason}"):
        abstract(name)


def test_swin_and_convnext_have_a_norm_after_every_map_and_others_their_own():
    assert [abstract(name).norms is None for name in ("resnet50", "pvt_v2_b0")] == [True, True]
    for name, epsilon in [("swin_tiny", 1e-5), ("convnext_tiny", 1e-6)]:
        backbone = abstract(name, maps=(1, 2, 3))
        assert [norm.scale.shape[0] for norm in backbone.norms] == [192, 384, 768] == list(backbone.channels)
        assert {norm.epsilon for norm in backbone.norms} == {epsilon}
    small = {"depths": (1, 1, 1, 1), "dims": (2, 4, 6, 8)}
    backbone = drawn(lambda: Backbone("convnext_tiny", **small, rngs=nnx.Rngs(0)))
    for norm in backbone.norms:
        norm.scale[...], norm.bias[...] = jnp.ones_like(norm.scale), jnp.zeros_like(norm.bias)
    for x in backbone(jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 64, 3)), jnp.float32)):
        np.testing.assert_allclose(x.mean(-1), 0, atol=1e-5)


def test_batch_norms_learn_where_they_are_told_to():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
    for norm_eval in (True, False):
        backbone, _ = modes(
            drawn(lambda norm_eval=norm_eval: Backbone(**NETWORK, norm_eval=norm_eval, rngs=nnx.Rngs(0)))
        )
        graphdef, state = nnx.split(backbone)

        @jax.jit
        def after(state, images, graphdef=graphdef):
            backbone = nnx.merge(graphdef, state, copy=True)
            backbone(images)
            return nnx.state(backbone)

        before, after = nnx.to_pure_dict(state), nnx.to_pure_dict(after(state, images))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
        assert same["network"]["bn1"]["mean"] is norm_eval
        assert same["network"]["conv1"]["kernel"] is True


def test_names_within_a_backbone_are_those_of_its_network():
    network = nnx.eval_shape(lambda: create_model("resnet50_s6la", num_classes=3, rngs=nnx.Rngs(0)))
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(network, nnx.Param))}
    backbone = abstract("resnet50_s6la")
    inside = {path[1:] for path, _ in nnx.to_flat_state(nnx.state(backbone, nnx.Param))}
    assert paths - inside == set(backbone.removed) == {("head", "kernel"), ("head", "bias")}
    assert inside <= paths


def test_stochastic_depth_follows_the_key():
    detector = small("retinanet", backbone=NETWORK | {"drop_path": 0.5})
    loss, params = loss_of(detector)
    loss, inputs = jax.jit(loss), batch()
    values = [float(loss(params, *inputs, jax.random.key(key))[0][0]) for key in (0, 0, 1, 2, 3, 4)]
    assert values[0] == values[1]
    assert len(set(values)) > 1
