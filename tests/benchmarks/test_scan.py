import jax
import numpy as np
import pytest

from benchmarks import scan


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_all_contestants_are_one_function(discretization):
    inputs = scan.arguments((2, 7, 4, 3), "float32")
    f, *others = scan.contestants([2, 4], discretization).values()
    assert len(others) == 3
    expected = jax.jit(f)(*inputs)
    for other in others:
        np.testing.assert_allclose(jax.jit(other)(*inputs), expected, rtol=0, atol=1e-6)


def test_decays_are_decays_and_half_precision_is_that_of_activations():
    u, delta, A, B, C, D = scan.arguments((2, 7, 4, 3), "bfloat16")
    assert (delta > 0).all()
    assert (A < 0).all()
    assert {x.dtype.name for x in (u, delta, B, C)} == {"bfloat16"}
    assert {x.dtype.name for x in (A, D)} == {"float32"}
