"""What data hands to the model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8


class Sample(NamedTuple):
    """An image at the network's scale and its objects.

    Attributes:
        image: uint8 RGB [height, width, 3].
        scale: pixels of this image per pixel of the original, in x and y.
        boxes: [n, 4], x1 y1 x2 y2 in pixels of this image.
        labels: [n], class indices.
    """

    image: np.ndarray
    scale: tuple[float, float]
    boxes: np.ndarray
    labels: np.ndarray


class Batch(NamedTuple):
    """Images on a canvas and their objects, padded to fixed shapes.

    On the host, numpy arrays; on devices, jax arrays.

    Attributes:
        images: RGB, zero outside the image.
        sizes: height and width of the image on its canvas, in pixels.
        scales: canvas pixels per original pixel in x and y.
        boxes: objects, x1 y1 x2 y2 in pixels of the canvas.
        labels: their class indices.
        box_mask: which of them exist.
        image_mask: False for a slot that only fills the batch.
    """

    images: UInt8[Array, "b h w 3"]
    sizes: Int[Array, "b 2"]
    scales: Float[Array, "b 2"]
    boxes: Float[Array, "b gts 4"]
    labels: Int[Array, "b gts"]
    box_mask: Bool[Array, "b gts"]
    image_mask: Bool[Array, " b"]


class HostBatch(NamedTuple):
    """A batch in the memory of the hosts that share it.

    Attributes:
        batch: this host's part.
        image_ids: of the whole batch.
        image_mask: of the whole batch; which slots are real.
    """

    batch: Batch
    image_ids: np.ndarray
    image_mask: np.ndarray


def pad(
    samples: Sequence[Sample],
    canvas: tuple[int, int] | None = None,
    max_boxes: int | None = None,
    image_mask: np.ndarray | None = None,
) -> Batch:
    """Puts each image in the upper left corner of a canvas and pads its objects.

    Args:
        samples: images that fit the canvas, with at most `max_boxes` objects each.
        canvas: height and width, in pixels. None: the smallest one with multiples of 32.
        max_boxes: number of objects per image after padding. None: those of the fullest image.
        image_mask: [b], which slots are real; the others get no objects. None: all.
    """
    size = len(samples)
    if canvas is None:
        height, width = (max(s.image.shape[axis] for s in samples) for axis in (0, 1))
        canvas = -(-height // 32) * 32, -(-width // 32) * 32
    if max_boxes is None:
        max_boxes = max([1, *(len(sample.boxes) for sample in samples)])
    mask = np.ones(size, bool) if image_mask is None else image_mask
    images = np.zeros((size, *canvas, 3), np.uint8)
    boxes = np.zeros((size, max_boxes, 4), np.float32)
    labels = np.zeros((size, max_boxes), np.int32)
    box_mask = np.zeros((size, max_boxes), bool)
    for i, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        images[i, :height, :width] = sample.image
        if mask[i]:
            count = len(sample.boxes)
            boxes[i, :count] = sample.boxes
            labels[i, :count] = sample.labels
            box_mask[i, :count] = True
    sizes = np.array([sample.image.shape[:2] for sample in samples], np.int32)
    scales = np.array([sample.scale for sample in samples], np.float32)
    arrays: Any = (images, sizes, scales, boxes, labels, box_mask, mask)
    return Batch(*arrays)
