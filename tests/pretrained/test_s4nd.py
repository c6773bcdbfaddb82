import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ssm_jax.pretrained import isotropic_from_torch, s4nd_from_torch

LAYERS = [
    "s1d_diag_bi_glu",
    "s1d_diag_uni_bilinear",
    "s2d_diag_bi",
    "s2d_diag_bi_band0.2",
    "s2d_diag_bi_band0.2_cold",
    "s2d_diag_nssm2_softplus_untied",
    "s2d_diag_uni",
    "s3d_diag_bi",
]
TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-9}


def golden(shared, name):
    with np.load(shared / f"golden/s4nd/{name}.npz") as arrays:
        arrays = dict(arrays)
    meta = json.loads(str(arrays.pop("meta")))
    state = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    return SimpleNamespace(arrays=arrays, meta=meta, state=state)


def assert_close(ours, official, dtype):
    assert ours.dtype == dtype
    atol = TOLERANCE[dtype] * np.abs(official).max()
    np.testing.assert_allclose(np.asarray(ours, np.float64), official, rtol=0, atol=atol)


def channels_last(x, dtype=np.float64):
    return np.moveaxis(x, 1, -1).astype(dtype)


@pytest.fixture(params=TOLERANCE, ids=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == jnp.float64):
        yield request.param


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_official_one_at_every_rate(shared, name, dtype):
    official = golden(shared, name)
    layer = s4nd_from_torch(official.state, official.meta["kwargs"], param_dtype=dtype)
    tags = {f"rate{float(rate):g}": float(rate) for rate in official.meta["sizes"]}
    inputs = {tag: channels_last(official.arrays[f"{tag}/u"], dtype) for tag in tags}

    @jax.jit
    def f(inputs):
        outputs = {tag: layer(u, rate=tags[tag]) for tag, u in inputs.items()}
        kernels = {tag: layer.sample_kernels(u.shape[1:-1], rate=tags[tag]) for tag, u in inputs.items()}
        return outputs, kernels

    outputs, kernels = f(inputs)
    for tag in tags:
        assert_close(outputs[tag], channels_last(official.arrays[f"{tag}/y"]), dtype)
        for axis, kernel in enumerate(kernels[tag]):
            expected = official.arrays[f"{tag}/axis{axis}/kernel"]
            assert_close(kernel.reshape(expected.shape), expected, dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_official_ones(shared, name, dtype):
    official = golden(shared, name)
    u, w = (channels_last(official.arrays[key], dtype) for key in ("rate1/u", "grad/w"))
    graphdef, state = nnx.split(s4nd_from_torch(official.state, official.meta["kwargs"], param_dtype=dtype))

    @jax.jit
    def gradients(params, u):
        return jax.grad(lambda params, u: jnp.sum(nnx.merge(graphdef, params, copy=True)(u) * w), argnums=(0, 1))(
            params, u
        )

    grads, grad_u = gradients(nnx.to_pure_dict(state), u)
    assert_close(grad_u, channels_last(official.arrays["grad/u"]), dtype)
    # A gradient has the layout of its parameter.
    layout = s4nd_from_torch(
        {name: official.arrays[f"grad/{name}"] for name in official.state}, official.meta["kwargs"], param_dtype=dtype
    )
    expected = nnx.to_pure_dict(nnx.state(layout))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        if np.any(theirs):
            assert_close(ours, np.asarray(theirs, np.float64), dtype)
        else:
            assert not np.any(ours), path


def test_network_is_the_official_one_at_every_rate(shared, dtype):
    official = golden(shared, "model_iso_diag")
    model = isotropic_from_torch(official.state, official.meta, param_dtype=dtype)
    model = nnx.view(model, deterministic=True)
    for tag in ("rate1", "rate2", "rate0_5"):
        rate = float(official.arrays[f"{tag}/rate"])
        with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm needs it for float64
            logits = jax.jit(lambda x, rate=rate: model(x, rate=rate))(official.arrays[f"{tag}/x"].astype(dtype))
        assert_close(logits, official.arrays[f"{tag}/y"], dtype)


def test_all_diagonal_layers_are_tested(shared):
    files = sorted((shared / "golden/s4nd").glob("s?d_*.npz"))
    diagonal = [file.stem for file in files if golden(shared, file.stem).meta["kwargs"]["mode"] == "diag"]
    assert diagonal == LAYERS


def test_diagonal_plus_low_rank_layers_are_rejected(shared):
    official = golden(shared, "s2d_dplr_bi")
    with pytest.raises(ValueError, match="mode must be 'diag' or 's4d', got 'dplr'"):
        s4nd_from_torch(official.state, official.meta["kwargs"])


CONFIG = {"d_model": 2, "d_state": 4, "dim": 1, "mode": "diag", "linear": True}


def layer_state(*, directions=2, channels=1, linear=True):
    rng = np.random.default_rng(0)
    shapes = {
        "D": (channels, 2),
        "kernel.0.inv_dt": (2, 1),
        "kernel.0.C": (directions * channels, 2, 2, 2),
        "kernel.0.B": (1, 1, 2, 2),
        "kernel.0.A_real": (1, 2),
        "kernel.0.A_imag": (1, 2),
    }
    if not linear:
        shapes |= {"output_linear.0.weight": (4, 2 * channels), "output_linear.0.bias": (4,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def network_state():
    state = {f"model.layers.0.layer.{name}": value for name, value in layer_state(linear=False).items()}
    state |= {f"model.layers.0.layer.{name.replace('.0.', '.1.', 1)}": v for name, v in layer_state().items()}
    shapes = {
        "encoder.weight": (2, 3),
        "encoder.bias": (2,),
        "model.layers.0.norm.norm.weight": (2,),
        "model.layers.0.norm.norm.bias": (2,),
        "model.norm.norm.weight": (2,),
        "model.norm.norm.bias": (2,),
        "decoder.output_transform.weight": (5, 2),
        "decoder.output_transform.bias": (5,),
    }
    return state | {name: np.ones(shape) for name, shape in shapes.items()}


NETWORK = {"d_model": 2, "n_layers": 1, "layer": {"d_state": 4, "mode": "diag"}}


def test_complex_numbers_move_to_the_front_and_read_outs_split_into_direction_and_channel():
    state = layer_state(channels=3)
    kernel = s4nd_from_torch(state, CONFIG | {"channels": 3}).kernels[0]
    B, C = (state[f"kernel.0.{name}"].astype(np.float32) for name in "BC")
    np.testing.assert_array_equal(kernel.B[...], [B[0, ..., 0], B[0, ..., 1]])
    assert kernel.C.shape == (2, 2, 3, 2, 2)
    for part, direction, channel in np.ndindex(2, 2, 3):
        np.testing.assert_array_equal(kernel.C[part, direction, channel], C[3 * direction + channel, ..., part])


def test_linear_maps_are_transposed():
    state = layer_state(linear=False)
    layer = s4nd_from_torch(state, CONFIG | {"linear": False, "activation": "gelu", "final_act": "glu"})
    np.testing.assert_array_equal(layer.output.kernel[...], state["output_linear.0.weight"].T.astype(np.float32))


@pytest.mark.parametrize(("n_ssm", "sets"), [(None, 2), (2, 2), (1, 1)])
def test_n_ssm_of_none_is_one_set_per_head(n_ssm, sets):
    state = layer_state()
    for name in ("kernel.0.A_real", "kernel.0.A_imag"):
        state[name] = np.ones((sets, 2))
    state["kernel.0.B"] = np.ones((1, sets, 2, 2))
    assert s4nd_from_torch(state, CONFIG | {"n_ssm": n_ssm}).kernels[0].A_real.shape == (sets, 2)


def test_arguments_that_change_the_function_are_kept():
    options = {"disc": "bilinear", "bandlimit": 0.2, "bidirectional": False, "l_max": 7, "dt_transform": "softplus"}
    layer = s4nd_from_torch(layer_state(directions=1), CONFIG | options)
    assert layer.l_max == (7,)
    assert (layer.kernels[0].discretization, layer.kernels[0].bandlimit) == ("bilinear", 0.2)
    dt = jax.grad(lambda x: layer.kernels[0]._dt.forward(x))(0.0)
    assert dt == 0.5  # softplus, where exp has slope 1


def test_arguments_that_change_only_training_do_not_matter():
    ignored = {"lr": 1e-3, "init": "legs", "dt_min": 0.1, "dt_max": 1.0, "rank": 1, "transposed": False}
    s4nd_from_torch(layer_state(), CONFIG | ignored)


def test_dropout_of_a_network_is_in_and_after_its_mixers():
    config = NETWORK | {"layer": NETWORK["layer"] | {"dropout": 0.3}}
    block = isotropic_from_torch(network_state(), config).blocks[0]
    assert (block.dropout.rate, block.mixer.dropout.rate) == (0.3, 0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "nplr"}, "mode must be 'diag' or 's4d', got 'nplr'"),
        ({"trank": 2}, "trank must be 1, got 2"),
        ({"out_channels": 5}, "out_channels must be None, got 5"),
        ({"weight_norm": True}, "weight_norm must be False, got True"),
        ({"linear": False, "activation": "relu"}, "activation must be 'gelu', got 'relu'"),
        ({"linear": False, "final_act": "id"}, "final_act must be 'glu', got 'id'"),
        ({"is_real": True, "dt_fast": True}, "config has options without a counterpart here: dt_fast, is_real"),
    ],
    ids=str,
)
def test_options_without_a_counterpart_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        s4nd_from_torch(layer_state(), CONFIG | options)
    network = NETWORK | {"layer": NETWORK["layer"] | options}
    with pytest.raises(ValueError, match=message):
        isotropic_from_torch(network_state(), network)


def test_a_layer_without_mode_is_not_diagonal():
    with pytest.raises(ValueError, match="mode must be 'diag' or 's4d', got 'dplr'"):
        s4nd_from_torch(layer_state(), {name: value for name, value in CONFIG.items() if name != "mode"})


def test_all_names_and_shapes_that_do_not_fit_are_reported_together():
    state = layer_state() | {"kernel.0.P": np.ones(3), "kernel.0.B": np.ones((1, 2, 2))}
    del state["D"]
    with pytest.raises(ValueError, match="state does not fit config") as error:
        s4nd_from_torch(state, CONFIG)
    for problem in (
        "kernel.0.P is unexpected",
        "D (1, 2) is missing",
        "kernel.0.B has shape (1, 2, 2) instead of (1, 1, 2, 2)",
    ):
        assert problem in str(error.value)


def test_state_of_another_direction_count_does_not_fit():
    with pytest.raises(ValueError, match=r"kernel.0.C has shape \(1, 2, 2, 2\) instead of \(2, 2, 2, 2\)"):
        s4nd_from_torch(layer_state(directions=1), CONFIG)


@pytest.mark.parametrize("name", ["encoder.weight", "decoder.output_transform.weight", "model.layers.0.layer.D"])
def test_networks_report_what_is_missing(name):
    state = network_state()
    del state[name]
    with pytest.raises(ValueError, match=f"{name} .* is missing"):
        isotropic_from_torch(state, NETWORK)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        isotropic_from_torch(state | {name: np.ones(7)}, NETWORK)


def test_networks_may_repeat_their_width_and_axes_for_the_layer():
    layer = NETWORK["layer"] | {"d_model": 2, "dim": 2, "n_ssm": 1}
    model = isotropic_from_torch(network_state(), NETWORK | {"layer": layer})
    assert (model.encoder.in_features, model.decoder.out_features) == (3, 5)
