import pytest
from flax import nnx

import ssm_jax
from ssm_jax.models import Isotropic


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*s4nd*", ["isotropic_s4nd"]),
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
    assert {"isotropic_conv2d", "isotropic_s4nd"} <= set(names)


@pytest.mark.parametrize("name", ssm_jax.list_models())
def test_every_listed_name_builds_a_network(name):
    model = nnx.eval_shape(lambda: ssm_jax.create_model(name, num_classes=7, rngs=nnx.Rngs(0)))
    assert isinstance(model, Isotropic)
    assert model.decoder.kernel.shape == (512, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("isotropic_s4d", "unknown model 'isotropic_s4d'; did you mean 'isotropic_s4nd'"),
        ("isotropic_conv", "unknown model 'isotropic_conv'; did you mean 'isotropic_conv2d'"),
        ("resnet", "unknown model 'resnet'; did you mean 'isotropic_conv2d' or 'isotropic_s4nd'"),
    ],
)
def test_unknown_names_suggest_near_ones(name, message):
    with pytest.raises(ValueError, match=message):
        ssm_jax.create_model(name, num_classes=10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["isotropic_s4nd", "isotropic_conv2d"])
@pytest.mark.parametrize("overrides", [{"width": 4}, {"d_model": 4, "n_layers": 1, "mixer": {"width": 4}}], ids=str)
def test_unknown_arguments_are_rejected_by_name(name, overrides):
    with pytest.raises(ValueError, match=f"model '{name}': .*unexpected keyword argument 'width'"):
        ssm_jax.create_model(name, num_classes=10, **overrides, rngs=nnx.Rngs(0))
