"""Loads planned batches and feeds them through Grain workers."""

import dataclasses
import functools
import gc
from collections.abc import Callable, Generator
from typing import Any

import grain.python as grain
import numpy as np
from absl import flags

from gfl_jax.data import images
from gfl_jax.data.batch import Batch, HostBatch, Sample, pad
from gfl_jax.data.plan import BatchPlan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.data.ssd_augment import ssd_augment
from gfl_jax.data.workers import deaths_explained, start_worker, without_interrupts


@dataclasses.dataclass
class ImageCache:
    """Images and their scales, cached in memory until `limit` bytes are taken.

    They are resized, or the originals if augmentation differs in every epoch. So a small data set
    at one scale is decoded once instead of in every epoch.
    """

    limit: int
    taken: int = 0
    images: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def get(self, key: Any, load: Callable[[], tuple[np.ndarray, Any]]) -> tuple[np.ndarray, Any]:
        """The result of `load` for this key, from memory if cached; not to be modified."""
        if key not in self.images:
            loaded = load()
            if self.taken + loaded[0].nbytes > self.limit:
                return loaded
            self.taken += loaded[0].nbytes
            self.images[key] = loaded
        return self.images[key]


def load_batch(
    step: int,
    *,
    plan: BatchPlan,
    split: PreparedSplit,
    max_boxes: int,
    cache: ImageCache,
    share: tuple[int, int] = (0, 1),
) -> HostBatch:
    """Decodes, augments and pads the images of a step; keeps boxes that are ground truth.

    Args:
        step: of the training, from 0; all randomness follows from the plan's seed, the step and the
            slot.
        plan: which images are in which slot, and what is done to them.
        split: the images.
        max_boxes: number of objects per image after padding.
        cache: of decoded images.
        share: (index, count) of this host among those that load equal parts of the batch.
    """
    slots = plan(step)
    size = len(slots.images) // share[1]
    first = share[0] * size
    samples = []
    indices = slots.images[first : first + size].tolist()
    for slot, (index, record) in enumerate(
        zip(indices, split.source.__getitems__(indices), strict=True)
    ):
        stated = (record["height"], record["width"])

        def decoded(record=record, stated=stated):
            image = images.decode(record["image"], stated, record["filename"])
            if plan.data.augmentation == "ssd":
                return image, (1.0, 1.0)
            if plan.data.keep_ratio:
                return images.resize_keep_ratio(image, plan.data.scale[0], slots.short_side)
            return images.resize(image, slots.canvas)

        image, scale = cache.get((index, slots.short_side), decoded)
        keep = ~(record["crowd"] | record["ignore"])
        boxes, labels = record["boxes"][keep], record["labels"][keep]
        if plan.data.augmentation == "ssd":
            # The plan's own generators have shorter keys, which numpy pads with zeros.
            rng = np.random.default_rng((plan.seed, step, first + slot, 1))
            image, boxes, labels, scale = ssd_augment(image, boxes, labels, slots.canvas, rng)
        else:
            boxes = images.scale_boxes(boxes, scale, image.shape[:2])
        if slots.flip[first + slot]:
            image, boxes = images.flip(image, boxes)
        samples.append(Sample(image, scale, boxes, labels))
    batch = pad(samples, slots.canvas, max_boxes, slots.real[first : first + size])
    return HostBatch(batch, split.image_ids[slots.images], slots.real)


def max_boxes_of(split: PreparedSplit) -> int:
    """The number of objects each image is padded to: the most in any, up to a multiple of 8."""
    return int(-(-max(split.num_boxes.max(), 1) // 8) * 8)


def _own_copy(host: HostBatch) -> HostBatch:
    """Copied out of memory shared with workers, which counts as leaked while jax refers to it."""
    copies: Any = map(np.array, host.batch)
    return HostBatch(Batch(*copies), np.array(host.image_ids), np.array(host.image_mask))


def batches(
    plan: BatchPlan,
    split: PreparedSplit,
    steps: range,
    data: Data,
    share: tuple[int, int] = (0, 1),
) -> Generator[HostBatch, None, None]:
    """The batches of these steps in order, prepared ahead by workers or threads.

    Args:
        plan: what is in each batch.
        split: the images.
        steps: which batches.
        data: workers, buffers and memory.
        share: (index, count) of this host among those that share each batch.

    Raises:
        SetupError: a worker process was killed.
    """
    load = functools.partial(
        load_batch,
        plan=plan,
        split=split,
        max_boxes=max_boxes_of(split),
        cache=ImageCache(data.cache_megabytes * 2**20),
        share=share,
    )
    if not len(steps):
        return
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(load)
    read = grain.ReadOptions(
        num_threads=data.worker_threads, prefetch_buffer_size=data.worker_batches
    )
    iterable = dataset.to_iter_dataset(read)
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags
        options = grain.MultiprocessingOptions(
            num_workers=data.workers, per_worker_buffer_size=data.shared_batches
        )
        iterable = iterable.mp_prefetch(options, worker_init_fn=start_worker)
        iterable = iterable.map(_own_copy)
    iterator = iter(iterable)
    try:
        with deaths_explained():
            with without_interrupts():
                first = next(iterator)  # starts the workers
            yield first
            yield from iterator
    finally:
        iterator.close()
        del iterator
        gc.collect()  # its reference cycles hold memory shared with workers
