"""Which images, at which scale and on which canvas, make up each batch: a function of the seed.

Every host computes the same plan, every image is seen equally often in an epoch, and the position
of a run is one integer, the step.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from gfl_jax.data.images import canvases_of, resized_size, smallest_canvas
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.data.suspicions import nothing_to_train_on
from gfl_jax.errors import InputError

MIN_SIDE = 32
"""Smaller images are not trained on, as in the reference."""


class Slots(NamedTuple):
    """A planned batch.

    Attributes:
        images: int [B], index of the image in each slot.
        real: bool [B], False for a slot that only fills up the batch with an image that is counted
            elsewhere.
        flip: bool [B], which images are mirrored.
        short_side: limit of the shorter side, in pixels.
        canvas: (height, width) in pixels.
    """

    images: np.ndarray
    real: np.ndarray
    flip: np.ndarray
    short_side: int
    canvas: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batches of a run.

    Attributes:
        data: scales, canvases and augmentation.
        sizes: (height, width) of every image in pixels, int [N, 2].
        indices: the images to use.
        batch_size: over all devices and hosts.
        shuffle: False for evaluation: portrait, then landscape images in order. Unless images are
            stretched (`data.keep_ratio` False), a batch has one orientation.
        seed: of all randomness.
    """

    data: Data
    sizes: np.ndarray
    indices: np.ndarray
    batch_size: int
    shuffle: bool = False
    seed: int = 0

    def __post_init__(self):
        if not len(self.indices):
            raise InputError("no image can be used: each has no objects or a side under 32 pixels")

    @functools.cached_property
    def _groups(self) -> list[np.ndarray]:
        """Portrait and landscape images apart: unless stretched, a batch has one orientation."""
        if not self.data.keep_ratio:
            return [self.indices]
        height, width = self.sizes[self.indices].T
        groups = [self.indices[height > width], self.indices[height <= width]]
        return [group for group in groups if len(group)]

    @property
    def steps_per_epoch(self) -> int:
        """Batches with every image `repeats` times; the last one of each group is filled up."""
        return sum(-(-len(group) * self.data.repeats // self.batch_size) for group in self._groups)

    @functools.lru_cache(maxsize=2)  # noqa: B019  (plans live as long as the run)
    def _epoch(self, epoch: int) -> list[Slots]:
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for group in self._groups:
            order = np.concatenate(
                [
                    rng.permutation(group) if self.shuffle else group
                    for _ in range(self.data.repeats)
                ]
            )
            for start in range(0, len(order), self.batch_size):
                slots = order[start : start + self.batch_size]
                filled = np.resize(slots, self.batch_size)  # repeats its own images
                batches.append((filled, np.arange(self.batch_size) < len(slots)))
        if self.shuffle:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        low, high = self.data.multi_scale or (self.data.scale[1], self.data.scale[1])
        return [
            Slots(
                images,
                real,
                flip=rng.random(self.batch_size) < self.data.flip,
                short_side=(short_side := int(rng.integers(low, high, endpoint=True))),
                canvas=self._canvas(images, short_side),
            )
            for images, real in batches
        ]

    def _canvas(self, images: np.ndarray, short_side: int) -> tuple[int, int]:
        """The smallest canvas that holds all of these images; the one of `scale` if stretched."""
        if not self.data.keep_ratio:
            return self.data.scale[1], self.data.scale[0]
        canvases = canvases_of(self.data.scale, self.data.canvases)
        heights, widths = self.sizes[images].T
        heights, widths = resized_size(heights, widths, self.data.scale[0], short_side)
        needed = (int(heights.max()), int(widths.max()))
        if canvas := smallest_canvas(canvases, needed):
            return canvas
        raise InputError(
            f"no canvas of {canvases} holds an image of {needed[0]} x {needed[1]} (height x "
            f"width), made by data.scale {self.data.scale}: extend data.canvases or lower the scale"
        )

    def __call__(self, step: int) -> Slots:
        """The batch of a step, counted from 0 over the whole run."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[position]


def train_plan(data: Data, split: PreparedSplit, batch_size: int, seed: int) -> BatchPlan:
    """Batches of the images with objects and no side under 32 pixels, reshuffled every epoch."""
    usable = (split.num_boxes > 0) & (split.sizes.min(1) >= MIN_SIDE)
    if not usable.any():
        raise InputError(nothing_to_train_on(split.table, MIN_SIDE))
    indices = np.flatnonzero(usable)
    return BatchPlan(data, split.sizes, indices, batch_size, shuffle=True, seed=seed)


def eval_plan(data: Data, split: PreparedSplit, batch_size: int, limit: int = 0) -> BatchPlan:
    """Batches of all images, or of the first `limit` unless that is 0; not augmented."""
    indices = np.arange(len(split.sizes))[: limit or None]
    return BatchPlan(data.for_evaluation(), split.sizes, indices, batch_size)
