import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ssm_jax
from ssm_jax.layers import S4ND
from ssm_jax.training.optimizer import GROUPS, freeze, group_sizes, make_optimizer, param_group, param_groups
from ssm_jax.training.schedules import learning_rate

PARAMS = {
    "kernel": np.array([1.0, -2.0, 3.0]),
    "bias": np.array([0.5, -0.25]),
    "dt": np.array([-1.0, 4.0]),
    "C": np.array([2.0, -0.5]),
}
LABELS = {"kernel": "decay", "bias": "no_decay", "dt": "ssm", "C": "ssm_c"}
GRADIENTS = [
    {name: np.array(g) for name, g in zip(PARAMS, gradients, strict=True)}
    for gradients in [
        ([0.1, -2.0, 0.0], [3.0, -1e-3], [0.2, -0.7], [0.3, 0.4]),
        ([-0.3, 1.0, 0.5], [-1.0, 2.0], [1.0, 0.1], [-0.2, 0.6]),
        ([0.2, 0.2, -4.0], [0.1, 0.1], [-1.0, 0.3], [0.1, -2.0]),
    ]
]

COSINE = functools.partial(learning_rate, total_steps=10)


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def updated(optimizer, gradients=GRADIENTS):
    """The parameters after a step for each of `gradients`."""
    params = as_float32(PARAMS)
    state = optimizer.init(params)
    for grads in gradients:
        with jax.numpy_dtype_promotion("standard"):  # optax has 1 - decay**count
            updates, state = optimizer.update(as_float32(grads), state, params)
        params = optax.apply_updates(params, updates)
    return params


def cosine(lr, t):
    return lr * (1 + np.cos(np.pi * t / 10)) / 2


def adam_by_hand(name, *, lr, weight_decay, b1=0.9, b2=0.999, eps=1e-8, gradients=GRADIENTS, trust=False):
    """AdamW; with `trust`, LAMB: its step is as long as the parameters before the rate multiplies it."""
    p, m, v = PARAMS[name], 0.0, 0.0
    for t, grads in enumerate(gradients):
        g = grads[name]
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        step = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p
        p = p - cosine(lr, t) * step * (np.linalg.norm(p) / np.linalg.norm(step) if trust else 1.0)
    return p


def sgd_by_hand(name, *, lr, weight_decay, momentum):
    """PyTorch's: the decay is part of the gradient, and the learning rate multiplies what the momentum gives."""
    p, v = PARAMS[name], 0.0
    for t, grads in enumerate(GRADIENTS):
        v = momentum * v + grads[name] + weight_decay * p
        p = p - cosine(lr, t) * v
    return p


@pytest.mark.parametrize("ssm_c_lr", [None, 0.05])
@pytest.mark.parametrize(
    ("name", "by_hand", "options"),
    [
        ("adamw", adam_by_hand, {"b1": 0.8, "b2": 0.99, "eps": 1e-3}),
        ("lamb", functools.partial(adam_by_hand, trust=True), {"b1": 0.8, "b2": 0.99, "eps": 1e-3}),
        ("sgd", sgd_by_hand, {"momentum": 0.7}),
    ],
)
def test_each_group_has_its_own_rate_and_decay(name, by_hand, options, ssm_c_lr):
    rates = {"lr": 0.1, "ssm_lr": 0.02, "ssm_c_lr": ssm_c_lr}
    params = updated(make_optimizer(LABELS, COSINE, name=name, **rates, weight_decay=0.3, **options))
    groups = [("kernel", 0.1, 0.3), ("bias", 0.1, 0.0), ("dt", 0.02, 0.0), ("C", ssm_c_lr or 0.1, 0.3)]
    for parameter, lr, weight_decay in groups:
        expected = by_hand(parameter, lr=lr, weight_decay=weight_decay, **options)
        np.testing.assert_allclose(params[parameter], expected, rtol=1e-5, err_msg=parameter)


def test_an_unknown_rule_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"^name must be one of adamw, lamb, sgd, got 'adam'"):
        make_optimizer(LABELS, COSINE, name="adam", lr=0.1, ssm_lr=0.1, weight_decay=0.0)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_weight_decay_touches_its_groups_alone(name):
    def after(weight_decay):
        return updated(make_optimizer(LABELS, COSINE, name=name, lr=0.1, ssm_lr=0.1, weight_decay=weight_decay))

    without, with_decay = after(0.0), after(0.5)
    np.testing.assert_array_equal(without["bias"], with_decay["bias"])
    np.testing.assert_array_equal(without["dt"], with_decay["dt"])
    assert (np.abs(without["kernel"] - with_decay["kernel"]) > 1e-3).all()
    assert (np.abs(without["C"] - with_decay["C"]) > 1e-3).all()


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_a_rate_of_zero_freezes_its_group(name):
    schedule = functools.partial(COSINE, warmup_steps=2, warmup_lr=0.1, end_lr=0.1)
    options = {"lr": 0.1, "ssm_lr": 0.0, "ssm_c_lr": 0.0, "weight_decay": 0.5}
    params = updated(make_optimizer(LABELS, schedule, name=name, **options))
    for parameter in ("dt", "C"):
        np.testing.assert_array_equal(params[parameter], as_float32(PARAMS[parameter]))
    assert (params["kernel"] != as_float32(PARAMS["kernel"])).all()


def test_clipping_bounds_the_norm_of_all_gradients_together():
    (gradients, *_) = GRADIENTS
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    clipped = {name: g / norm * 0.5 for name, g in gradients.items()}
    options = {"lr": 0.1, "ssm_lr": 0.02, "weight_decay": 0.0, "eps": 1.0}
    params = updated(make_optimizer(LABELS, COSINE, clip_norm=0.5, **options), [gradients])
    for name, lr in [("kernel", 0.1), ("bias", 0.1), ("dt", 0.02), ("C", 0.1)]:
        expected = adam_by_hand(name, lr=lr, weight_decay=0.0, eps=1.0, gradients=[clipped])
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, err_msg=name)


def test_gradients_below_the_clipping_norm_are_left():
    options = {"lr": 0.1, "ssm_lr": 0.02, "weight_decay": 0.0}
    plain = updated(make_optimizer(LABELS, COSINE, **options))
    clipped = updated(make_optimizer(LABELS, COSINE, clip_norm=100.0, **options))
    for name in PARAMS:
        np.testing.assert_array_equal(plain[name], clipped[name])


def test_the_first_step_of_a_warm_up_from_zero_changes_nothing():
    schedule = functools.partial(COSINE, warmup_steps=2)
    params = updated(make_optimizer(LABELS, schedule, lr=0.1, ssm_lr=0.1, weight_decay=0.5), GRADIENTS[:1])
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(params[name], as_float32(value))


def test_all_groups_follow_the_schedule():
    """With equal gradients, Adam's steps are of the size of the rate: the peak, and then that of the end."""
    schedule = functools.partial(learning_rate, total_steps=1, end_lr=0.05)
    optimizer = make_optimizer(LABELS, schedule, lr=0.1, ssm_lr=0.2, ssm_c_lr=0.3, weight_decay=0.0, eps=1e-12)
    params = updated(optimizer, [GRADIENTS[1], GRADIENTS[1]])
    for name, lr in [("kernel", 0.1), ("bias", 0.1), ("dt", 0.2), ("C", 0.3)]:
        expected = PARAMS[name] - (lr + 0.05) * np.sign(GRADIENTS[1][name])
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, err_msg=name)


NORM = {"scale": "no_decay", "bias": "no_decay"}
LINEAR = {"kernel": "decay", "bias": "no_decay"}
KERNEL = {"inv_dt": "ssm", "A_real": "ssm", "A_imag": "ssm", "B": "ssm", "C": "ssm_c"}


def abstract(name, **options):
    return nnx.state(
        nnx.eval_shape(lambda: ssm_jax.create_model(name, num_classes=10, **options, rngs=nnx.Rngs(0))), nnx.Param
    )


def test_parameters_of_s4nd_iso_are_in_their_groups():
    block = {"norm": NORM, "mixer": {"kernels": {0: KERNEL, 1: KERNEL}, "D": "decay", "output": LINEAR}}
    params = abstract("isotropic_s4nd", in_channels=1, d_model=8, n_layers=2, mixer={"d_state": 4})
    assert param_groups(params) == {"encoder": LINEAR, "blocks": {0: block, 1: block}, "norm": NORM, "head": LINEAR}


def test_a_layer_alone_has_the_same_groups():
    layer = nnx.eval_shape(lambda: S4ND(4, dims=1, d_state=2, linear_output=True, rngs=nnx.Rngs(0)))
    assert param_groups(nnx.state(layer, nnx.Param)) == {"kernels": {0: KERNEL}, "D": "decay"}


ALWAYS = dict.fromkeys(("inv_dt", "A_real", "A_imag", "B", "P", "A_log", "dt_bias"), ("ssm",) * 3)
ALWAYS |= dict.fromkeys(("kernel", "D"), ("decay",) * 3) | {"C": ("ssm_c",) * 3}
EXPECTED = ALWAYS | {
    # what decays:        weights, matrices, all
    **dict.fromkeys(("bias", "scale"), ("no_decay", "no_decay", "decay")),
    **dict.fromkeys(("cls_token", "dist_token", "pos_embed"), ("decay", "no_decay", "decay")),
    "relative_position_bias_table": ("decay", "no_decay", "decay"),
    "gamma": ("decay", "no_decay", "decay"),  # of layer scale
    "time": ("decay", "no_decay", "decay"),  # the filter of S3D's convolutions
    "decay": ("decay", "no_decay", "decay"),  # MRLA's lambda
}
"""The group of every parameter, by its name, for the three rules."""

ONE_BLOCK = {"isotropic": {"n_layers": 1}, "resnet_cifar": {"depth": 11}, "deit": {"depth": 1}, "vit": {"depth": 1}}
"""Arguments that leave one block in each stage; `depths` elsewhere."""


SIZES = ("_small", "_base", "34", "101", "152", "_b1", "_b3", "_b4", "_b5")
"""In names of networks that have, cut to one block, the same parameters as another but for their sizes."""


@pytest.mark.parametrize("family", ["convnext", "deit", "isotropic", "pvt_v2", "resnet", "swin", "vit"])
def test_every_parameter_of_every_network_is_in_its_group(family):
    names = ssm_jax.list_models(f"{family}*")
    if family != "vit":
        names = [name for name in names if not any(size in name for size in SIZES)]
    for name in names:
        short = next((o for start, o in ONE_BLOCK.items() if name.startswith(start)), {"depths": (1, 1, 1, 1)})
        params = abstract(name, **short)
        paths = [path for path, _ in nnx.to_flat_state(params)]
        for rule, decay_rule in enumerate(("weights", "matrices", "all")):
            labels = param_groups(params, decay_rule)
            expected = {path: EXPECTED[path[-1]][rule] for path in paths}
            assert nnx.traversals.flatten_mapping(labels) == expected, (name, decay_rule)


def test_the_families_above_are_all_there_are():
    families = ("convnext", "deit", "isotropic", "pvt_v2", "resnet", "swin", "vit")
    assert [name for name in ssm_jax.list_models() if not name.startswith(families)] == []


@pytest.mark.parametrize("decay_rule", ["weights", "matrices", "all"])
@pytest.mark.parametrize("name", ["convnext_tiny_s6la", "deit_tiny_mrla_light"])
def test_blocks_run_as_one_loop_have_the_same_groups(name, decay_rule):
    """Parameters are stacked in the loop alone: vectors do not become matrices."""
    options = {"depths": (2, 2, 2, 2)} if "convnext" in name else {"depth": 3}
    plain, looped = (abstract(name, scan=scan, **options) for scan in (False, True))
    assert param_groups(plain, decay_rule) == param_groups(looped, decay_rule)
    assert [leaf.shape for leaf in jax.tree.leaves(plain)] == [leaf.shape for leaf in jax.tree.leaves(looped)]


@pytest.mark.parametrize(
    ("name", "decay", "no_decay"),
    [
        ("convnext_tiny", 28_524_000, 65_128),
        ("deit_tiny_distilled", 5_839_872, 70_928),
        ("pvt_v2_b0", 3_642_720, 24_040),
        ("resnet18", 11_678_912, 10_600),
        ("swin_tiny", 28_199_424, 88_930),
    ],
)
def test_as_many_parameters_decay_as_with_timm(name, decay, no_decay):
    """The numbers are those of timm 1.0.31's `param_groups_weight_decay` with each network's `no_weight_decay`."""
    params = nnx.state(
        nnx.eval_shape(lambda: ssm_jax.create_model(name, num_classes=1000, rngs=nnx.Rngs(0))), nnx.Param
    )
    assert group_sizes(param_groups(params, "matrices"), params) == {"decay": decay, "no_decay": no_decay}


def test_sizes_of_groups_add_up_to_those_of_the_parameters():
    params = abstract("isotropic_s4nd", in_channels=1, d_model=8, n_layers=2, mixer={"d_state": 4})
    kernels = 2 * 2  # blocks x axes
    sizes = {
        "decay": 8 + 2 * (8 + 8 * 16) + 8 * 10,  # encoder, D and output of blocks, head
        "no_decay": 8 + 2 * (16 + 16) + 16 + 10,
        "ssm": kernels * (8 + 2 + 2 + 4),  # dt, Re A, Im A, B
        "ssm_c": kernels * 2 * 2 * 8 * 2,  # complex, directions, channels, modes
    }
    assert group_sizes(param_groups(params), params) == sizes
    assert list(sizes) == [group for group in GROUPS if group != "frozen"]
    assert sum(sizes.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_groups_without_parameters_have_no_size():
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert group_sizes(param_groups(params), params) == {"decay": 6, "no_decay": 3}
    assert group_sizes(param_groups(params, "all"), params) == {"decay": 9}


FROZEN = ("encoder", "blocks.0.mixer.D")


def test_frozen_parameters_are_named_by_parameter_or_module():
    params = abstract("isotropic_s4nd", in_channels=1, d_model=8, n_layers=2, mixer={"d_state": 4})
    plain, labels = param_groups(params), param_groups(params, frozen=FROZEN)
    frozen = {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, group in leaves(labels) if group == "frozen"
    }
    assert frozen == {"encoder.kernel", "encoder.bias", "blocks.0.mixer.D"}
    for (path, group), (_, before) in zip(leaves(labels), leaves(plain), strict=True):
        assert group in ("frozen", before), path


def leaves(labels):
    return jax.tree_util.tree_leaves_with_path(labels)


def test_a_name_that_nothing_has_cannot_be_frozen():
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    with pytest.raises(ValueError, match=r"^frozen must name .*within bias, kernel; got kern, x\."):
        param_groups(params, frozen=("kern", "kernel", "x"))


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_frozen_parameters_stay_and_cost_the_optimizer_nothing(name):
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    labels, values = param_groups(params, "all", frozen=("kernel",)), nnx.to_pure_dict(params)
    tx = make_optimizer(labels, lambda peak: lambda step: peak, name=name, lr=0.1, ssm_lr=0.1, weight_decay=0.1)

    def loss(params):
        return sum(jnp.sum(jnp.square(x + 1.0)) for x in jax.tree.leaves(freeze(params, labels)))

    grads = jax.grad(loss)(values)
    assert not grads["kernel"].any()
    assert grads["bias"].all()
    state = tx.init(values)
    assert all(leaf.size <= 3 for leaf in jax.tree.leaves(state))  # nothing of the kernel's 6
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grads, state, values)
    assert not updates["kernel"].any()
    assert updates["bias"].all()


@pytest.mark.parametrize(("shape", "group"), [((), "no_decay"), ((3,), "no_decay"), ((1, 3), "decay")])
def test_scalars_and_vectors_are_no_matrices(shape, group):
    assert param_group(("weight",), nnx.Param(jnp.zeros(shape)), "matrices") == group
    assert param_group(("bias",), nnx.Param(jnp.zeros(shape)), "matrices") == "no_decay"


def test_an_unknown_choice_of_what_decays_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"^decay_rule must be one of all, weights, matrices, got 'timm'"):
        param_groups(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param), "timm")
