"""From an example as a dataset holds it, encoded and of any size, to a Pillow image and a label."""

import io

import numpy as np
from PIL import Image


class BrokenExampleError(ValueError):
    """An example's file cannot be decoded; the message names the file where that is known."""


def decode_image(image: bytes | np.ndarray) -> Image.Image:
    """Decodes an image, completely.

    Args:
        image: an encoded image, in any of Pillow's formats, or its pixels, (H, W, 1 or 3) uint8.

    Returns:
        An image of mode "RGB", whatever the file has (grey, palette, CMYK, RGBA: opaque then), or "L" for pixels with
        one channel. As in torchvision and timm, the rotation in a photo's EXIF is ignored and 16-bit grey is cut at
        255, not scaled.

    Raises:
        BrokenExampleError: if the bytes are truncated or are no image.
        ValueError: if the pixels have another shape or type.
    """
    if not isinstance(image, bytes):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
            raise ValueError(f"image must be (H, W, 1 or 3) of uint8, got {image.shape} of {image.dtype}.")
        return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    try:
        file = Image.open(io.BytesIO(image))
        file.load()
        return file if file.mode == "RGB" else file.convert("RGB")
    # Each of Pillow's decoders has its own: OSError, SyntaxError, struct.error, DecompressionBombError, ...
    except Exception as error:
        raise BrokenExampleError(f"image cannot be decoded: {error}") from error


def label_array(label: int | np.integer | np.ndarray) -> np.ndarray | np.int32:
    """A class as int32 (), or the zeros and ones of multi-label data as float32 (num_classes,)."""
    return np.int32(label) if np.ndim(label) == 0 else np.asarray(label, np.float32)
