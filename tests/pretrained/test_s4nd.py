import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import direct_convolution

from ssm_jax.layers import DPLRKernel
from ssm_jax.ops import truncate
from ssm_jax.pretrained import isotropic_from_torch, s4nd_from_torch

LAYERS = [
    "s1d_diag_bi_glu",
    "s1d_diag_uni_bilinear",
    "s1d_dplr_bi",
    "s2d_diag_bi",
    "s2d_diag_bi_band0.2",
    "s2d_diag_bi_band0.2_cold",
    "s2d_diag_nssm2_softplus_untied",
    "s2d_diag_uni",
    "s2d_dplr_bi",
    "s2d_dplr_diaglin",
    "s2d_dplr_glu_channels_last",
    "s2d_dplr_hippo_nssm2",
    "s2d_dplr_moves",
    "s2d_dplr_nolmax",
    "s2d_dplr_stem_outch",
    "s2d_dplr_uni",
    "s3d_diag_bi",
    "s3d_dplr_bi",
    "s3d_dplr_temporal_deterministic",
]
TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-9}
SUMMED_BY_CPU = {"s3d_dplr_temporal_deterministic": TOLERANCE | {jnp.float32: 2e-5}}
"""Of gradients where how a CPU orders its sums is seen in float32: 1.04e-5 on one. Its steps are of e^2."""


def golden(shared, name, folder="param"):
    """With the state of `folder`; what moved no more is in `param`."""
    with np.load(shared / f"golden/s4nd/{name}.npz") as arrays:
        arrays = dict(arrays)
    meta = json.loads(str(arrays.pop("meta")))
    state = {}
    for source in ("param/", f"{folder}/"):
        state |= {key.removeprefix(source): value for key, value in arrays.items() if key.startswith(source)}
    return SimpleNamespace(arrays=arrays, meta=meta, state=state)


def assert_close(ours, official, dtype, tolerance=TOLERANCE):
    assert ours.dtype == dtype
    atol = tolerance[dtype] * np.abs(official).max()
    np.testing.assert_allclose(np.asarray(ours, np.float64), official, rtol=0, atol=atol)


def channels_last(x, official, dtype=np.float64):
    return (np.moveaxis(x, 1, -1) if official.meta["kwargs"].get("transposed", True) else x).astype(dtype)


@pytest.fixture(params=TOLERANCE, ids=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == jnp.float64):
        yield request.param


def assert_official(official, dtype, rates):
    layer = s4nd_from_torch(official.state, official.meta["kwargs"], param_dtype=dtype)
    tags = {f"rate{rate:g}": rate for rate in rates}
    inputs = {tag: channels_last(official.arrays[f"{tag}/u"], official, dtype) for tag in tags}

    @jax.jit
    def f(inputs):
        outputs = {tag: layer(u, rate=tags[tag]) for tag, u in inputs.items()}
        kernels = {tag: layer.sample_kernels(u.shape[1:-1], rate=tags[tag]) for tag, u in inputs.items()}
        return outputs, kernels

    outputs, kernels = f(inputs)
    out_channels = official.meta["kwargs"].get("out_channels") or 1
    for tag in tags:
        assert_close(outputs[tag], channels_last(official.arrays[f"{tag}/y"], official), dtype)
        for axis, kernel in enumerate(kernels[tag]):
            expected = official.arrays[f"{tag}/axis{axis}/kernel"]
            # The official order is (direction, rank, output channel, channel).
            split = kernel.reshape(*kernel.shape[:2], -1, out_channels, *kernel.shape[3:])
            assert_close(jnp.swapaxes(split, 2, 3).reshape(expected.shape), expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["param", "param_init"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_official_one_at_every_rate(shared, name, folder, dtype):
    if folder == "param_init" and dtype == jnp.float32:
        pytest.skip("how the state is read does not depend on the precision it is used in")
    official = golden(shared, name, folder)
    rates = [float(rate) for rate in official.meta["sizes"]]
    if name == "s2d_dplr_nolmax" and folder == "param_init":
        rates.remove(2.0)  # there the release's own result depends on which length it saw first
    if name == "s2d_dplr_moves":
        rates.remove(2.0)  # its parameters are in param_last
    assert_official(official, dtype, rates)


def test_layer_whose_read_outs_moved_again_is_the_official_one(shared, dtype):
    assert_official(golden(shared, "s2d_dplr_moves", "param_last"), dtype, [2.0])


def slopes_in_last_frequency(A, B, C, P, dt, l_kernel, length):
    """Those of the kernels (k, length) of one system in -Im A[-1], read-outs being C (I - Abar^l_kernel); dense.

    In coordinates (Re x, Im x): one of them is Fourier's slow direction, whose digits a basis of conjugate pairs loses.
    """
    n = len(A)
    split = lambda x: np.concatenate([x.real, x.imag], axis=-1)  # noqa: E731
    M = np.block([[np.diag(A.real), -np.diag(A.imag)], [np.diag(A.imag), np.diag(A.real)]]) - 2 * split(P).T @ split(P)
    slope = np.zeros_like(M)
    slope[n - 1, -1], slope[-1, n - 1] = 1, -1
    # A function of this block matrix has that function's slope at M, in the direction `slope`, at its upper right.
    M = np.block([[M, slope], [np.zeros_like(M), M]])
    identity = np.eye(4 * n)
    Abar = np.linalg.solve(identity - dt / 2 * M, identity + dt / 2 * M)
    truncated = identity - np.linalg.matrix_power(Abar, l_kernel)
    sample = np.linalg.solve(truncated @ (identity - dt / 2 * M), dt * identity)
    slopes = []
    for _ in range(length):
        slopes.append(2 * split(C.conj()) @ sample[: 2 * n, 2 * n :] @ split(B))
        sample = Abar @ sample
    return np.stack(slopes, axis=-1)


def gradient_in_last_frequency(official, axis):
    """That of sum(y w) in each set's last A_imag, which is of frequency 0 where the set is Fourier's: (sets,).

    The release's own is off there by up to 1.2e-8 of the largest of A_imag, this one by 4e-12, both against 60 digits:
    A is -1e-4 (1 + i), and at node 0 the slope of the generating function is a difference of terms like 1 / A^2 = 1e8.
    """
    heads = official.meta["kwargs"]["d_model"]
    state = {key: official.state[f"kernel.{axis}.{key}"] for key in ("inv_dt", "A_real", "A_imag", "l_kernel")}
    B, C, P = (official.state[f"kernel.{axis}.{key}"] @ [1, 1j] for key in "BCP")
    A = -np.exp(state["A_real"]) - 1j * state["A_imag"]
    kernels = [official.arrays[f"rate1/axis{other}/kernel"] for other in range(official.meta["kwargs"]["dim"])]
    length = kernels[axis].shape[-1]
    kernels[axis] = np.stack(
        [
            slopes_in_last_frequency(A[k], B[0, k], C[:, head], P[:, k], dt, state["l_kernel"], length)
            for head, (dt,) in enumerate(np.exp(state["inv_dt"]))
            for k in [head % len(A)]
        ],
        axis=1,
    )
    u, w = (channels_last(official.arrays[key], official) for key in ("rate1/u", "grad/w"))
    y = direct_convolution(u, [kernel.reshape(2, 1, -1, heads, kernel.shape[-1]) for kernel in kernels])
    y = y.reshape(*u.shape[:-1], -1, heads)  # (..., output channels or 1, heads)
    w = w.reshape(*u.shape[:-1], y.shape[-2], -1)
    return (y * w).reshape(-1, heads // len(A), len(A)).sum((0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_official_ones(shared, name, dtype):
    """With respect to the official parameters: for low-rank kernels C (I - Abar^l_kernel) instead of C."""
    official = golden(shared, name)
    config = official.meta["kwargs"]
    u, w = (channels_last(official.arrays[key], official, dtype) for key in ("rate1/u", "grad/w"))
    parameters = {key: value for key, value in official.state.items() if not key.endswith("l_kernel")}
    graphdef, state = nnx.split(s4nd_from_torch(parameters, config, param_dtype=dtype))
    lengths = [int(official.state.get(f"kernel.{axis}.l_kernel", 0)) for axis in range(config["dim"])]

    def loss(params, u):
        layer = nnx.merge(graphdef, params, copy=True)
        for kernel, length in zip(layer.kernels, lengths, strict=True):
            if isinstance(kernel, DPLRKernel):
                A, _, C, dt = kernel.continuous()
                C = truncate(A, C, kernel._low_rank(), dt, length, inverse=True)
                kernel.C[...] = jnp.stack([C.real, C.imag]).reshape(kernel.C.shape)
        return jnp.sum(layer(u) * w)

    grads, grad_u = jax.jit(jax.grad(loss, argnums=(0, 1)))(nnx.to_pure_dict(state), u)
    assert_close(grad_u, channels_last(official.arrays["grad/u"], official), dtype)
    # A gradient has the layout of its parameter.
    names = [key for key in parameters if f"grad/{key}" in official.arrays]
    assert set(parameters) - set(names) <= ({"D"} if config.get("out_channels") else set())
    theirs = {key: official.arrays[f"grad/{key}"] for key in names}
    if config["init"] in ("fourier", "hippo"):
        for axis in range(config["dim"]):
            A_imag, exact = theirs[f"kernel.{axis}.A_imag"], gradient_in_last_frequency(official, axis)
            np.testing.assert_allclose(A_imag[:, -1], exact, rtol=0, atol=2e-8 * np.abs(A_imag).max())
            A_imag[:, -1] = exact
    layout = s4nd_from_torch(theirs, config, param_dtype=dtype)
    expected = nnx.to_pure_dict(nnx.state(layout))
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        if np.any(theirs):
            assert_close(ours, np.asarray(theirs, np.float64), dtype, SUMMED_BY_CPU.get(name, TOLERANCE))
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


def test_all_layers_are_tested(shared):
    assert sorted(file.stem for file in (shared / "golden/s4nd").glob("s?d_*.npz")) == LAYERS


CONFIG = {"d_model": 2, "d_state": 4, "dim": 1, "mode": "diag", "linear": True}


def layer_state(*, directions=2, channels=1, read_outs=1, linear=True):
    rng = np.random.default_rng(0)
    shapes = {
        "D": (channels, 2),
        "kernel.0.inv_dt": (2, 1),
        "kernel.0.C": (directions * channels * read_outs, 2, 2, 2),
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
    assert kernel.C.shape == (2, 2, 1, 3, 2, 2)
    for part, direction, channel in np.ndindex(2, 2, 3):
        np.testing.assert_array_equal(kernel.C[part, direction, 0, channel], C[3 * direction + channel, ..., part])


def test_read_outs_are_split_into_direction_rank_output_channel_and_channel():
    state = layer_state(channels=3, read_outs=2 * 5)
    kernel = s4nd_from_torch(state, CONFIG | {"channels": 3, "out_channels": 5, "trank": 2}).kernels[0]
    C = state["kernel.0.C"].astype(np.float32)
    assert kernel.C.shape == (2, 2, 2, 15, 2, 2)
    for direction, rank, out, channel in np.ndindex(2, 2, 5, 3):
        theirs = C[((2 * direction + rank) * 5 + out) * 3 + channel]
        np.testing.assert_array_equal(kernel.C[:, direction, rank, 5 * channel + out], np.moveaxis(theirs, -1, 0))


@pytest.mark.parametrize("mode", [{}, {"mode": "dplr"}, {"mode": "nplr"}, {"mode": "s4"}], ids=str)
def test_low_rank_is_the_official_default_mode(mode):
    state = layer_state() | {"kernel.0.P": np.ones((1, 1, 2, 2)), "kernel.0.l_kernel": np.array(0)}
    config = {name: value for name, value in CONFIG.items() if name != "mode"}
    kernel = s4nd_from_torch(state, config | mode).kernels[0]
    assert isinstance(kernel, DPLRKernel)
    assert kernel.P.shape == (2, 1, 1, 2)


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
        ({"mode": "dense"}, "mode must be 'diag' or .*, got 'dense'"),
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


def test_all_names_and_shapes_that_do_not_fit_are_reported_together():
    state = layer_state() | {"kernel.0.P": np.ones(3), "kernel.0.B": np.ones((1, 2, 2))}
    del state["D"]
    with pytest.raises(ValueError, match="weights do not fit S4ND") as error:
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
    assert (model.encoder.in_features, model.head.out_features) == (3, 5)
