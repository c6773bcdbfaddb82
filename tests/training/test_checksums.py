import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ssm_jax.training.checksums import _checksum, checksums
from ssm_jax.training.sharding import make_mesh

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "complex64"]


def values(dtype, shape=(16, 8, 4)):
    return jnp.asarray(3 * np.random.default_rng(0).standard_normal(shape), dtype=dtype)


def checksum(x):
    return checksums({"x": x})["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checksum_is_the_same_for_every_sharding(dtype):
    mesh, x = make_mesh({"data": 2, "fsdp": 4}), values(dtype)
    specs = [P(), P("fsdp"), P(None, "fsdp"), P("data", "fsdp"), P(("data", "fsdp")), P(None, None, "data")]
    divided = {checksum(jax.device_put(x, jax.NamedSharding(mesh, spec))) for spec in specs}
    assert divided == {checksum(x)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    x = np.asarray(values(dtype, (5,)))
    found = {checksum(jnp.asarray(x))}
    bits = range(1) if dtype == "bool" else range(8 * x.dtype.itemsize)
    for element in range(x.size):
        for bit in bits:
            changed = x.copy()
            changed.reshape(-1)[element : element + 1].view(np.uint8)[bit // 8] ^= 1 << bit % 8
            found.add(checksum(jnp.asarray(changed)))
    assert len(found) == 1 + x.size * len(bits)


def test_keys_of_random_numbers_have_checksums():
    assert checksum(jax.random.key(1)) == checksum(jax.random.key(1)) != checksum(jax.random.key(2))


@pytest.mark.parametrize("value", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("start", [0, 256, 512])
def test_zeros_in_place_of_a_block_are_seen(value, start):
    """Chunks that are absent read as zeros; constants have so few bits that sums of them are often 0 modulo 2^32."""
    x = jnp.full(1024, value)
    assert checksum(x) != checksum(x.at[start : start + 512].set(0)) != checksum(0 * x)


def test_the_order_counts():
    x = jnp.repeat(jnp.asarray([1.0, 2.0]), 256)
    assert len({checksum(x), checksum(x[::-1]), checksum(x.reshape(2, 256).T.reshape(-1))}) == 3


def test_names_are_those_of_the_tree():
    x = jnp.zeros(2)
    assert list(checksums({"params": {"blocks": {0: x}}, "ema": None, "opt": (x,)})) == ["opt.0", "params.blocks.0"]


def test_nothing_is_copied():
    compiled = _checksum.lower(jnp.zeros((1024, 1024))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024
