import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import drawn

from ssm_jax.models.convnext import ConvNeXt, convnext_3d_s4nd, convnext_s3d, convnext_s4nd
from ssm_jax.pretrained import inflate

WIDTHS = {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 10)}
STATE = {"mixer": {"d_state": 4, "mode": "diag"}}
FRAMES = (8, 32, 32)


def images(build, **options):
    return drawn(lambda: build(3, img_size=32, **WIDTHS | options, rngs=nnx.Rngs(0)), seed=1)


def video(build, img_size=FRAMES, num_classes=5, **options):
    return drawn(lambda: build(num_classes, img_size=img_size, **WIDTHS, **options, rngs=nnx.Rngs(0)), seed=2)


def test_average_of_a_still_is_the_image():
    """In the middle of the video, where no convolution reaches over its ends."""
    flat, moving = images(ConvNeXt), video(ConvNeXt, img_size=(40, 32, 32))
    inflate(flat, moving, average=True)
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    still = np.broadcast_to(image[:, None], (1, 40, 32, 32, 3))
    expected = jax.jit(flat.features)(image)
    for ours, there in zip(jax.jit(moving.features)(still), expected, strict=True):
        np.testing.assert_allclose(ours[:, 10], there, rtol=0, atol=1e-4 * np.abs(there).max())


def test_factorised_convolutions_take_the_spatial_factor_and_keep_their_own_in_time():
    flat, moving = images(ConvNeXt), video(convnext_s3d)
    before = np.asarray(moving.stem.conv.time[...])
    inflate(flat, moving)
    np.testing.assert_array_equal(moving.stem.conv.time[...], before)
    np.testing.assert_array_equal(moving.stem.conv.space.kernel[...], flat.stem.conv.kernel[...])
    ours, there = moving.stages[2].blocks[0].mixer.conv, flat.stages[2].blocks[0].mixer.conv
    np.testing.assert_array_equal(ours.space.kernel[...], there.kernel[...])
    np.testing.assert_array_equal(ours.space.bias[...], there.bias[...])


@pytest.mark.parametrize("average", [False, True])
def test_kernels_are_repeated(average):
    flat, moving = images(ConvNeXt), video(ConvNeXt)
    inflate(flat, moving, average=average)
    for name, frames in [("stem", 2), ("mixer", 3)]:
        pick = lambda net, name=name: (net.stem if name == "stem" else net.stages[0].blocks[0].mixer).conv.kernel[...]  # noqa: E731
        expected = np.asarray(pick(flat)) / (frames if average else 1)
        np.testing.assert_allclose(pick(moving), np.broadcast_to(expected, (frames, *expected.shape)), rtol=1e-6)


def test_state_spaces_over_height_and_width_are_the_images_and_the_one_over_time_is_its_own():
    flat, moving = images(convnext_s4nd, stem="patch", **STATE), video(convnext_3d_s4nd, **STATE)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(moving)))
    inflate(flat, moving)
    ours, there = moving.stages[1].blocks[0].mixer, flat.stages[1].blocks[0].mixer
    kernels = ours.sample_kernels((4, 4, 4))
    for mine, image in zip(kernels[1:], there.sample_kernels((4, 4)), strict=True):
        np.testing.assert_array_equal(mine, image)
    np.testing.assert_array_equal(ours.D[...], there.D[...])
    for name, value in before["stages"][1]["blocks"][0]["mixer"]["kernels"][0].items():
        np.testing.assert_array_equal(getattr(ours.kernels[0], name)[...], value)


def test_classifiers_stay_and_all_else_is_copied():
    flat, moving = images(ConvNeXt), video(ConvNeXt)
    head = np.asarray(moving.head.kernel[...])
    inflate(flat, moving)
    np.testing.assert_array_equal(moving.head.kernel[...], head)
    np.testing.assert_array_equal(moving.norm.scale[...], flat.norm.scale[...])
    np.testing.assert_array_equal(
        moving.stages[3].blocks[0].mlp.fc1.kernel[...], flat.stages[3].blocks[0].mlp.fc1.kernel[...]
    )
    np.testing.assert_array_equal(moving.stages[3].blocks[0].gamma[...], flat.stages[3].blocks[0].gamma[...])


@pytest.mark.parametrize(
    ("flat", "moving", "message"),
    [
        ({"build": ConvNeXt}, {"build": convnext_3d_s4nd, **STATE}, "has no counterpart in images"),
        ({"build": convnext_s4nd, **STATE}, {"build": convnext_3d_s4nd, **STATE}, "stem.conv.* has no counterpart"),
        (
            {"build": ConvNeXt, "depths": (1, 1, 2, 1)},
            {"build": ConvNeXt},
            r"stages\.2\.blocks\.1\..* of images has no place in video",
        ),
    ],
)
def test_networks_that_do_not_match_are_refused_and_left_alone(flat, moving, message):
    flat, moving = images(**flat), video(**moving)
    before = nnx.to_pure_dict(nnx.state(moving))
    with pytest.raises(ValueError, match=message):
        inflate(flat, moving)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(moving)), before)


def test_only_images_are_inflated_and_only_to_video():
    with pytest.raises(ValueError, match="images must be a ConvNeXt over two axes and video one over three"):
        inflate(video(ConvNeXt), images(ConvNeXt))


def test_dtypes_stay():
    flat, moving = images(ConvNeXt), video(ConvNeXt, param_dtype=jnp.bfloat16)
    inflate(flat, moving)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(moving, nnx.Param))} == {jnp.dtype("bfloat16")}
