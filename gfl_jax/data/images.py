"""Image geometry on numpy arrays: decode, resize and flip images, and their boxes with them.

Boxes are float32 [n, 4] as (x1, y1, x2, y2) in pixels, x to the right and y down, with (0, 0) at
the top-left corner of the top-left pixel. Sizes are (height, width) in pixels.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import cv2
import numpy as np

from gfl_jax.errors import InputError

IntOrArray = TypeVar("IntOrArray", int, np.ndarray)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
"""What the names of image files end with, in lower case."""

# In entropy-coded JPEG data 0xFF is followed by a stuffed zero or a restart marker (D0..D7).
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_JPEG_EXIF = 0xE1
_JPEG_END = 0xD9
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class ImageSizeError(InputError):
    """An image does not have the size that its annotation states."""


def decode(data: bytes, size: tuple[int, int] | None = None, name: str = "") -> np.ndarray:
    """Decodes an encoded image (JPEG, PNG, ...) to 8-bit RGB.

    Grey, palette and CMYK images become RGB, alpha is dropped, 16 bits become the upper 8. An
    image with an EXIF orientation is rotated upright, as in the reference, unless only the
    unrotated image has the annotated size: then the boxes were drawn on that one.

    Args:
        data: the bytes of the image file.
        size: the annotated (height, width), which the image must have; None accepts any.
        name: the file's name, for error messages.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ImageSizeError: the image has the annotated size neither rotated nor unrotated.
        ValueError: the data are truncated or not an image.
    """
    if _is_jpeg(data) and _JPEG_END not in (marker for marker, _ in _jpeg_segments(data)):
        # Some OpenCV versions silently fill what is missing with grey.
        raise InputError(f"{name or 'image'}: truncated JPEG file (no end-of-image marker)")
    image = _imdecode(data, cv2.IMREAD_COLOR, name)
    if size is not None and image.shape[:2] != tuple(size):
        turned, image = (
            image,
            _imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION, name),
        )
        if image.shape[:2] != tuple(size):
            height, width = turned.shape[:2]
            raise ImageSizeError(
                f"{name or 'image'}: the annotations state width x height {size[1]} x {size[0]}, "
                f"but the file has {width} x {height}"
            )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def image_size(data: bytes, name: str = "") -> tuple[int, int]:
    """Returns the (height, width) that `decode` gives, from only the header if possible.

    Args:
        data: the bytes of the image file.
        name: the file's name, for error messages.

    Raises:
        ValueError: the data are truncated or not an image.
    """
    if _is_jpeg(data):
        for marker, start in _jpeg_segments(data):
            if marker == _JPEG_EXIF and data[start + 2 : start + 6] == b"Exif":
                break  # may be rotated: let OpenCV decide
            if marker in _JPEG_FRAMES:
                height, width = data[start + 3 : start + 5], data[start + 5 : start + 7]
                return int.from_bytes(height, "big"), int.from_bytes(width, "big")
    height, width, _ = decode(data, name=name).shape
    return height, width


def resized_size(
    height: IntOrArray, width: IntOrArray, long_side: int, short_side: int
) -> tuple[IntOrArray, IntOrArray]:
    """Returns the largest (height, width) of the same ratio within the limits of both sides.

    Args:
        height: of the image, in pixels; or an array of heights.
        width: of the image, in pixels; or an array of widths.
        long_side: limit of the longer side, in pixels.
        short_side: limit of the shorter side, in pixels.
    """
    longer, shorter = np.maximum(height, width), np.minimum(height, width)
    scale = np.minimum(long_side / longer, short_side / shorter)
    new_height, new_width = (height * scale + 0.5), (width * scale + 0.5)
    return np.maximum(new_height.astype(int), 1), np.maximum(new_width.astype(int), 1)


def canvases_of(
    scale: tuple[int, int], landscape: tuple[tuple[int, int], ...] = ()
) -> tuple[tuple[int, int], ...]:
    """All canvases that a batch may have.

    Args:
        scale: limits of the (long, short) sides of images, in pixels.
        landscape: (height, width) of the landscape canvases; empty: the one that holds `scale`.

    Returns:
        These and their portrait versions, sorted by area.
    """
    long_side, short_side = (-(-side // 32) * 32 for side in scale)
    landscape = landscape or ((short_side, long_side),)
    both = {*landscape, *((width, height) for height, width in landscape)}
    return tuple(sorted(both, key=lambda canvas: (canvas[0] * canvas[1], canvas)))


def smallest_canvas(
    canvases: Sequence[tuple[int, int]], size: tuple[int, int]
) -> tuple[int, int] | None:
    """The first of these canvases, sorted by area, that holds an image of a size; None: none."""
    return next((c for c in canvases if size[0] <= c[0] and size[1] <= c[1]), None)


def resize(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, tuple[float, float]]:
    """Stretches an image to a size: bilinear, half-pixel centres, rounded to uint8.

    Args:
        image: uint8 [height, width, 3].
        size: new (height, width), in pixels.

    Returns:
        The resized image and (scale_x, scale_y) = new / old width and height.
    """
    height, width = image.shape[:2]
    new_height, new_width = size
    resized = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    return resized, (new_width / width, new_height / height)


def resize_keep_ratio(
    image: np.ndarray, long_side: int, short_side: int
) -> tuple[np.ndarray, tuple[float, float]]:
    """Resizes an image to `resized_size`, as `resize` does.

    Args:
        image: uint8 [height, width, 3].
        long_side: limit of the longer side, in pixels.
        short_side: limit of the shorter side, in pixels.

    Returns:
        The resized image and (scale_x, scale_y) = new / old width and height; the two differ a
        little because each new side is a whole number.
    """
    height, width = image.shape[:2]
    new_height, new_width = resized_size(height, width, long_side, short_side)
    return resize(image, (int(new_height), int(new_width)))


def scale_boxes(boxes: np.ndarray, scale: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """Scales boxes with their image and clips them to it.

    Args:
        boxes: float32 [n, 4] in pixels of the image before resizing.
        scale: (scale_x, scale_y) from `resize` or `resize_keep_ratio`.
        size: (height, width) of the resized image.

    Returns:
        float32 [n, 4]; boxes outside the image are kept, with no area.
    """
    height, width = size
    limits = np.array([width, height, width, height], np.float32)
    return np.clip(boxes * np.array([*scale, *scale], np.float32), 0, limits)


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes on the host, [..., 4] each; leading axes broadcast.

    An inverted box counts as empty; the IoU with an empty box is 0.
    """
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    overlap = np.maximum(high - low, 0).prod(-1)
    areas = [np.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(-1) for boxes in (a, b)]
    return overlap / np.maximum(areas[0] + areas[1] - overlap, 1e-6)


def flip(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirrors an image [height, width, 3] and its boxes [n, 4] left to right."""
    width = np.float32(image.shape[1])
    x1, y1, x2, y2 = boxes.T
    return np.ascontiguousarray(image[:, ::-1]), np.stack([width - x2, y1, width - x1, y2], axis=1)


def _imdecode(data: bytes, flags: int, name: str) -> np.ndarray:
    """Decodes to uint8 BGR [height, width, 3]; raises a ValueError that names the file."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # empty data, or larger than OpenCV allows
        image = None
    if image is None:
        raise InputError(
            f"{name or 'image'}: truncated or not an image of 8 or 16 bits per channel "
            f"({len(data)} bytes)"
        )
    return image


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields (marker, position after the marker) of each JPEG segment up to the end of image."""
    position = 2
    while match := _JPEG_MARKER.search(data, position):
        marker, start = data[match.end() - 1], match.end()
        yield marker, start
        if marker == _JPEG_END:
            return
        position = start + int.from_bytes(data[start : start + 2], "big")
