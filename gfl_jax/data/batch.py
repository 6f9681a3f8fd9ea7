"""What data hands to the model."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8


class Batch(NamedTuple):
    """Images on a canvas and their objects, padded to fixed shapes. Boxes in pixels of the canvas.

    On the host, numpy arrays; on devices, jax arrays.

    images: RGB, zero outside the image.  sizes: height and width of the image on its canvas.
    scales: canvas pixels per original pixel in x and y.  boxes, labels, box_mask: objects, class
    indices and which of them exist.  image_mask: False for a slot that only fills the batch.
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

    batch: this host's part.  image_ids, image_mask: of the whole batch; which slots are real.
    """

    batch: Batch
    image_ids: np.ndarray
    image_mask: np.ndarray
