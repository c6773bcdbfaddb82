import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.layers.position import resample_positions


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def cubic(x):
    """Keys' kernel, a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0


def resized(rows, n):
    """Cubic interpolation along the first axis, with kernels stretched over as many rows as a new one covers."""
    old = len(rows)
    stretch = max(old / n, 1)
    result = []
    for i in range(n):
        centre = (i + 0.5) * old / n - 0.5
        weights = np.array([cubic((j - centre) / stretch) for j in range(old)])
        result.append(np.tensordot(weights / weights.sum(), rows, axes=1))
    return np.array(result)


@pytest.mark.parametrize("case", ["up", "down", "same"])
def test_positions_are_resampled_as_in_timm(shared, case):
    golden = np.load(shared / "golden/timm/unit_layers.npz")
    height, width = json.loads(str(golden["meta"]))["cases"][f"pos_embed/{case}"]["new_size"]
    expected = golden[f"pos_embed/{case}"]
    y = resample_positions(jnp.asarray(golden["pos_embed/in"]), (7, 7), (height, width))
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("new_grid", [(4, 9), (2, 3), (7, 2), (1, 1)])
def test_positions_are_interpolated_by_cubics_along_each_axis(new_grid):
    pos_embed = drawn(1, 4 * 5, 3)
    columns = resized(pos_embed.reshape(4, 5, 3), new_grid[0])
    expected = resized(columns.swapaxes(0, 1), new_grid[1]).swapaxes(0, 1).reshape(1, -1, 3)
    y = resample_positions(jnp.asarray(pos_embed), (4, 5), new_grid)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tokens_that_are_no_patches_stay_as_they_are(prefix):
    pos_embed = jnp.asarray(drawn(1, prefix + 6, 4))
    y = resample_positions(pos_embed, (2, 3), (4, 4))
    assert y.shape == (1, prefix + 16, 4)
    np.testing.assert_array_equal(y[:, :prefix], pos_embed[:, :prefix])
    np.testing.assert_array_equal(y[:, prefix:], resample_positions(pos_embed[:, prefix:], (2, 3), (4, 4)))


def test_equal_numbers_of_patches_in_other_grids_are_not_the_same():
    pos_embed = jnp.asarray(drawn(1, 6, 4))
    np.testing.assert_array_equal(resample_positions(pos_embed, (2, 3), (2, 3)), pos_embed)
    assert not np.allclose(resample_positions(pos_embed, (2, 3), (3, 2)), pos_embed)


def test_half_precision_loses_rounding_only():
    pos_embed = jnp.asarray(drawn(1, 1 + 14 * 14, 4))
    y = resample_positions(pos_embed.astype(jnp.bfloat16), (14, 14), (24, 24))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), resample_positions(pos_embed, (14, 14), (24, 24)), atol=0.05)


def test_gradients_reach_every_embedding():
    gradient = jax.grad(lambda x: jnp.sin(resample_positions(x, (3, 3), (5, 4))).sum())(jnp.asarray(drawn(1, 10, 2)))
    assert np.isfinite(gradient).all()
    assert np.all(gradient)


def test_fewer_embeddings_than_patches_are_rejected():
    with pytest.raises(ValueError, match=r"pos_embed must have an embedding for each patch of grid=\(3, 3\), got 8"):
        resample_positions(jnp.zeros((1, 8, 4)), (3, 3), (4, 4))
