"""Images of 16 bits per channel, whose values seldom reach 65535: networks see 8 bits."""

from collections.abc import Mapping

import cv2
import numpy as np

WHITE = 65535
"""The largest value that 16 bits can hold."""

_PNG = b"\x89PNG\r\n\x1a\n"
# TIFF of either byte order, PGM and PPM, JPEG 2000 as a file or bare.
_MAY_HAVE_16 = (_PNG, b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")


def read_16_bits(data: bytes) -> np.ndarray | None:
    """Decodes an image of 16 bits.

    Args:
        data: the bytes of the image file.

    Returns:
        uint16 BGR [height, width, 3]; None for any other file.
    """
    if not data.startswith(_MAY_HAVE_16) or (data.startswith(_PNG) and data[24:25] != b"\x10"):
        return None
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error:
        return None
    return image if image is not None and image.dtype == np.uint16 else None


def nearly_largest(image: np.ndarray) -> int:
    """The value that 99.9% of an image's values do not exceed: a hot pixel does not matter."""
    return int(np.percentile(image, 99.9, method="lower"))


def dark_images(brightest: Mapping[str, int]) -> tuple[str, int, str] | None:
    """Whether half or more of the images of 16 bits use only a small part of them.

    Args:
        brightest: `nearly_largest` of each image, by its file's name. All black ones do not count.

    Returns:
        The brightest of the dark images, the value that should be white (4095 for 12 bits), and
        both in words; None if the images are as bright as others.
    """
    seen = {name: value for name, value in brightest.items() if value}
    dark = {name: value for name, value in seen.items() if value < (WHITE + 1) // 4}
    if not dark or 2 * len(dark) < len(seen):
        return None
    file = max(dark, key=lambda name: dark[name])
    white = max(2 ** dark[file].bit_length() - 1, 255)
    words = (
        f"{len(dark)} of {len(seen)} images of 16 bits have hardly any value above "
        f"{dark[file]}, of {WHITE}"
    )
    return file, white, words


def as_8_bits(image: np.ndarray, white: int) -> bytes:
    """A PNG of 8 bits.

    Args:
        image: uint16 BGR [height, width, 3].
        white: value that becomes 255, as do those above it.
    """
    scaled = np.minimum(image.astype(np.float32) * (255 / white) + 0.5, 255).astype(np.uint8)
    return cv2.imencode(".png", scaled)[1].tobytes()
