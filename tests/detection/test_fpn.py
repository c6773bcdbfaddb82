import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detectors import called, channels_last
from flax import nnx
from modules import assert_close

from ssm_jax.detection.fpn import FPN, P6P7, P6P7FromNetwork, Pool, enlarge
from ssm_jax.pretrained import load_torch

EXTRA = {"maxpool": Pool, "p6p7_p5": P6P7, "p6p7_c5": P6P7FromNetwork}


@pytest.mark.parametrize("case", EXTRA)
def test_pyramids_of_odd_maps_are_torchvisions(shared, case):
    with np.load(shared / "golden/torchvision/unit_misc.npz") as file:
        arrays = {name.removeprefix("fpn/"): x for name, x in file.items() if name.startswith("fpn/")}
    maps = [channels_last(arrays[f"in/{i}"]) for i in range(3)]
    of_case = {name.removeprefix(f"{case}/"): x for name, x in arrays.items() if name.startswith(f"{case}/")}
    fpn = nnx.eval_shape(lambda: FPN([x.shape[-1] for x in maps], 6, extra=EXTRA[case], rngs=nnx.Rngs(0)))
    names = {"inner_blocks": "inner", "layer_blocks": "layers", "extra_blocks": "extra"}
    state = {}
    for name, x in of_case.items():
        if name.startswith("param/"):
            ours = re.sub(r"(\w+_blocks)", lambda match: names[match[1]], name.removeprefix("param/"))
            state[re.sub(r"\.(\d+)\.0\.", r".\1.conv.", ours)] = x
    load_torch(fpn, state)
    pyramid = called(lambda fpn, maps: fpn(maps), fpn, list(map(jnp.asarray, maps)))
    expected = [channels_last(x) for name, x in of_case.items() if name.startswith("out/")]
    assert len(pyramid) == len(expected)
    for ours, theirs in zip(pyramid, expected, strict=True):
        assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn", "faster_rcnn_v2"])
def test_maps_of_network_and_pyramid_are_torchvisions(request, name):
    golden = request.getfixturevalue(name)

    def maps(detector, images):
        seen = detector.backbone(images)
        return seen, detector.fpn(seen)

    detector = nnx.view(golden.detector, use_running_average=True, raise_if_not_found=False)
    seen, pyramid = called(maps, detector, golden.images)
    for ours, kind in [(seen, "body/"), (pyramid, "fpn/")]:
        expected = golden.some(kind).values()
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, channels_last(b), 1e-4)


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (5, 7), (8, 9), (2, 3)])
def test_an_enlarged_map_has_the_value_of_the_cell_that_a_corner_is_in(size):
    x = np.arange(6.0).reshape(1, 2, 3, 1)
    rows, columns = (np.floor(np.arange(n) * old / n + 1e-9).astype(int) for n, old in zip(size, (2, 3), strict=True))
    np.testing.assert_array_equal(enlarge(jnp.asarray(x), size)[0, :, :, 0], x[0, :, :, 0][rows][:, columns])


def test_a_coarse_map_reaches_all_finer_ones():
    fpn = FPN((2, 3, 4), 5, rngs=nnx.Rngs(0))
    maps = [jnp.zeros((1, side, side, c)) for side, c in [(8, 2), (4, 3), (2, 4)]]
    reached = jax.jit(lambda x: [y.any() for y in fpn((*maps[:2], x))])(jnp.ones((1, 2, 2, 4)))
    assert all(reached)
    reached = jax.jit(lambda x: [y.any() for y in fpn((x, *maps[1:]))])(jnp.ones((1, 8, 8, 2)))
    assert [bool(x) for x in reached] == [True, False, False, False]
