import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.training.schedules import ema_decay_at, learning_rate, restarted


def rates(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps, dtype=jnp.int32)))


def by_hand(t, peak, *, cycle, warmup, start, end, prefix):
    """timm's `CosineLRScheduler` with one cycle, at epoch or step t; its cycle is without a warm-up before it."""
    if t < warmup:
        return start + t * (peak - start) / warmup
    if prefix:
        t, cycle = t - warmup, cycle - warmup
    return end if t >= cycle else end + (peak - end) / 2 * (1 + math.cos(math.pi * t / cycle))


def test_the_default_is_a_line_and_half_a_cosine():
    schedule = learning_rate(0.4, warmup_steps=10, total_steps=110, end_lr=0.01)
    expected = {
        0: 0.0,
        5: 0.2,
        10: 0.4,  # end of the warm-up
        35: 0.01 + 0.39 * (1 + math.cos(math.pi / 4)) / 2,
        60: (0.4 + 0.01) / 2,
        110: 0.01,  # end
        200: 0.01,
    }
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, rel=1e-6)


def test_without_warm_up_the_schedule_starts_at_its_peak():
    assert float(learning_rate(0.4, total_steps=3)(0)) == pytest.approx(0.4)


def test_the_schedule_ends_at_zero_by_default():
    assert float(learning_rate(0.4, warmup_steps=1, total_steps=3)(3)) == 0.0


STEPS = 7
"""Steps in an epoch."""

IMAGENET = {"total_steps": 300 * STEPS, "warmup_prefix": False, "end_lr": 1e-5, "warmup_lr": 1e-6, "hold_steps": STEPS}
"""300 epochs: S4ND's, which go on to 310, DeiT's and PVTv2's."""


@pytest.mark.parametrize(
    ("peak", "warmup_epochs", "expected"),
    [
        # S4ND-ConvNeXt: its parameters, and those of the state spaces
        (4e-3, 20, {1: 2.0095e-4, 19: 3.80005e-3, 20: 3.956404463463943e-3, 150: 2.005e-3, 299: 1.01093871158e-5}),
        (1e-3, 20, {1: 5.095e-5, 19: 9.5005e-4, 20: 9.891830623632338e-4, 150: 5.05e-4, 299: 1.002714116407e-5}),
        # DeiT and PVTv2
        (1e-3, 5, {4: 8.002e-4, 5: 9.99321619703514e-4, 150: 5.05e-4, 299: 1.002714116407e-5}),
    ],
)
def test_rates_per_epoch_are_timms(peak, warmup_epochs, expected):
    """The numbers are those of timm 1.0.31's `CosineLRScheduler`."""
    schedule = learning_rate(peak, warmup_steps=warmup_epochs * STEPS, **IMAGENET)
    expected |= {0: 1e-6, 300: 1e-5, 309: 1e-5}
    for epoch, rate in expected.items():
        for step in (epoch * STEPS, epoch * STEPS + STEPS - 1):
            assert float(schedule(step)) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(("peak", "warmup"), [(4e-3, 20), (1e-3, 20), (1e-3, 10), (1e-3, 5), (1e-6, 5), (1e-4, 0)])
def test_every_epoch_has_timms_rate(peak, warmup):
    schedule = learning_rate(peak, warmup_steps=warmup * STEPS, **IMAGENET)
    options = {"cycle": 300, "warmup": warmup, "start": 1e-6, "end": 1e-5, "prefix": False}
    expected = np.repeat([by_hand(epoch, peak, **options) for epoch in range(310)], STEPS)
    np.testing.assert_allclose(rates(schedule, 310 * STEPS), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        (False, {1: 5.399480415667466e-7, 25_020: 9.891284313650684e-4, 187_650: 5.025e-4, 375_299: 5.00000001743e-6}),
        (True, {1: 5.399480415667466e-7, 25_020: 1e-3, 187_650: 5.582023268613956e-4, 375_299: 5.00000002001e-6}),
    ],
)
def test_rates_per_step_are_timms(prefix, expected):
    """Swin's: 300 epochs of 1251 steps, 20 of warm-up, with timm's default and with the prefix of its later code."""
    steps = {"total_steps": 300 * 1251, "warmup_steps": 20 * 1251, "warmup_prefix": prefix}
    schedule = learning_rate(1e-3, warmup_lr=5e-7, end_lr=5e-6, **steps)
    expected |= {0: 5e-7, 25_019: 9.999600519584e-4, 375_300: 5e-6}
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 40])
def test_every_step_has_timms_rate(prefix, warmup):
    schedule = learning_rate(
        0.2, total_steps=500, warmup_steps=warmup, warmup_lr=0.01, warmup_prefix=prefix, end_lr=0.02
    )
    options = {"cycle": 500, "warmup": warmup, "start": 0.01, "end": 0.02, "prefix": prefix}
    expected = [by_hand(step, 0.2, **options) for step in range(600)]
    np.testing.assert_allclose(rates(schedule, 600), expected, rtol=1e-6)


def test_the_last_small_rates_are_exact():
    """(1 + cos(x)) / 2 in float32 would have no digit of them right."""
    schedule = learning_rate(1.0, total_steps=1_000_000)
    for left in (1, 2, 100):
        assert float(schedule(1_000_000 - left)) == pytest.approx(math.sin(math.pi / 2 * left * 1e-6) ** 2, rel=1e-6)


def test_a_prefix_alone_reaches_the_peak():
    options = {"total_steps": 100, "warmup_steps": 20}
    assert rates(learning_rate(0.4, **options), 100).max() == pytest.approx(0.4)
    assert rates(learning_rate(0.4, warmup_prefix=False, **options), 100).max() < 0.385


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.0), (5, 0.2), (10, 0.4), (29, 0.4), (30, 0.04), (59, 0.04), (60, 0.004), (99, 0.004), (200, 0.004)],
)
@pytest.mark.parametrize("milestones", [(30, 60), [60, 30]])
def test_each_milestone_leaves_a_tenth_of_the_rate(step, rate, milestones):
    schedule = learning_rate(0.4, warmup_steps=10, total_steps=100, milestones=milestones)
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-6)


def test_a_milestone_may_be_the_end_of_the_warm_up():
    schedule = learning_rate(0.4, warmup_steps=2, total_steps=4, milestones=(2,))
    np.testing.assert_allclose(rates(schedule, 4), [0.0, 0.2, 0.04, 0.04], rtol=1e-6)


def test_resnets_of_rla_lose_nine_tenths_every_30_epochs():
    milestones = [epoch * STEPS for epoch in (30, 60, 90)]
    schedule = learning_rate(0.1, total_steps=120 * STEPS, milestones=milestones, hold_steps=STEPS)
    expected = [0.1 * 0.1 ** (epoch // 30) for epoch in range(120)]
    np.testing.assert_allclose(rates(schedule, 120 * STEPS), np.repeat(expected, STEPS), rtol=1e-6)


def test_those_of_mrla_also_warm_up_for_three_epochs():
    """Its code has a third and two thirds of the rate in epochs 1 and 2, and not the line from 1e-4: 0.1 % and less."""
    steps = {"total_steps": 100 * STEPS, "warmup_steps": 3 * STEPS, "hold_steps": STEPS}
    schedule = learning_rate(0.1, milestones=[30 * STEPS, 60 * STEPS, 90 * STEPS], warmup_lr=1e-4, **steps)
    expected = [1e-4, 0.1 / 3, 0.2 / 3] + [0.1 * 0.1 ** (epoch // 30) for epoch in range(3, 100)]
    np.testing.assert_allclose(rates(schedule, 100 * STEPS), np.repeat(expected, STEPS), rtol=2.1e-3)


@pytest.mark.parametrize("options", [{}, {"milestones": (4,)}, {"warmup_steps": 3}, {"warmup_prefix": False}])
def test_rates_held_for_so_many_steps_are_those_of_its_multiples(options):
    plain = rates(learning_rate(0.4, total_steps=12, **options), 20)
    held = rates(learning_rate(0.4, total_steps=12, hold_steps=5, **options), 20)
    np.testing.assert_array_equal(held, np.repeat(plain[::5], 5))


def test_a_peak_of_zero_is_frozen_whatever_the_others_start_and_end_with():
    schedule = learning_rate(0.0, total_steps=10, warmup_steps=2, warmup_lr=0.1, end_lr=0.2)
    np.testing.assert_array_equal(rates(schedule, 20), 0.0)


@pytest.mark.parametrize("options", [{}, {"milestones": (4,)}, {"warmup_steps": 3, "hold_steps": 2}])
def test_rates_are_float32_of_steps_of_any_kind(options):
    schedule = learning_rate(0.4, total_steps=12, **options)
    for step in (5, np.int64(5), jnp.int32(5)):
        assert schedule(step).dtype == jnp.float32
        assert schedule(step) == schedule(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, r"^total_steps must be at least 1, got 0"),
        ({"warmup_steps": 10}, r"^warmup_steps must be at least 0 and less than total_steps=10, got 10"),
        ({"warmup_steps": 11}, r"^warmup_steps must"),
        ({"warmup_steps": -1}, r"^warmup_steps must .* got -1"),
        ({"hold_steps": 0}, r"^hold_steps must be at least 1, got 0"),
        ({"peak": -0.1}, r"^peak must be at least 0, got -0\.1"),
        ({"peak": math.nan}, r"^peak must be at least 0, got nan"),
        ({"end_lr": -0.1}, r"^end_lr must be at least 0"),
        ({"warmup_lr": -0.1}, r"^warmup_lr must be at least 0"),
        ({"milestones": (5,), "end_lr": 0.1}, r"^end_lr must be 0 where milestones"),
        ({"milestones": (5,), "warmup_steps": 6}, r"^milestones must not be before the end of the warm-up, 6"),
    ],
)
def test_impossible_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        learning_rate(**{"peak": 0.4, "total_steps": 10, **options})


def test_stages_start_again_with_their_own_warm_up_and_cosine():
    """As S4ND's progressive resizing: 80 epochs at low resolution, 20 at full."""
    one = functools.partial(learning_rate, 0.01, end_lr=1e-3)
    first, second = one(total_steps=80, warmup_steps=9), one(total_steps=20, warmup_steps=5)
    schedule = restarted([(80, first), (20, second)])
    assert float(schedule(80)) == 0.0
    assert float(schedule(85)) == pytest.approx(0.01)
    np.testing.assert_array_equal(rates(schedule, 130), np.concatenate([rates(first, 80), rates(second, 50)]))


def test_stages_may_be_many_cut_short_and_unlike():
    parts = [learning_rate(0.3, total_steps=50), learning_rate(0.2, total_steps=9, milestones=(2,)), lambda step: 0.7]
    expected = [*rates(parts[0], 4), *rates(parts[1], 5), *[0.7] * 6]
    np.testing.assert_allclose(rates(restarted(list(zip((4, 5, 6), parts, strict=True))), 15), expected, rtol=1e-7)


def test_one_stage_is_its_schedule():
    schedule = learning_rate(0.3, total_steps=5)
    np.testing.assert_array_equal(rates(restarted([(5, schedule)]), 7), rates(schedule, 7))


@pytest.mark.parametrize(("steps", "message"), [([], r"^stages .* got \[\]"), ([3, 0], r"^stages .* got \[3, 0\]")])
def test_stages_without_steps_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        restarted([(n, learning_rate(0.1, total_steps=3)) for n in steps])


@pytest.mark.parametrize(
    ("step", "decay"),
    [
        (0, 0.0),
        (1, 0.3700394750525634),
        (2, 0.5192501432308638),
        (9, 0.7845565309968117),
        (99, 0.9535841116638722),
        (9_999, 0.9978455653099682),
        (999_999, 0.9999),
        (9_999_999, 0.99996),
    ],
)
def test_averages_warm_up_as_timms(step, decay):
    """The numbers are `ModelEmaV3(decay=0.99996, use_warmup=True).get_decay(step + 1)` of timm 1.0.31."""
    assert float(ema_decay_at(jnp.int32(step), 0.99996, warmup=True)) == pytest.approx(decay, abs=1e-7)


def test_averages_without_warm_up_have_one_decay():
    assert ema_decay_at(jnp.int32(0), 0.99996) == 0.99996
    assert ema_decay_at(jnp.int32(1000), 0.99996) == 0.99996


def test_an_average_that_warms_up_forgets_the_initial_parameters():
    average = 100.0
    for step in range(4):
        decay = float(ema_decay_at(step, 0.999, warmup=True))
        average = decay * average + (1 - decay) * 3.0
    assert average == pytest.approx(3.0)
