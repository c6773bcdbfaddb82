"""Checksums of arrays, which are the same however an array is divided over devices and processes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> dict[str, int]:
    """64 bits that tell the bits of each array in `tree` from others, by the array's name, `params.norm.scale`.

    They are computed where the arrays are, in one pass without a copy, and are exactly the same for every sharding. A
    change of one element always changes them, any other but for a chance of about 2^-64. With several processes, all
    have to call this, for the same arrays.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # Fetched one by one: XLA's backend for CPUs aborts where too many sums over devices wait for each other.
        total, parity = jax.device_get(_checksum(leaf))
        found[jax.tree_util.keystr(path, simple=True, separator=".")] = int(total) << 32 | int(parity)
    return found


@jax.jit
def _checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum modulo 2^32, and the exclusive or, of a hash of each element's bits and position.

    A sum of bits times weights would be 0 for as many ones as a power of two, as it is where zeros are read for them.
    """
    bits = _bits(x)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = np.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
        position += stride * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    hashes = _mixed(bits + _mixed(position))
    # As two reductions, XLA's backend for CPUs would keep all hashes in memory.
    return jax.lax.reduce(
        (hashes, hashes),
        (np.uint32(0), np.uint32(0)),
        lambda a, b: (a[0] + b[0], a[1] ^ b[1]),
        tuple(range(bits.ndim)),
    )


def _bits(x: jax.Array) -> jax.Array:
    """The bits of each element as a uint32, or as several along a last axis."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype != jnp.bool:
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
    return x.astype(jnp.uint32)


def _mixed(h: jax.Array) -> jax.Array:
    """A permutation of the numbers below 2^32, the last steps of MurmurHash3 (Appleby, 2011)."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
