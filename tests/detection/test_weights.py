import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import NETWORK, small
from flax import nnx
from modules import drawn

from ssm_jax import create_model
from ssm_jax.detection import Backbone
from ssm_jax.detection.faster_rcnn import BoxBranch, ConvsLinear
from ssm_jax.detection.fpn import FPN
from ssm_jax.detection.mask_rcnn import MaskBranch
from ssm_jax.detection.rpn import RPN
from ssm_jax.layers.norm import BatchNorm
from ssm_jax.pretrained import load_torch, save_safetensors
from ssm_jax.pretrained.files import read_state

V2 = {
    "fpn": functools.partial(FPN, out_channels=8, norm=BatchNorm),
    "rpn": functools.partial(RPN, depth=2),
    "box": functools.partial(BoxBranch, head=functools.partial(ConvsLinear, widths=(8, 8), features=4, norm=BatchNorm)),
    "mask": functools.partial(MaskBranch, widths=(8, 4), width=4, norm=BatchNorm),
}
SWIN = {"name": "swin_tiny", "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "d_model": 4}
DETECTORS = {
    "retinanet": ("retinanet", {}),
    "mask_rcnn": ("mask_rcnn", {}),
    "mask_rcnn_v2": ("mask_rcnn", V2),
    "retinanet swin": ("retinanet", {"backbone": SWIN}),
}


def built(name, **overrides):
    kind, options = DETECTORS[name]
    return small(kind, **options | overrides)


def values(model):
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def assert_equal(a, b):
    a, b = values(a), values(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], strict=True, err_msg=str(path))


def saved(model, folder):
    save_safetensors(model, folder / "saved.safetensors", overwrite=True)
    return read_state(folder / "saved.safetensors")


@pytest.mark.parametrize("name", DETECTORS)
def test_saved_weights_come_back_exactly(tmp_path, name):
    model, other = built(name), built(name, seed=1)
    load_torch(other, saved(model, tmp_path))
    assert_equal(other, model)


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "faster_rcnn_v2"])
def test_saved_names_and_shapes_are_torchvisions(request, tmp_path, name):
    golden = request.getfixturevalue(name)
    official = {key: x for key, x in golden.some("param/").items() if not key.endswith("num_batches_tracked")}
    state = saved(golden.detector, tmp_path)
    assert state.keys() == official.keys()
    for key, x in official.items():
        np.testing.assert_array_equal(state[key], x, err_msg=key)


def older(name):
    """The name that torchvision's first files have for this one."""
    name = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", name)
    name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    name = re.sub(r"mask_head\.(\d)\.0\.", lambda match: f"mask_head.mask_fcn{int(match[1]) + 1}.", name)
    return re.sub(r"_head\.conv\.(\d)\.0\.", lambda match: f"_head.conv.{2 * int(match[1])}.", name)


def test_older_names_are_those_of_torchvisions_files():
    assert [
        older(name)
        for name in (
            "backbone.fpn.inner_blocks.0.0.weight",
            "rpn.head.conv.0.0.bias",
            "roi_heads.mask_head.3.0.weight",
            "head.classification_head.conv.3.0.bias",
        )
    ] == [
        "backbone.fpn.inner_blocks.0.weight",
        "rpn.head.conv.bias",
        "roi_heads.mask_head.mask_fcn4.weight",
        "head.classification_head.conv.6.bias",
    ]


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "retinanet swin"])
def test_older_files_are_read_too(tmp_path, name):
    model, other = built(name), built(name, seed=1)
    state = saved(model, tmp_path)
    load_torch(other, {older(key): x for key, x in state.items()})
    assert_equal(other, model)


def test_outputs_for_another_number_of_classes_are_left_as_they_are(tmp_path):
    for name, outputs in [
        ("retinanet", {("classifier", "output")}),
        ("mask_rcnn", {("box", "classes"), ("box", "deltas"), ("mask", "output")}),
    ]:
        state = saved(built(name), tmp_path)
        other = built(name, num_classes=5, seed=1)
        before = values(other)
        with pytest.raises(ValueError, match="reset_head=True keeps"):
            load_torch(other, state)
        load_torch(other, state, reset_head=True)
        expected = values(built(name))
        for path, value in values(other).items():
            np.testing.assert_array_equal(value, (before if path[:2] in outputs else expected)[path])


@pytest.mark.parametrize(
    "network",
    [
        {"name": "resnet50_rla", "depths": (1, 1, 1, 2), "dims": (4, 4, 4, 4), "stem_width": 4},
        SWIN,
        {"name": "convnext_tiny_s4nd", "depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4), "mixer": {"d_state": 4}},
    ],
    ids=lambda network: network["name"],
)
def test_a_backbone_takes_the_weights_of_a_classifier_of_any_number_of_classes(tmp_path, network):
    options = {key: value for key, value in network.items() if key != "name"}
    classifier = drawn(lambda: create_model(network["name"], num_classes=7, **options, rngs=nnx.Rngs(0)))
    backbone = drawn(lambda: Backbone(**network, rngs=nnx.Rngs(0)), seed=1)
    before = values(backbone)
    load_torch(backbone, saved(classifier, tmp_path))
    expected = values(classifier)
    for path, value in values(backbone).items():
        same = expected[path[1:]] if path[0] == "network" and path[1:] not in backbone.removed else before[path]
        np.testing.assert_array_equal(value, same, err_msg=str(path))


def test_a_backbone_does_not_take_anything_else(tmp_path):
    classifier = drawn(lambda: create_model(**NETWORK | {"name": "resnet50_se"}, num_classes=7, rngs=nnx.Rngs(0)))
    state = saved(classifier, tmp_path)
    backbone = nnx.eval_shape(lambda: Backbone(**NETWORK, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"layer1\.0\.se\..* is unexpected"):
        load_torch(backbone, state)
    backbone = nnx.eval_shape(lambda: Backbone(**NETWORK | {"name": "resnet50_s6la"}, rngs=nnx.Rngs(0)))
    plain = {name: x for name, x in state.items() if ".se." not in name}
    with pytest.raises(ValueError, match=r"reset_aggregation=True keeps"):
        load_torch(backbone, plain)


def test_a_network_with_aggregation_starts_from_plain_weights(tmp_path):
    classifier = drawn(lambda: create_model(**NETWORK, num_classes=7, rngs=nnx.Rngs(0)))
    backbone = drawn(lambda: Backbone(**NETWORK | {"name": "resnet50_s6la"}, rngs=nnx.Rngs(0)), seed=1)
    load_torch(backbone, saved(classifier, tmp_path), reset_aggregation=True)
    np.testing.assert_array_equal(backbone.network.conv1.kernel[...], classifier.conv1.kernel[...])


def test_the_linear_map_of_a_box_is_of_a_map_flattened_channels_first(tmp_path):
    model = built("mask_rcnn")
    weight = saved(model, tmp_path)["roi_heads.box_head.fc6.weight"]
    x = np.random.default_rng(0).normal(size=(2, 7, 7, 8)).astype(np.float32)
    expected = np.moveaxis(x, -1, 1).reshape(2, -1) @ weight.T + np.asarray(model.box.head.fc6.bias[...])
    np.testing.assert_allclose(jax.jit(model.box.head.fc6)(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
