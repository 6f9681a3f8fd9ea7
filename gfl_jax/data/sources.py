"""Where images and boxes come from, and how they reach the network."""

import dataclasses
from typing import Annotated, Literal

import tyro

from gfl_jax.data.cache import open_in_cache
from gfl_jax.data.coco_format import OnError
from gfl_jax.data.folders import local_folder
from gfl_jax.data.prepare import RawSplit, report_of
from gfl_jax.data.records import PreparedSplit, open_prepared
from gfl_jax.data.shapes.dataset import Shapes
from gfl_jax.data.suspicions import suspicion
from gfl_jax.data.tfds_source import Tfds
from gfl_jax.errors import InputError, UsageError


@dataclasses.dataclass(frozen=True)
class CocoFolder:
    """Raw images and jsons in COCO's format; checked and prepared at the first start.

    Attributes:
        root: the folder of the data set.
        train_annotations: json of the training images, relative to root.
        train_images: folder of the training images, relative to root.
        val_annotations: json of the images to evaluate on, relative to root.
        val_images: folder of the images to evaluate on, relative to root.
        cache_dir: where the prepared data is kept.
        on_error: 'raise' stops at bad input; 'skip' leaves it out, counts it and lists it.
        white: value of 16-bit images that becomes white, such as 4095; 0: 65535, but images that
            would then be nearly black are an error.
    """

    root: str = ""
    train_annotations: str = "annotations/instances_train2017.json"
    train_images: str = "train2017"
    val_annotations: str = "annotations/instances_val2017.json"
    val_images: str = "val2017"
    cache_dir: str = "~/.cache/gfl_jax"
    on_error: OnError = "raise"
    white: int = 0

    def open(self, split: str) -> PreparedSplit:
        """Opens 'train' or 'val'; checks and prepares it first if needed.

        Raises:
            DataError: the data is faulty; every problem is named.
            UsageError: no data set was named.
        """
        if not self.root:
            raise UsageError(
                "data.root is empty: name the data set's folder with --data.root FOLDER, or a "
                "prepared one with --data.prepared FOLDER"
            )
        cache = local_folder(self.cache_dir, "--data.cache-dir")
        opened = open_in_cache(split, self.raw_splits()[split], cache, self.on_error)
        assert opened.annotations is not None
        folder = opened.annotations.parents[1]
        print(f"{report_of(folder, split)}\n  prepared in {folder}")
        return opened

    def raw_splits(self) -> dict[str, RawSplit]:
        """The files of 'train' and 'val'."""
        root = local_folder(self.root, "--data.root")
        return {
            "train": RawSplit(root / self.train_annotations, root / self.train_images, self.white),
            "val": RawSplit(root / self.val_annotations, root / self.val_images, self.white),
        }


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A folder made by `gfl-jax prepare`; nothing else is opened.

    Attributes:
        prepared: the folder, on a disk or in a bucket (gs://).
    """

    prepared: str

    def open(self, split: str) -> PreparedSplit:
        """Opens 'train' or 'val'."""
        return open_prepared(self.prepared, split)


@dataclasses.dataclass(frozen=True)
class Data:
    """Where images and boxes come from and how they reach the network.

    Attributes:
        source: where they come from. Fields of a source are flags directly under `--data`, such as
            --data.root; --data.prepared FOLDER by itself selects Prepared.
        scale: images are resized keeping their ratio to fit these (long, short) sides, in pixels.
        keep_ratio: keeps the aspect ratio; otherwise every image is stretched to exactly `scale`,
            as (width, height) in pixels, multiples of 32.
        multi_scale: smallest and largest short side in training, in pixels, drawn once per batch;
            None: one scale.
        canvases: (height, width) of the landscape canvases in pixels, multiples of 32; portrait
            ones are these transposed. Empty: the one that holds `scale`.
        flip: probability of a horizontal flip in training.
        augmentation: in training; 'flip' is only that flip, 'ssd' also zooms out, crops and changes
            colours as SSD does.
        repeats: how often each image is seen in a training epoch.
        workers: processes that prepare batches; 0 uses threads of the training process.
        worker_threads: batches that each worker prepares at the same time.
        worker_batches: batches that each worker keeps ready in its own memory.
        shared_batches: batches of each worker that wait in /dev/shm, see docs/scaling.md.
        cache_megabytes: memory for resized images ('ssd': originals), in each worker, in MiB: a
            small data set is decoded only once.
    """

    source: Annotated[CocoFolder | Shapes | Tfds | Prepared, tyro.conf.arg(name="")] = CocoFolder()
    scale: tuple[int, int] = (1333, 800)
    keep_ratio: bool = True
    multi_scale: tuple[int, int] | None = None
    canvases: tuple[tuple[int, int], ...] = ()
    flip: float = 0.5
    augmentation: Literal["flip", "ssd"] = "flip"
    repeats: int = 1
    workers: int = 4
    worker_threads: int = 2
    worker_batches: int = 4
    shared_batches: int = 1
    cache_megabytes: int = 0

    def __post_init__(self):
        if self.scale[0] < self.scale[1] or self.scale[1] < 32:
            raise InputError(f"data.scale is {self.scale}; give (long, short) sides, short >= 32")
        if (
            self.multi_scale
            and not 32 <= self.multi_scale[0] <= self.multi_scale[1] <= self.scale[1]
        ):
            raise InputError(
                f"data.multi_scale is {self.multi_scale}; give (smallest, largest) short sides "
                f"between 32 and {self.scale[1]}, the short side of data.scale"
            )
        for canvas in self.canvases:
            if canvas[0] % 32 or canvas[1] % 32 or canvas[0] > canvas[1]:
                raise InputError(
                    f"data.canvases has {canvas}; give (height, width) with height <= width, both "
                    "multiples of 32"
                )
        if not 0 <= self.flip <= 1:
            raise InputError(f"data.flip is {self.flip}; it must be a probability")
        if not self.keep_ratio:
            if self.scale[0] % 32 or self.scale[1] % 32:
                raise InputError(
                    f"data.scale is {self.scale}; without data.keep_ratio both sides must be "
                    "multiples of 32"
                )
            if self.multi_scale or self.canvases:
                raise InputError(
                    "data.multi_scale and data.canvases need data.keep_ratio: without it every "
                    "image is stretched to data.scale"
                )
        elif self.augmentation == "ssd":
            raise InputError("data.augmentation 'ssd' stretches images: use --data.no-keep-ratio")
        for field in ("repeats", "worker_threads", "worker_batches", "shared_batches"):
            if getattr(self, field) < 1:
                raise InputError(f"data.{field} is {getattr(self, field)}; it must be at least 1")

    def for_evaluation(self) -> "Data":
        """The same images at one scale, without augmentation."""
        return dataclasses.replace(
            self, multi_scale=None, canvases=(), flip=0.0, augmentation="flip", repeats=1
        )


def open_split(data: Data, split: str) -> PreparedSplit:
    """Opens the 'train' or 'val' split of an experiment; makes and prepares it first if needed.

    Raises:
        DataError: the data is faulty; every problem is named.
        UsageError: no data set was named.
    """
    opened = data.source.open(split)
    if said := suspicion(opened.table):
        print(f"warning: {split}: {said}")
    return opened
