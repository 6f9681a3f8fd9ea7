"""Opens the data of an experiment and feeds planned batches through Grain workers."""

import dataclasses
import functools
import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain.python as grain
import numpy as np
from absl import flags

from gfl_jax.data import images
from gfl_jax.data.batch import Batch
from gfl_jax.data.coco import PreparedSplit, open_tfds, prepare
from gfl_jax.data.coco_format import CocoFolder
from gfl_jax.data.plan import BatchPlan, canvases_of
from gfl_jax.data.shapes.shapes import Shapes, make_shapes
from gfl_jax.data.ssd_augment import ssd_augment

MIN_SIDE = 32
"""Smaller images are not trained on, as in the reference."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images and boxes come from and how they reach the network.

    source: 'shapes' (made on the spot), 'coco' (a COCO-format folder) or the name of a tfds dataset
        prepared as array_record, such as 'coco/2017'.
    root: folder of the data set ('coco'), of tfds's data ('coco/2017'), or empty for 'shapes'.
    train_annotations, train_images, val_annotations, val_images: json files and image folders,
        relative to root.  For a tfds dataset val_annotations may name the original json.
    shapes: contents of the 'shapes' data set.
    cache_dir: where prepared data is kept.
    on_error: 'raise' stops at bad input; 'skip' leaves it out, counts it and lists it.
    scale: images are resized keeping their ratio to fit these (long, short) sides, in pixels.
    keep_ratio: False stretches every image to exactly `scale`, as (width, height), multiples of 32.
    multi_scale: smallest and largest short side in training, drawn once a batch; None: one scale.
    canvases: (height, width) of the landscape canvases, small to large, multiples of 32; portrait
        ones are their mirrors. Empty: the one that holds `scale`.
    flip: probability of a horizontal flip in training.
    augmentation: in training; 'flip' is that flip alone, 'ssd' also zooms out, crops and changes
        colours as SSD does.
    repeats: times every image is seen in an epoch of training.
    workers: processes that prepare batches; 0 uses threads of the training process.
    cache_megabytes: memory for resized images ('ssd': originals), in each worker: a small data set
        is decoded once.
    """

    source: str = "coco"
    root: str = ""
    train_annotations: str = "annotations/instances_train2017.json"
    train_images: str = "train2017"
    val_annotations: str = "annotations/instances_val2017.json"
    val_images: str = "val2017"
    shapes: Shapes = Shapes()
    cache_dir: str = "~/.cache/gfl_jax"
    on_error: Literal["raise", "skip"] = "raise"
    scale: tuple[int, int] = (1333, 800)
    keep_ratio: bool = True
    multi_scale: tuple[int, int] | None = None
    canvases: tuple[tuple[int, int], ...] = ()
    flip: float = 0.5
    augmentation: Literal["flip", "ssd"] = "flip"
    repeats: int = 1
    workers: int = 4
    cache_megabytes: int = 0

    def __post_init__(self):
        if self.scale[0] < self.scale[1] or self.scale[1] < 32:
            raise ValueError(f"data.scale is {self.scale}; give (long, short) sides, short >= 32")
        if (
            self.multi_scale
            and not 32 <= self.multi_scale[0] <= self.multi_scale[1] <= self.scale[1]
        ):
            raise ValueError(
                f"data.multi_scale is {self.multi_scale}; give (smallest, largest) short sides "
                f"between 32 and {self.scale[1]}, the short side of data.scale"
            )
        for canvas in self.canvases:
            if canvas[0] % 32 or canvas[1] % 32 or canvas[0] > canvas[1]:
                raise ValueError(
                    f"data.canvases has {canvas}; give (height, width) with height <= width, both "
                    "multiples of 32"
                )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is {self.flip}; it is a probability")
        if not self.keep_ratio:
            if self.scale[0] % 32 or self.scale[1] % 32:
                raise ValueError(
                    f"data.scale is {self.scale}; without data.keep_ratio both sides must be "
                    "multiples of 32"
                )
            if self.multi_scale or self.canvases:
                raise ValueError(
                    "data.multi_scale and data.canvases need data.keep_ratio: without it every "
                    "image is stretched to data.scale"
                )
        elif self.augmentation == "ssd":
            raise ValueError("data.augmentation 'ssd' stretches images: set data.keep_ratio False")
        if self.repeats < 1:
            raise ValueError(f"data.repeats is {self.repeats}; it must be at least 1")


class HostBatch(NamedTuple):
    """A batch in the memory of the hosts that share it.

    batch: this host's part.  image_ids, image_mask: of the whole batch; which slots are real.
    """

    batch: Batch
    image_ids: np.ndarray
    image_mask: np.ndarray


def open_split(data: Data, split: str) -> PreparedSplit:
    """Opens the 'train' or 'val' split of an experiment; makes and prepares it first if need be.

    Raises:
        gfl_jax.data.coco.DataError: faulty data, every problem named.
        ValueError: a data set that was not named.
    """
    cache = Path(data.cache_dir).expanduser()
    if data.source == "shapes":
        name = f"shapes-{data.shapes.num_train}-{data.shapes.num_val}-" + "x".join(
            map(str, (*data.shapes.image_size, data.shapes.seed, data.shapes.blurred))
        )
        root = make_shapes(Path(data.root).expanduser() if data.root else cache / name, data.shapes)
        folder = CocoFolder(root / "annotations" / f"instances_{split}.json", root / split)
        return prepare(folder, cache, data.on_error)
    if not data.root:
        raise ValueError("data.root is empty: name the data set's folder with --data.root FOLDER")
    root = Path(data.root).expanduser()
    if data.source == "coco":
        json_file, image_folder = {
            "train": (data.train_annotations, data.train_images),
            "val": (data.val_annotations, data.val_images),
        }[split]
        return prepare(CocoFolder(root / json_file, root / image_folder), cache, data.on_error)
    original = root / data.val_annotations
    judged = split == "val" and original.is_file()
    name = {"train": "train", "val": "validation"}[split]
    return open_tfds(data.source, name, root, cache, original if judged else None)


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


@dataclasses.dataclass
class ImageCache:
    """Images and their scales kept in memory, until `limit` bytes are taken.

    They are resized ones, or originals where every epoch makes something else of them. Small data
    sets at one scale are so decoded once instead of in every epoch.
    """

    limit: int
    taken: int = 0
    images: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def get(self, key: Any, load: Callable[[], tuple[np.ndarray, Any]]) -> tuple[np.ndarray, Any]:
        """What `load` returns for this key, from memory if it is there; not to be written to."""
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
    """Decodes, augments and pads images of a step; keeps boxes that are ground truth.

    What is random follows from the plan's seed, the step and the slot alone. Of `share` (index,
    count) hosts, each loads as many slots, in order.
    """
    slots = plan(step)
    size = len(slots.images) // share[1]
    first = share[0] * size
    arrays: dict[str, Any] = dict(
        images=np.zeros((size, *slots.canvas, 3), np.uint8),
        sizes=np.zeros((size, 2), np.int32),
        scales=np.ones((size, 2), np.float32),
        boxes=np.zeros((size, max_boxes, 4), np.float32),
        labels=np.zeros((size, max_boxes), np.int32),
        box_mask=np.zeros((size, max_boxes), bool),
        image_mask=slots.real[first : first + size],
    )
    for slot, index in enumerate(slots.images[first : first + size]):
        record = split.source[int(index)]
        stated = (record["height"], record["width"])

        def decoded(record=record, stated=stated):
            image = images.decode(record["image"], stated, record["filename"])
            if plan.augmentation == "ssd":
                return image, (1.0, 1.0)
            if plan.keep_ratio:
                return images.resize_keep_ratio(image, plan.scale[0], slots.short_side)
            return images.resize(image, slots.canvas)

        image, scale = cache.get((int(index), slots.short_side), decoded)
        keep = ~(record["crowd"] | record["ignore"])
        boxes, labels = record["boxes"][keep], record["labels"][keep]
        if plan.augmentation == "ssd":
            # The plan's own generators have shorter keys, which numpy extends by zeros.
            rng = np.random.default_rng((plan.seed, step, first + slot, 1))
            image, boxes, labels, scale = ssd_augment(image, boxes, labels, slots.canvas, rng)
        else:
            boxes = images.scale_boxes(boxes, scale, image.shape[:2])
        if slots.flip[first + slot]:
            image, boxes = images.flip(image, boxes)
        height, width = image.shape[:2]
        arrays["images"][slot, :height, :width] = image
        arrays["sizes"][slot] = height, width
        arrays["scales"][slot] = scale
        if slots.real[first + slot]:
            arrays["boxes"][slot, : len(boxes)] = boxes
            arrays["labels"][slot, : len(boxes)] = labels
            arrays["box_mask"][slot, : len(boxes)] = True
    return HostBatch(Batch(**arrays), split.image_ids[slots.images], slots.real)


def max_boxes_of(split: PreparedSplit) -> int:
    """The number of objects every image is padded to: that of the fullest one, up to eight more."""
    return int(-(-max(split.num_boxes.max(), 1) // 8) * 8)


def _own_copy(host: HostBatch) -> HostBatch:
    """Out of memory shared with workers, which counts as leaked if jax still looks into it."""
    copies: Any = map(np.array, host.batch)
    return HostBatch(Batch(*copies), np.array(host.image_ids), np.array(host.image_mask))


def _outlive_preemption(_worker: int, _count: int) -> None:
    """A SIGTERM may come to the whole process group; the main process still takes a step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(
    plan: BatchPlan,
    split: PreparedSplit,
    steps: range,
    data: Data,
    share: tuple[int, int] = (0, 1),
) -> Iterator[HostBatch]:
    """The batches of these steps in order, prepared ahead by workers or threads.

    Args:
        plan: what is in them.
        split: the images.
        steps: which batches.
        data: workers and memory.
        share: (index, count) of this host among those that share each batch.
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
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterable = dataset.to_iter_dataset(read)
    if data.workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags
        options = grain.MultiprocessingOptions(num_workers=data.workers)
        iterable = iterable.mp_prefetch(options, worker_init_fn=_outlive_preemption)
        iterable = iterable.map(_own_copy)
    iterator = iter(iterable)
    try:
        yield from iterator
    finally:
        iterator.close()
        del iterator
        gc.collect()  # its cycles hold memory shared with workers
