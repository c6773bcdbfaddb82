import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssm_jax.detection.losses import giou_loss, smooth_l1


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden/torchvision/unit_losses.npz")


def check(golden, name, loss, *operands, reduce=jnp.sum):
    """Compares a loss and the gradient of its sum with those of torchvision."""
    x, *rest = (jnp.asarray(golden[operand]) for operand in operands)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(reduce(loss(x, *rest))))(x)
    np.testing.assert_allclose(value, golden[f"{name}/y"].sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, golden[f"{name}/grad"], rtol=1e-4, atol=1e-6)
    if golden[f"{name}/y"].ndim:
        np.testing.assert_allclose(loss(x, *rest), golden[f"{name}/y"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [1 / 9, 1.0, 0.0])
def test_smooth_l1_and_its_gradient_are_torchs(golden, beta):
    check(golden, f"smooth_l1/{beta:.4f}_sum", lambda x, y: smooth_l1(x, y, beta), "pred", "target")


def test_l1_is_smooth_l1_without_a_parabola(golden):
    check(golden, "l1/sum", lambda x, y: smooth_l1(x, y, 0.0), "pred", "target")


def test_smooth_l1_is_smooth():
    slope = jax.vmap(jax.grad(lambda x: smooth_l1(x, jnp.zeros(()), 0.5)))(
        jnp.array([-1.0, -0.5, -0.25, 0.0, 0.4999, 0.5])
    )
    np.testing.assert_allclose(slope, [-1, -1, -0.5, 0, 0.9998, 1], rtol=1e-6)


def test_a_negative_beta_is_an_error():
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        smooth_l1(jnp.zeros(2), jnp.zeros(2), -1.0)


def test_giou_loss_and_its_gradient_are_torchvisions_row_by_row(golden):
    check(golden, "boxloss/giou_sum", giou_loss, "boxes1", "boxes2")
    loss = giou_loss(jnp.asarray(golden["boxes1"]), jnp.asarray(golden["boxes2"]))
    np.testing.assert_allclose(loss, golden["boxloss/giou_none"], rtol=1e-5, atol=1e-6)


def test_optax_has_torchvisions_focal_loss(golden):
    cases = json.loads(str(golden["meta"]))["cases"]
    assert sum(name.startswith("focal") for name in cases) == 12
    for name, case in cases.items():
        if name.startswith("focal"):
            alpha = None if case["alpha"] < 0 else case["alpha"]
            reduce = jnp.mean if case["reduction"] == "mean" else jnp.sum
            loss = functools.partial(optax.sigmoid_focal_loss, alpha=alpha, gamma=case["gamma"])
            check(golden, name, loss, "logits", "targets", reduce=reduce)
