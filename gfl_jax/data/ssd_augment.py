"""SSD's training augmentation (Liu et al. 2016): zoom out, crop, stretch, distort colours.

Images are uint8 RGB [height, width, 3]; boxes are float32 [n, 4] as (x1, y1, x2, y2) in pixels of
their image. All randomness comes from the given generator; inputs are never written to.
"""

import cv2
import numpy as np

from gfl_jax.data import images

MEAN_COLOUR = (123, 116, 103)
"""RGB around a zoomed-out image: the mean of ImageNet."""

MAX_ZOOM = 4.0
CROP_MODES = (1.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
"""Minimum IoU of the crop with every object; 1 keeps the whole image."""

CROP_TRIES = 50
CROP_ROUNDS = 50
MIN_CROP = 0.3


def ssd_augment(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[float, float]]:
    """Zooms out, crops, stretches to a fixed size and distorts the colours, in this order.

    The horizontal flip, which comes before the colours in the reference, commutes with them and is
    left to the caller.

    Args:
        image: uint8 RGB [height, width, 3].
        boxes: float32 [n, 4] in its pixels.
        labels: [n].
        size: (height, width) of the result, in pixels.
        rng: source of all randomness.

    Returns:
        The image [*size, 3], the m <= n boxes that are left, clipped to it, their labels, and the
        (scale_x, scale_y) of the stretch. m is 0 only if n is.
    """
    image, boxes = expand(image, boxes, rng)
    image, boxes, labels = min_iou_crop(image, boxes, labels, rng)
    image, scale = images.resize(image, size)
    return photometric(image, rng), images.scale_boxes(boxes, scale, size), labels, scale


def expand(
    image: np.ndarray, boxes: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Half of the time, places the image at random on a canvas up to four times as wide and high.

    Args:
        image: uint8 RGB [height, width, 3].
        boxes: float32 [n, 4] in its pixels.
        rng: source of all randomness.

    Returns:
        The canvas, `MEAN_COLOUR` around the unchanged image, and the boxes on it.
    """
    if rng.random() >= 0.5:
        return image, boxes
    height, width = image.shape[:2]
    ratio = rng.uniform(1, MAX_ZOOM)
    left = int(rng.uniform(0, width * ratio - width))
    top = int(rng.uniform(0, height * ratio - height))
    right = int(width * ratio) - width - left
    bottom = int(height * ratio) - height - top
    canvas = cv2.copyMakeBorder(
        image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=MEAN_COLOUR
    )
    return canvas, boxes + np.array([left, top, left, top], np.float32)


def min_iou_crop(
    image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Crops a random patch whose IoU with every box reaches a randomly drawn bound.

    Each side of a patch is at least 0.3 of the image's, its ratio of height to width 0.5 to 2. It
    keeps the objects whose centre is strictly inside, and must keep at least one. After 50 failed
    attempts the bound is redrawn. An image without objects takes the first patch of a valid ratio.

    Args:
        image: uint8 RGB [height, width, 3].
        boxes: float32 [n, 4] in its pixels.
        labels: [n].
        rng: source of all randomness.

    Returns:
        The patch (a view), the boxes that it keeps, clipped to it and in its pixels, and their
        labels. With bound 1, or after 50 failed bounds, everything is returned unchanged.
    """
    height, width = image.shape[:2]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    for _ in range(CROP_ROUNDS):
        min_iou = rng.choice(CROP_MODES)
        if min_iou == 1:
            break
        for _ in range(CROP_TRIES):
            new_width = rng.uniform(MIN_CROP * width, width)
            new_height = rng.uniform(MIN_CROP * height, height)
            if not 0.5 <= new_height / new_width <= 2 or min(new_height, new_width) < 1:
                continue
            left = rng.uniform(0, width - new_width)
            top = rng.uniform(0, height - new_height)
            x1, y1, x2, y2 = map(int, (left, top, left + new_width, top + new_height))
            patch = np.array([x1, y1, x2, y2], np.float32)
            inside = ((patch[:2] < centres) & (centres < patch[2:])).all(1)
            if len(boxes) and (not inside.any() or images.box_iou(patch, boxes).min() < min_iou):
                continue
            low, high = np.tile(patch[:2], 2), np.tile(patch[2:], 2)
            return image[y1:y2, x1:x2], np.clip(boxes[inside], low, high) - low, labels[inside]
    return image, boxes, labels


def photometric(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation, hue and channel order, each half of the time.

    Computed in float32 without clipping in between. Images are sent to the device as uint8, so the
    result is clipped and rounded, whereas the reference keeps floats, even outside [0, 255].

    Args:
        image: uint8 RGB [height, width, 3].
        rng: source of all randomness.

    Returns:
        uint8 [height, width, 3].
    """

    def drawn(low: float, high: float, neutral: float) -> float:
        return rng.uniform(low, high) if rng.random() < 0.5 else neutral

    brightness, contrast = drawn(-32, 32, 0), drawn(0.5, 1.5, 1)
    saturation, hue = drawn(0.5, 1.5, 1), drawn(-18, 18, 0)
    contrast_first = rng.random() < 0.5
    pixels: np.ndarray = image.astype(np.float32) + np.float32(brightness)
    if contrast_first:
        pixels *= np.float32(contrast)
    if saturation != 1 or hue != 0:
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)  # degrees, [0, 1], as the pixels
        hsv *= np.array([1, saturation, 1], np.float32)
        hsv[..., 0] = (hsv[..., 0] + np.float32(hue)) % 360
        pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first:
        pixels *= np.float32(contrast)
    if rng.random() < 0.5:
        pixels = pixels[..., rng.permutation(3)]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
