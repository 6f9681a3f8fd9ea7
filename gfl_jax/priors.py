"""Where predictions live: the grids of anchors, one level after another, P3 first."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PAD_MULTIPLE = 32
"""Images count as padded to this multiple when it is decided which of their cells exist."""


class Priors(NamedTuple):
    """Anchors of a canvas, flattened level by level, row-major over (y, x). Pixels of the canvas.

    boxes: x1, y1, x2, y2.  centers: x, y.  strides: of each anchor's level.
    cells: column and row in the level.  levels: number of anchors of each level.
    """

    boxes: Float[np.ndarray, "anchors 4"]
    centers: Float[np.ndarray, "anchors 2"]
    strides: Float[np.ndarray, " anchors"]
    cells: Int[np.ndarray, "anchors 2"]
    levels: tuple[int, ...]

    def valid(self, sizes: Int[Array, "b 2"]) -> Bool[Array, "b anchors"]:
        """Anchors whose cell lies inside the image (height, width), rounded up to 32 pixels.

        An image of size 0 has none. The others are in the padding of the canvas: they are neither
        candidates nor negatives.
        """
        padded = -(-sizes // PAD_MULTIPLE) * PAD_MULTIPLE
        extent = jnp.ceil(padded[:, None, ::-1] / self.strides[:, None])  # b anchors (x, y)
        return (jnp.asarray(self.cells) < extent).all(-1)


@dataclasses.dataclass(frozen=True)
class SquareAnchors:
    """One square anchor per cell, as in ATSS (Zhang et al., arXiv 1912.02424) and GFL.

    scale: side in strides of the level.
    center_offset: position of a cell's centre in strides; 0 puts it on the cell's top-left corner
        as the reference does, 0.5 in its middle. Weights trained with one lose AP with another.
    """

    scale: float = 8.0
    center_offset: float = 0.0
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)

    def __call__(self, level_sizes: Sequence[tuple[int, int]]) -> Priors:
        """The anchors of feature maps of these (height, width)."""
        centers, cells, strides = [], [], []
        for (height, width), stride in zip(level_sizes, self.strides, strict=True):
            y, x = np.mgrid[:height, :width].reshape(2, -1)
            cells.append(np.stack([x, y], -1))
            centers.append((cells[-1] + self.center_offset) * stride)
            strides.append(np.full(height * width, stride))
        center = np.concatenate(centers).astype(np.float32)
        stride_of = np.concatenate(strides).astype(np.float32)
        half = 0.5 * self.scale * stride_of[:, None]
        return Priors(
            boxes=np.concatenate([center - half, center + half], -1),
            centers=center,
            strides=stride_of,
            cells=np.concatenate(cells),
            levels=tuple(height * width for height, width in level_sizes),
        )
