import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ssm_jax


@functools.cache
def abstract(name, **arguments):
    return nnx.eval_shape(lambda: ssm_jax.create_model(name, **{"num_classes": 1000} | arguments, rngs=nnx.Rngs(0)))


def count(name):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract(name), nnx.Param)))


TIMM = {
    "convnext_base": 88_591_464,
    "convnext_small": 50_223_688,
    "convnext_tiny": 28_589_128,
    "deit_base": 86_567_656,
    "deit_base_distilled": 87_338_192,
    "deit_small": 22_050_664,
    "deit_small_distilled": 22_436_432,
    "deit_tiny": 5_717_416,
    "deit_tiny_distilled": 5_910_800,
    "pvt_v2_b0": 3_666_760,
    "pvt_v2_b1": 14_009_000,
    "pvt_v2_b2": 25_362_856,
    "pvt_v2_b2_li": 22_553_512,
    "pvt_v2_b3": 45_238_696,
    "pvt_v2_b4": 62_556_072,
    "pvt_v2_b5": 81_956_008,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "swin_base": 87_768_224,
    "swin_small": 49_606_258,
    "swin_tiny": 28_288_354,
}
"""Parameters of timm 1.0.31's networks of 1,000 classes."""

PAPER = {
    "vit_base": 86_540_008,
    "vit_base_s4nd": 88_786_408,
    "convnext_tiny_s4nd": 30_007_057 - 3,  # the release's stem has a D for each of 3 channels and does not use it
}
"""Those of S4ND's networks, by its release."""


ENDS = ("se", "eca", "cbam", "rla", "mrla_base", "mrla_light", "s6la")
"""How the names of networks whose layers are aggregated end."""

BACKBONES = [name for name in ssm_jax.list_models() if not name.endswith(tuple(f"_{end}" for end in ENDS))]
SMALLEST = ("resnet18", "deit_tiny", "swin_tiny", "pvt_v2_b0", "convnext_tiny_s4nd", "convnext_tiny_3d_s4nd")
AGGREGATED = [
    name for first in SMALLEST for end in ENDS if (name := f"{first}_{end}") in ssm_jax.list_models(f"{first}_*")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), (TIMM | PAPER).items())
def test_networks_have_the_originals_numbers_of_parameters(name, expected):
    assert count(name) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES + AGGREGATED)
def test_every_listed_name_builds_a_network_with_logits_and_stage_maps(name):
    model = abstract(name)
    video = "3d" in name
    shape = (2, 30, 224, 224, 3) if video else (2, 32, 32, 3) if "cifar" in name else (2, 224, 224, 3)
    graphdef, state = nnx.split(nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False))
    run = lambda method: lambda state, x: getattr(nnx.merge(graphdef, state, copy=True), method)(x)  # noqa: E731
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert jax.eval_shape(run("__call__"), state, images).shape == (2, 1000)
    maps = jax.eval_shape(run("features"), state, images)
    sizes = [x.shape[2 if video else 1] for x in maps]
    expected = {"isotropic": [224], "vit": [14], "deit": [14], "resnet_cifar": [32, 16, 8]}
    assert sizes == next((e for prefix, e in expected.items() if name.startswith(prefix)), [56, 28, 14, 7])
    assert all(x.ndim == len(shape) for x in maps)


@pytest.mark.parametrize("name", BACKBONES)
def test_classifiers_are_called_head(name):
    assert abstract(name).head.kernel.shape[1] == 1000


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (
            "*s4nd",
            ["convnext_micro_s4nd", "convnext_tiny_3d_s4nd", "convnext_tiny_s4nd", "isotropic_s4nd", "vit_base_s4nd"],
        ),
        ("isotropic_*", ["isotropic_conv2d", "isotropic_s4nd"]),
        ("isotropic", []),
        ("*conv?d", ["isotropic_conv2d"]),
    ],
)
def test_patterns_select_names(pattern, names):
    assert ssm_jax.list_models(pattern) == names


def test_all_names_are_listed_in_order():
    names = ssm_jax.list_models()
    assert names == sorted(names)
    assert {"isotropic_conv2d", *TIMM, *PAPER} <= set(names)


def test_backbones_have_the_methods_they_are_compared_with():
    names = set(ssm_jax.list_models())
    assert {f"resnet{depth}_{end}" for depth in (50, 101, 152, "_cifar") for end in ENDS} <= names
    for first in ("deit_tiny", "deit_small", "swin_tiny", "pvt_v2_b1", "convnext_tiny_s4nd"):
        assert {f"{first}_{end}" for end in ("mrla_light", "mrla_base", "s6la")} <= names
    assert {"deit_small_se", "deit_small_eca"} <= names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("isotropic_s4d", "unknown model 'isotropic_s4d'; did you mean 'isotropic_s4nd'"),
        ("resnet_50", "unknown model 'resnet_50'; did you mean 'resnet50'"),
        ("convnext_tiny_s4d", "unknown model 'convnext_tiny_s4d'; did you mean 'convnext_tiny_s4nd'"),
        ("swin_tiny_patch4_window7_224", "did you mean 'swin_tiny'"),
        ("mlp", r"unknown model 'mlp'; ssm_jax.list_models\(\) lists all"),
    ],
)
def test_unknown_names_suggest_near_ones(name, message):
    with pytest.raises(ValueError, match=message):
        ssm_jax.create_model(name, num_classes=10, rngs=nnx.Rngs(0))


def test_numbers_of_classes_are_whole():
    with pytest.raises(ValueError, match="num_classes must be a whole number, got True"):
        ssm_jax.create_model("resnet18", num_classes=True, rngs=nnx.Rngs(0))


FAMILIES = ["isotropic_s4nd", "resnet18", "deit_tiny", "swin_tiny", "pvt_v2_b0", "convnext_tiny", "convnext_tiny_s4nd"]


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_checked_before_anything_else(name):
    model = abstract(name)
    for shape in [(2, 3, 64, 64), (0, 64, 64, 3), (2, 64, 64, 1)]:
        with pytest.raises(ValueError, match=r"^images must be \(batch, height, width, 3 channels\).* got shape"):
            model.features(jnp.zeros(shape))


@pytest.mark.parametrize("name", ["isotropic_s4nd", "resnet50", "vit_base_s4nd", "swin_tiny", "convnext_tiny_s4nd"])
def test_unknown_arguments_are_rejected_by_name(name):
    with pytest.raises(ValueError, match=f"model '{name}': .*unexpected keyword argument 'breadth'"):
        ssm_jax.create_model(name, num_classes=10, breadth=4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["isotropic_s4nd", "vit_base_s4nd", "convnext_tiny_s4nd", "convnext_tiny_3d_s4nd"])
def test_unknown_arguments_of_mixers_are_rejected_by_name(name):
    with pytest.raises(ValueError, match=f"model '{name}': .*unexpected keyword argument 'breadth'"):
        ssm_jax.create_model(name, num_classes=10, mixer={"breadth": 4}, rngs=nnx.Rngs(0))
