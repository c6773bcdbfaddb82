import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ssm_jax.layers import S4ND
from ssm_jax.models import create_model
from ssm_jax.training.optimizer import learning_rate, make_optimizer, param_groups, warmup_cosine

PARAMS = {
    "kernel": np.array([1.0, -2.0, 3.0]),
    "bias": np.array([0.5, -0.25]),
    "dt": np.array([-1.0, 4.0]),
}
LABELS = {"kernel": "decay", "bias": "no_decay", "dt": "ssm"}
GRADIENTS = [
    {"kernel": np.array([0.1, -2.0, 0.0]), "bias": np.array([3.0, -1e-3]), "dt": np.array([0.2, -0.7])},
    {"kernel": np.array([-0.3, 1.0, 0.5]), "bias": np.array([-1.0, 2.0]), "dt": np.array([1.0, 0.1])},
    {"kernel": np.array([0.2, 0.2, -4.0]), "bias": np.array([0.1, 0.1]), "dt": np.array([-1.0, 0.3])},
]


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


def adamw_by_hand(name, *, lr, weight_decay, total_steps, b1=0.9, b2=0.999, eps=1e-8, gradients=GRADIENTS):
    p, m, v = PARAMS[name], 0.0, 0.0
    for t, grads in enumerate(gradients):
        g = grads[name]
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1 ** (t + 1)), v / (1 - b2 ** (t + 1))
        rate = lr * (1 + np.cos(np.pi * t / total_steps)) / 2
        p = p - rate * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)
    return p


def test_parameters_of_s4nd_iso_are_in_their_groups():
    def create():
        options = {"in_channels": 1, "d_model": 8, "n_layers": 2, "mixer": {"d_state": 4}}
        return create_model("isotropic_s4nd", num_classes=10, **options, rngs=nnx.Rngs(0))

    kernel = {"inv_dt": "ssm", "A_real": "ssm", "A_imag": "ssm", "B": "ssm", "C": "decay"}
    linear = {"kernel": "decay", "bias": "no_decay"}
    norm = {"scale": "no_decay", "bias": "no_decay"}
    block = {"norm": norm, "mixer": {"kernels": {0: kernel, 1: kernel}, "D": "decay", "output": linear}}
    assert param_groups(nnx.state(nnx.eval_shape(create), nnx.Param)) == {
        "encoder": linear,
        "blocks": {0: block, 1: block},
        "norm": norm,
        "head": linear,
    }


def test_a_layer_alone_has_the_same_groups():
    layer = nnx.eval_shape(lambda: S4ND(4, dims=1, d_state=2, linear_output=True, rngs=nnx.Rngs(0)))
    kernel = {"inv_dt": "ssm", "A_real": "ssm", "A_imag": "ssm", "B": "ssm", "C": "decay"}
    assert param_groups(nnx.state(layer, nnx.Param)) == {"kernels": {0: kernel}, "D": "decay"}


def test_each_group_follows_adamw_with_its_own_rate_and_decay():
    options = {"b1": 0.8, "b2": 0.99, "eps": 1e-3}
    optimizer = make_optimizer(LABELS, lr=0.1, ssm_lr=0.02, weight_decay=0.3, warmup_steps=0, total_steps=10, **options)
    params = updated(optimizer)
    for name, lr, weight_decay in [("kernel", 0.1, 0.3), ("bias", 0.1, 0.0), ("dt", 0.02, 0.0)]:
        expected = adamw_by_hand(name, lr=lr, weight_decay=weight_decay, total_steps=10, **options)
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, err_msg=name)


def sgd_by_hand(name, *, lr, weight_decay, momentum, total_steps):
    """PyTorch's: the decay is part of the gradient, and the learning rate multiplies what the momentum gives."""
    p, v = PARAMS[name], 0.0
    for t, grads in enumerate(GRADIENTS):
        v = momentum * v + grads[name] + weight_decay * p
        p = p - lr * (1 + np.cos(np.pi * t / total_steps)) / 2 * v
    return p


def test_each_group_follows_sgd_with_its_own_rate_and_decay():
    options = {"name": "sgd", "momentum": 0.7, "warmup_steps": 0, "total_steps": 10}
    params = updated(make_optimizer(LABELS, lr=0.1, ssm_lr=0.02, weight_decay=0.3, **options))
    for name, lr, weight_decay in [("kernel", 0.1, 0.3), ("bias", 0.1, 0.0), ("dt", 0.02, 0.0)]:
        expected = sgd_by_hand(name, lr=lr, weight_decay=weight_decay, momentum=0.7, total_steps=10)
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, err_msg=name)


def test_an_unknown_rule_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match=r"^name must be one of adamw, sgd, got 'lamb'"):
        make_optimizer(LABELS, name="lamb", lr=0.1, ssm_lr=0.1, weight_decay=0.0, warmup_steps=0, total_steps=10)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_touches_its_group_alone(name):
    def after(weight_decay):
        options = {"name": name, "lr": 0.1, "ssm_lr": 0.1, "warmup_steps": 0, "total_steps": 10}
        return updated(make_optimizer(LABELS, weight_decay=weight_decay, **options))

    without, with_decay = after(0.0), after(0.5)
    np.testing.assert_array_equal(without["bias"], with_decay["bias"])
    np.testing.assert_array_equal(without["dt"], with_decay["dt"])
    assert (np.abs(without["kernel"] - with_decay["kernel"]) > 0.01).all()


def test_an_ssm_rate_of_zero_freezes_the_dynamics():
    params = updated(make_optimizer(LABELS, lr=0.1, ssm_lr=0.0, weight_decay=0.5, warmup_steps=0, total_steps=10))
    np.testing.assert_array_equal(params["dt"], as_float32(PARAMS["dt"]))
    assert (params["kernel"] != as_float32(PARAMS["kernel"])).all()


def test_clipping_bounds_the_norm_of_all_gradients_together():
    options = {"lr": 0.1, "ssm_lr": 0.02, "weight_decay": 0.0, "warmup_steps": 0, "total_steps": 10, "eps": 1.0}
    (gradients, *_) = GRADIENTS
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    clipped = {name: g / norm * 0.5 for name, g in gradients.items()}
    params = updated(make_optimizer(LABELS, clip_norm=0.5, **options), [gradients])
    for name, lr in [("kernel", 0.1), ("bias", 0.1), ("dt", 0.02)]:
        expected = adamw_by_hand(name, lr=lr, weight_decay=0.0, total_steps=10, eps=1.0, gradients=[clipped])
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, err_msg=name)


def test_gradients_below_the_clipping_norm_are_left():
    options = {"lr": 0.1, "ssm_lr": 0.02, "weight_decay": 0.0, "warmup_steps": 0, "total_steps": 10}
    plain = updated(make_optimizer(LABELS, **options))
    clipped = updated(make_optimizer(LABELS, clip_norm=100.0, **options))
    for name in PARAMS:
        np.testing.assert_array_equal(plain[name], clipped[name])


def test_the_first_step_of_a_warm_up_changes_nothing():
    optimizer = make_optimizer(LABELS, lr=0.1, ssm_lr=0.1, weight_decay=0.5, warmup_steps=2, total_steps=10)
    params = updated(optimizer, GRADIENTS[:1])
    for name, value in PARAMS.items():
        np.testing.assert_array_equal(params[name], as_float32(value))


def test_the_end_rate_holds_for_all_groups():
    options = {"weight_decay": 0.0, "warmup_steps": 0, "total_steps": 1, "end_lr": 0.05, "eps": 1e-12}
    params = updated(make_optimizer(LABELS, lr=0.1, ssm_lr=0.2, **options), [GRADIENTS[1], GRADIENTS[1]])
    for name, lr in [("kernel", 0.1), ("bias", 0.1), ("dt", 0.2)]:  # equal gradients: steps of the size of the rate
        expected = PARAMS[name] - (lr + 0.05) * np.sign(GRADIENTS[1][name])
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (5, 0.2),
        (10, 0.4),  # end of the warm-up
        (35, 0.01 + 0.39 * (1 + np.cos(np.pi / 4)) / 2),
        (60, (0.4 + 0.01) / 2),
        (110, 0.01),  # end
        (200, 0.01),
    ],
)
def test_the_schedule_is_a_line_and_half_a_cosine(step, rate):
    schedule = warmup_cosine(0.4, warmup_steps=10, total_steps=110, end=0.01)
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-5, abs=1e-7)


def test_without_warm_up_the_schedule_starts_at_its_peak():
    assert float(warmup_cosine(0.4, warmup_steps=0, total_steps=3)(0)) == pytest.approx(0.4)


def test_the_schedule_ends_at_zero_by_default():
    assert float(warmup_cosine(0.4, warmup_steps=1, total_steps=3)(3)) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.0), (5, 0.2), (10, 0.4), (29, 0.4), (30, 0.04), (59, 0.04), (60, 0.004), (99, 0.004), (200, 0.004)],
)
def test_each_milestone_leaves_a_tenth_of_the_rate(step, rate):
    schedule = learning_rate(0.4, warmup_steps=10, total_steps=100, milestones=(30, 60))
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-5)


def test_milestones_hold_for_all_groups():
    """With equal gradients, Adam's steps are of the size of the rate."""
    options = {"weight_decay": 0.0, "warmup_steps": 0, "total_steps": 10, "milestones": [1], "eps": 1e-12}
    params = updated(make_optimizer(LABELS, lr=0.1, ssm_lr=0.2, **options), [GRADIENTS[1], GRADIENTS[1]])
    for name, lr in [("kernel", 0.1), ("bias", 0.1), ("dt", 0.2)]:
        np.testing.assert_allclose(params[name], PARAMS[name] - 1.1 * lr * np.sign(GRADIENTS[1][name]), rtol=1e-5)


def test_without_milestones_the_rate_is_half_a_cosine():
    options = {"warmup_steps": 10, "total_steps": 110, "end": 0.01}
    for step in (0, 10, 35, 110):
        assert float(learning_rate(0.4, **options)(step)) == float(warmup_cosine(0.4, **options)(step))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"end": 0.1}, r"^end_lr must be 0 where milestones"), ({"warmup_steps": 6}, r"^milestones must not be before")],
)
def test_milestones_that_contradict_the_rest_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(0.4, **{"warmup_steps": 0, "total_steps": 10, "milestones": (5,), **options})


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(3, 3), (4, 3), (-1, 3), (0, 0)])
def test_a_warm_up_as_long_as_training_is_refused(warmup_steps, total_steps):
    with pytest.raises(ValueError, match="warm-up must be shorter than training") as error:
        warmup_cosine(0.1, warmup_steps=warmup_steps, total_steps=total_steps)
    assert f"warmup_steps={warmup_steps}, total_steps={total_steps}" in str(error.value)
