"""Where predictions live: anchors or points by level (finest first), row, column, and in a cell."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gfl_jax.errors import InputError

PAD_MULTIPLE = 32
"""Images count as padded to this multiple when it is decided which of their cells exist."""


class Priors(NamedTuple):
    """Anchors or points of a canvas, all levels together.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the canvas; points are boxes without size.
        centers: x, y in pixels.
        strides: of each prior's level, in pixels.
        cells: column and row in the level.
        grids: (height, width) of each level in cells.
        per_cell: priors per cell of each level.
        trains_padding: whether cells in the padding of the canvas are trained on, as background.
    """

    boxes: Float[np.ndarray, "priors 4"]
    centers: Float[np.ndarray, "priors 2"]
    strides: Float[np.ndarray, " priors"]
    cells: Int[np.ndarray, "priors 2"]
    grids: tuple[tuple[int, int], ...]
    per_cell: tuple[int, ...]
    trains_padding: bool

    @property
    def levels(self) -> tuple[int, ...]:
        """Number of priors of each level."""
        return tuple(h * w * n for (h, w), n in zip(self.grids, self.per_cell, strict=True))

    def by_level(self, values: Sequence[float]) -> Float[np.ndarray, " priors"]:
        """One value a level as one a prior."""
        return np.repeat(np.asarray(values, np.float32), self.levels)

    def valid(self, sizes: Int[Array, "b 2"]) -> Bool[Array, "b priors"]:
        """Priors whose cell lies inside the image (height, width), rounded up to 32 pixels.

        An image of size 0 has none. The others are in the padding of the canvas.
        """
        padded = -(-sizes // PAD_MULTIPLE) * PAD_MULTIPLE
        extent = jnp.ceil(padded[:, None, ::-1] / self.strides[:, None])  # b priors (x, y)
        return (jnp.asarray(self.cells) < extent).all(-1)

    def trained(self, sizes: Int[Array, "b 2"]) -> Bool[Array, "b priors"]:
        """Priors that take part in training: the valid ones, or all where padding is background."""
        valid = self.valid(sizes)
        return valid | self.trains_padding


def flatten(
    levels: Sequence[Float[Array, "b _ _ _"]], per_cell: Sequence[int]
) -> Float[Array, "b priors c"]:
    """Maps with the channels of a cell's priors one after another, as one row per prior."""
    rows = [
        x.reshape(x.shape[0], x.shape[1] * x.shape[2] * n, x.shape[3] // n)
        for x, n in zip(levels, per_cell, strict=True)
    ]
    return jnp.concatenate(rows, axis=1)


class _Generator:
    """Called with (height, width) in cells of each level, gives the `Priors` of a canvas."""

    strides: tuple[int, ...]
    sized = True  # anchors, not points

    @property
    def per_cell(self) -> tuple[int, ...]:
        """Priors per cell of each level."""
        return (1,) * len(self.strides)


def _grid(
    level_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    shapes: Sequence[Float[np.ndarray, "n 2"]],
    center_offset: float,
    trains_padding: bool = False,
) -> Priors:
    """Priors of these (width, height) in pixels, level by level, around every cell's centre."""
    if len(level_sizes) != len(strides):
        raise InputError(f"{len(level_sizes)} levels of features, but strides {tuple(strides)}")
    boxes, centers, cells = [], [], []
    for (height, width), stride, shape in zip(level_sizes, strides, shapes, strict=True):
        y, x = np.mgrid[:height, :width].reshape(2, -1)
        cell = np.repeat(np.stack([x, y], -1), len(shape), axis=0)
        center = ((cell + center_offset) * stride).astype(np.float32)
        half = np.tile(0.5 * np.asarray(shape, np.float32), (height * width, 1))
        cells.append(cell)
        centers.append(center)
        boxes.append(np.concatenate([center - half, center + half], -1))
    per_cell = tuple(len(shape) for shape in shapes)
    count = [len(cell) for cell in cells]
    return Priors(
        boxes=np.concatenate(boxes),
        centers=np.concatenate(centers),
        strides=np.repeat(np.asarray(strides, np.float32), count),
        cells=np.concatenate(cells),
        grids=tuple((int(height), int(width)) for height, width in level_sizes),
        per_cell=per_cell,
        trains_padding=trains_padding,
    )


@dataclasses.dataclass(frozen=True)
class SquareAnchors(_Generator):
    """One square anchor per cell, as in ATSS (Zhang et al., arXiv 1912.02424) and GFL.

    Attributes:
        scale: side in strides of the level.
        center_offset: position of a cell's centre in strides; 0 puts it on the cell's top-left
            corner as the reference does, 0.5 in its middle. Weights trained with one lose AP with
            another.
        strides: of each level, in pixels.
    """

    scale: float = 8.0
    center_offset: float = 0.0
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)

    def __call__(self, level_sizes: Sequence[tuple[int, int]]) -> Priors:
        shapes = [np.full((1, 2), self.scale * stride) for stride in self.strides]
        return _grid(level_sizes, self.strides, shapes, self.center_offset)


@dataclasses.dataclass(frozen=True)
class RetinaAnchors(_Generator):
    """Anchors of RetinaNet (Lin et al., arXiv 1708.02002, section 4).

    Each cell has one for every ratio and octave scale, the scales fastest: area
    (octave_base * 2^(k / scales_per_octave) * stride)^2 for k = 0, 1, ...

    Attributes:
        octave_base: side of the smallest square, in strides of the level.
        scales_per_octave: anchors of each ratio.
        ratios: height / width.
        center_offset: position of a cell's centre in strides, as in `SquareAnchors`.
        strides: of each level, in pixels.
    """

    octave_base: float = 4.0
    scales_per_octave: int = 3
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    center_offset: float = 0.0
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)

    @property
    def per_cell(self) -> tuple[int, ...]:
        return (len(self.ratios) * self.scales_per_octave,) * len(self.strides)

    def __call__(self, level_sizes: Sequence[tuple[int, int]]) -> Priors:
        octaves = 2.0 ** (np.arange(self.scales_per_octave) / self.scales_per_octave)
        scales = (self.octave_base * octaves).astype(np.float32)
        root = np.sqrt(np.asarray(self.ratios, np.float32))[:, None]
        shapes = [
            np.stack([stride * (1 / root) * scales, stride * root * scales], -1).reshape(-1, 2)
            for stride in self.strides
        ]
        return _grid(level_sizes, self.strides, shapes, self.center_offset)


@dataclasses.dataclass(frozen=True)
class SSDBoxes(_Generator):
    """Default boxes of SSD (Liu et al., arXiv 1512.02325, section 2.2), in the middle of each cell.

    A cell of level k has, in this order, a square of side s_k, one of side sqrt(s_k s_k+1), and for
    each r of ratios[k] boxes of area s_k^2 and height / width 1/r and r. The sides grow in equal
    steps, rounded down to whole percents and pixels as in the authors' code.

    Attributes:
        input_size: side of the canvas in pixels.
        first: s_0 as a share of the input size.
        smallest: s_1 as a share of the input size.
        largest: side of the last level as a share of the input size.
        ratios: of each level, see above.
        strides: of each level, in pixels.
    """

    input_size: int = 512
    first: float = 0.04
    smallest: float = 0.1
    largest: float = 0.9
    ratios: tuple[tuple[int, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,))
    strides: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)

    def __post_init__(self):
        if len(self.ratios) != len(self.strides) or len(self.strides) < 3:
            raise InputError(
                f"priors.ratios has {len(self.ratios)} levels, priors.strides {len(self.strides)}; "
                "SSD needs as many of both, at least 3"
            )

    @property
    def per_cell(self) -> tuple[int, ...]:
        return tuple(2 + 2 * len(ratios) for ratios in self.ratios)

    @property
    def sides(self) -> tuple[int, ...]:
        """s_0, s_1, ... in pixels: one more than there are levels."""
        low, high = round(100 * self.smallest), round(100 * self.largest)
        step = (high - low) // (len(self.strides) - 2)
        percents = [100 * self.first, *(low + k * step for k in range(len(self.strides)))]
        return tuple(int(self.input_size * percent / 100) for percent in percents)

    def __call__(self, level_sizes: Sequence[tuple[int, int]]) -> Priors:
        shapes = []
        for side, following, ratios in zip(self.sides, self.sides[1:], self.ratios, strict=False):
            tall = np.array([1 / r if i else r for r in ratios for i in (1, 0)])  # height / width
            between = np.sqrt(side * following)
            squares = np.array([[side, side], [between, between]])
            others = side * np.stack([1 / np.sqrt(tall), np.sqrt(tall)], -1)
            shapes.append(np.concatenate([squares, others]))
        return _grid(level_sizes, self.strides, shapes, 0.5)


@dataclasses.dataclass(frozen=True)
class Points(_Generator):
    """The middle of each cell, as in FCOS (Tian et al., arXiv 1904.01355) and FoveaBox.

    Attributes:
        strides: of each level, in pixels.
        trains_padding: whether cells in the padding of the canvas are background, as in the
            reference, instead of not being trained on.
    """

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    trains_padding: bool = True

    sized = False

    def __call__(self, level_sizes: Sequence[tuple[int, int]]) -> Priors:
        shapes = [np.zeros((1, 2))] * len(self.strides)
        return _grid(level_sizes, self.strides, shapes, 0.5, self.trains_padding)


PriorGenerator = SquareAnchors | RetinaAnchors | SSDBoxes | Points
