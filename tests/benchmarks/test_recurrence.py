import jax
import numpy as np
import pytest

from benchmarks import recurrence


@pytest.mark.parametrize("kernels", ["diag", "dplr"])
def test_all_contestants_are_one_function(kernels, monkeypatch):
    monkeypatch.setattr(recurrence, "_CHUNKS", (3, 8))
    passes = recurrence.contestants((2, 10, 4), kernels)
    assert list(passes) == ["convolution", "3", "8"]
    for part in ("forward", "backward"):
        expected, *others = (jax.tree.leaves(getattr(each, part)()) for each in passes.values())
        for other in others:
            for ours, theirs in zip(other, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
