import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.detection.anchors import cell_anchors, grid_anchors, pyramid_anchors


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden/torchvision/unit_anchors.npz")


@pytest.mark.parametrize("name", ["retina_default", "fpn_default", "odd"])
def test_anchors_are_torchvisions_to_the_last_bit(golden, name):
    case = json.loads(str(golden["meta"]))["cases"][name]
    (ratios,) = {tuple(ratios) for ratios in case["aspect_ratios"]}
    shapes = [*map(tuple, case["feature_sizes"])]
    levels = pyramid_anchors(case["sizes"], ratios, shapes, tuple(case["image_size"]))
    np.testing.assert_array_equal(jnp.concatenate(levels), golden[f"{name}/anchors"])
    for level, sizes in enumerate(case["sizes"]):
        np.testing.assert_array_equal(cell_anchors(sizes, ratios), golden[f"{name}/cell/{level}"])


def test_corners_are_rounded_half_to_even():
    np.testing.assert_array_equal(cell_anchors([5, 7], [1.0]), [[-2, -2, 2, 2], [-4, -4, 4, 4]])


def test_anchors_of_a_position_follow_each_other_then_columns_then_rows():
    cell = np.array([[-1, -1, 1, 1], [-2, -3, 2, 3]], np.float32)
    anchors = grid_anchors(cell, (2, 3), (10, 100)).reshape(2, 3, 2, 4)
    for y in range(2):
        for x in range(3):
            for a in range(2):
                np.testing.assert_array_equal(anchors[y, x, a], cell[a] + [100 * x, 10 * y, 100 * x, 10 * y])


def test_compiled_they_are_the_same_and_no_constant_of_the_program():
    shapes, sizes = [(100, 168), (50, 84)], [[32.0], [64.0]]
    compiled = jax.jit(lambda: pyramid_anchors(sizes, (0.5, 1, 2), shapes, (800, 1344))).lower().compile()
    jax.tree.map(np.testing.assert_array_equal, compiled(), pyramid_anchors(sizes, (0.5, 1, 2), shapes, (800, 1344)))
    assert len(compiled.as_text()) < 50_000


def test_each_map_needs_its_sizes():
    with pytest.raises(ValueError, match="sizes must have an entry for each of 2 maps, got 1"):
        pyramid_anchors([[32]], [1.0], [(4, 4), (2, 2)], (32, 32))


def test_maps_have_equally_many_anchors():
    """One head says as many things at every position of all maps."""
    with pytest.raises(ValueError, match=r"^sizes must have equally many for each map, .* got \(\(32, 40\), \(64,\)\)"):
        pyramid_anchors(((32, 40), (64,)), (1.0,), [(8, 8), (4, 4)], (64, 64))
