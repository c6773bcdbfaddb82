import importlib.util
import os

import jax
import pytest

from ssm_jax import topologies
from ssm_jax.chips import TPUS, chip
from ssm_jax.topologies import tpu_devices


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """That of this process, which describing a slice changes."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


def test_every_kind_of_slice_is_of_a_known_chip():
    assert topologies._PODS.keys() == TPUS.keys()


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v5e:8x8x1", "v4:8x8", "v5e:3x4", "v5e:1x2", "v5e:0x2", "v5e:8xx8"])
def test_names_of_no_slice_are_answered_with_what_there_is(name):
    with pytest.raises(ValueError, match=f"^topology must be CHIP:AxB of v2, .* v5p:4x4x4; .*, got '{name}'"):
        tpu_devices(name)


def test_a_slice_is_not_larger_than_a_pod():
    with pytest.raises(ValueError, match=r"v5e 256 chips.*got 'v5e:16x32'"):
        tpu_devices("v5e:16x32")


def test_there_is_one_slice_at_least():
    with pytest.raises(ValueError, match=r"^slices must be at least 1, got 0"):
        tpu_devices("v5e:2x2", 0)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[tpu\]'"):
        tpu_devices("v5e:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
class TestDescribed:
    @pytest.mark.parametrize(
        ("name", "slices", "count"),
        [
            *(("v2:2x2", 1, 8), ("v4:2x2x2", 1, 8), ("v5e:1x1", 1, 1), ("v5e:4x4", 1, 16)),
            *(("v5p:2x2x1", 1, 4), ("v6e:2x2", 3, 12), ("tpu7x:2x2x1", 1, 8)),
        ],
    )
    def test_a_device_is_what_chips_says_it_is(self, name, slices, count):
        """On v4 and v5p both cores of a chip are one, on v2, v3 and 7x they are two."""
        devices = tpu_devices(name, slices)
        assert len(devices) == count
        assert chip(devices[0].device_kind) == TPUS[name.partition(":")[0]]
        assert len({getattr(device, "slice_index", None) for device in devices}) == slices

    def test_programs_compile_for_them(self):
        sharding = jax.sharding.SingleDeviceSharding(tpu_devices("v5e:2x2")[0])
        lowered = jax.jit(lambda x: x @ x, in_shardings=sharding).lower(jax.ShapeDtypeStruct((128, 128), "bfloat16"))
        assert "convolution" in (lowered.compile().as_text() or "")
