import io

import numpy as np
import pytest
from PIL import Image

from ssm_jax.data.decode import BrokenExampleError, decode_image, label_array

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
SMOOTH = np.add.outer(np.arange(40) * 3, np.arange(60) * 2)[..., None].repeat(3, axis=2).astype(np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_files_without_loss_give_their_pixels(format):
    image = decode_image(encoded(Image.fromarray(PIXELS), format))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_files_with_loss_give_nearly_their_pixels(format):
    image = np.asarray(decode_image(encoded(Image.fromarray(SMOOTH), format, quality=95)))
    assert image.shape == SMOOTH.shape
    assert np.abs(image.astype(int) - SMOOTH).max() < 20


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_files_of_all_modes_become_rgb(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    decoded = decode_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_grey_files_have_three_equal_channels():
    grey = PIXELS[..., 0]
    decoded = np.asarray(decode_image(encoded(Image.fromarray(grey))))
    np.testing.assert_array_equal(decoded, np.stack([grey] * 3, axis=-1))


def test_rotation_in_exif_is_ignored():
    exif = Image.Exif()
    exif[274] = 6  # orientation: turn by 90 degrees
    assert decode_image(encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)).size == (14, 9)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pixels_are_taken_as_they_are(channels, mode):
    pixels = PIXELS[..., :channels]  # not contiguous, for one channel
    image = decode_image(pixels)
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0, 0.02, 0.3, 0.9])
def test_truncated_files_are_broken_examples(format, part):
    whole = encoded(Image.fromarray(PIXELS), format)
    with pytest.raises(BrokenExampleError, match=r"^image cannot be decoded: "):
        decode_image(whole[: int(part * len(whole))])


def test_bytes_that_are_no_image_are_broken_examples():
    with pytest.raises(BrokenExampleError, match="cannot identify image file"):
        decode_image(b"<html>404 not found</html>")


def test_damaged_files_are_broken_examples_or_images():
    rng = np.random.default_rng(0)
    broken = 0
    for format in ("JPEG", "PNG", "GIF"):
        whole = encoded(Image.fromarray(SMOOTH), format)
        for _ in range(60):
            damaged = bytearray(whole)
            for place in rng.integers(0, len(whole), 5):
                damaged[place] = rng.integers(256)
            try:
                assert decode_image(bytes(damaged)).mode == "RGB"
            except BrokenExampleError:
                broken += 1
    assert broken > 20


@pytest.mark.parametrize(
    "pixels",
    [PIXELS[..., 0], PIXELS[..., :2], PIXELS.astype(np.float32), PIXELS[None]],
    ids=["2-d", "2 channels", "float", "4-d"],
)
def test_arrays_of_other_shapes_and_types_are_refused(pixels):
    with pytest.raises(ValueError, match=r"^image must be \(H, W, 1 or 3\) of uint8, got \(") as error:
        decode_image(pixels)
    assert not isinstance(error.value, BrokenExampleError)  # the source is wrong, not one file


def test_labels_are_int32_or_float32():
    assert label_array(3).dtype == np.int32
    assert label_array(np.int64(3)) == 3
    several = label_array(np.array([0, 1, 1]))
    assert several.dtype == np.float32
    np.testing.assert_array_equal(several, [0, 1, 1])
