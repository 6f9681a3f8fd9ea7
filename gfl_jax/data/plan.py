"""Which images, at which scale and on which canvas, make up each batch: a function of the seed.

Every host computes the same plan, every image is seen equally often in an epoch, and one integer,
the step, says where a run is.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import numpy as np

from gfl_jax.data.images import resized_size
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data

MIN_SIDE = 32
"""Smaller images are not trained on, as in the reference."""


class Slots(NamedTuple):
    """A batch as the plan sees it.

    images: index of the image in each slot.  real: False where a slot only fills the batch with an
    image that is counted elsewhere.  flip: which images are mirrored.  short_side: limit of the
    shorter side.  canvas: height and width.
    """

    images: np.ndarray
    real: np.ndarray
    flip: np.ndarray
    short_side: int
    canvas: tuple[int, int]


def canvases_of(
    scale: tuple[int, int], landscape: tuple[tuple[int, int], ...] = ()
) -> tuple[tuple[int, int], ...]:
    """Landscape canvases and their mirrors, by area; if none is given the one for `scale`."""
    long_side, short_side = (-(-side // 32) * 32 for side in scale)
    landscape = landscape or ((short_side, long_side),)
    both = {*landscape, *((width, height) for height, width in landscape)}
    return tuple(sorted(both, key=lambda canvas: (canvas[0] * canvas[1], canvas)))


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The batches of a run.

    sizes: (height, width) of every image, int [N, 2].  indices: the images that take part.
    batch_size: over all devices and hosts.  scale: limits of the (long, short) sides.
    canvases: see `canvases_of`.  multi_scale: range of the short side, drawn once a batch.
    flip: its probability.  shuffle: False for evaluation: portrait, then landscape images in order.
    keep_ratio: False stretches every image to the canvas (short, long) of `scale`, so that images
    of both orientations share batches.  augmentation: of the images, by `load_batch`.
    repeats: times every image is seen an epoch.
    """

    sizes: np.ndarray
    indices: np.ndarray
    batch_size: int
    scale: tuple[int, int]
    canvases: tuple[tuple[int, int], ...]
    multi_scale: tuple[int, int] | None = None
    flip: float = 0.0
    shuffle: bool = False
    seed: int = 0
    keep_ratio: bool = True
    augmentation: Literal["flip", "ssd"] = "flip"
    repeats: int = 1

    def __post_init__(self):
        if not len(self.indices):
            raise ValueError("no image takes part: every one is empty or smaller than 32 pixels")

    @functools.cached_property
    def _groups(self) -> list[np.ndarray]:
        """Portrait and landscape images, apart: unless stretched, a batch has one orientation."""
        if not self.keep_ratio:
            return [self.indices]
        height, width = self.sizes[self.indices].T
        groups = [self.indices[height > width], self.indices[height <= width]]
        return [group for group in groups if len(group)]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every image `repeats` times; the last of each group is filled up."""
        return sum(-(-len(group) * self.repeats // self.batch_size) for group in self._groups)

    @functools.lru_cache(maxsize=2)  # noqa: B019  (plans live as long as the run)
    def _epoch(self, epoch: int) -> list[Slots]:
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for group in self._groups:
            order = np.concatenate(
                [rng.permutation(group) if self.shuffle else group for _ in range(self.repeats)]
            )
            for start in range(0, len(order), self.batch_size):
                slots = order[start : start + self.batch_size]
                filled = np.resize(slots, self.batch_size)  # repeats its own images
                batches.append((filled, np.arange(self.batch_size) < len(slots)))
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        low, high = self.multi_scale or (self.scale[1], self.scale[1])
        return [
            Slots(
                images,
                real,
                flip=rng.random(self.batch_size) < self.flip,
                short_side=(short_side := int(rng.integers(low, high, endpoint=True))),
                canvas=self._canvas(images, short_side),
            )
            for images, real in batches
        ]

    def _canvas(self, images: np.ndarray, short_side: int) -> tuple[int, int]:
        """The smallest canvas that holds all of these images; the one of `scale` if stretched."""
        if not self.keep_ratio:
            return self.scale[1], self.scale[0]
        heights, widths = self.sizes[images].T
        heights, widths = resized_size(heights, widths, self.scale[0], short_side)
        needed = (int(heights.max()), int(widths.max()))
        for canvas in self.canvases:
            if needed[0] <= canvas[0] and needed[1] <= canvas[1]:
                return canvas
        raise ValueError(
            f"data.canvases {self.canvases} hold no image of {needed[0]} x {needed[1]} (height x "
            f"width), which data.scale {self.scale} makes: add a canvas or lower the scale"
        )

    def __call__(self, step: int) -> Slots:
        """The batch of a step, counted from 0 over the whole run."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[position]

    def __hash__(self):
        return id(self)


def train_plan(data: Data, split: PreparedSplit, batch_size: int, seed: int) -> BatchPlan:
    """Batches of the images that have objects, shuffled anew every epoch."""
    usable = (split.num_boxes > 0) & (split.sizes.min(1) >= MIN_SIDE)
    return BatchPlan(
        sizes=split.sizes,
        indices=np.flatnonzero(usable),
        batch_size=batch_size,
        scale=data.scale,
        canvases=canvases_of(data.scale, data.canvases),
        multi_scale=data.multi_scale,
        flip=data.flip,
        shuffle=True,
        seed=seed,
        keep_ratio=data.keep_ratio,
        augmentation=data.augmentation,
        repeats=data.repeats,
    )


def eval_plan(data: Data, split: PreparedSplit, batch_size: int, limit: int = 0) -> BatchPlan:
    """Batches of all images, or of the first `limit` ones if that is not 0."""
    return BatchPlan(
        sizes=split.sizes,
        indices=np.arange(len(split.sizes))[: limit or None],
        batch_size=batch_size,
        scale=data.scale,
        canvases=canvases_of(data.scale),
        keep_ratio=data.keep_ratio,
    )
