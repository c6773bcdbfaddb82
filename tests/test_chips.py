import math

import jax
import pytest

from ssm_jax.chips import TPUS, Chip, chip


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v2", "TPU v2"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5e", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_devices_are_known_by_the_names_that_jax_has_for_them(kind, name):
    found = chip(kind)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v99", "Tesla T4", "NVIDIA A1000", "NVIDIA L40"])
def test_other_devices_are_unknown(kind):
    assert chip(kind) is None


def test_this_machine_has_no_such_device():
    assert chip(jax.devices("cpu")[0].device_kind) is None


@pytest.mark.parametrize("tpu", TPUS.values(), ids=lambda tpu: tpu.name)
def test_tpus_do_a_power_of_two_of_operations_in_a_cycle(tpu):
    """Their matrix units are squares of 128 or 256, of which a device has 1 to 8."""
    cycle = tpu.flops / tpu.clock
    assert cycle == pytest.approx(2 ** round(math.log2(cycle)), rel=0.03)


@pytest.mark.parametrize("tpu", TPUS.values(), ids=lambda tpu: tpu.name)
def test_tpus_have_units_of_their_fields(tpu):
    assert 2**33 <= tpu.memory <= 2**37
    assert 2e11 < tpu.bandwidth < 1e13
    assert 50 < tpu.flops / tpu.bandwidth < 1000
    assert tpu.bandwidth / 20 < tpu.interconnect < tpu.bandwidth


def test_what_is_not_known_of_a_device_is_nan():
    bare = Chip("", 1.0, 1.0, 1.0)
    assert math.isnan(bare.clock)
    assert math.isnan(bare.interconnect)
