"""Images of 16 bits per channel, whose values seldom reach 65535: networks see 8 bits."""

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


def as_8_bits(image: np.ndarray, white: int) -> bytes:
    """A PNG of 8 bits.

    Args:
        image: uint16 BGR [height, width, 3].
        white: value that becomes 255, as do those above it.
    """
    scaled = np.minimum(image.astype(np.float32) * (255 / white) + 0.5, 255).astype(np.uint8)
    return cv2.imencode(".png", scaled)[1].tobytes()
