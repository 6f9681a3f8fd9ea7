"""Where images and boxes come from."""

import dataclasses
from pathlib import Path
from typing import Literal

from gfl_jax.data.coco_format import CocoFolder
from gfl_jax.data.prepare import prepare
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.shapes.dataset import Shapes, make_shapes
from gfl_jax.data.tfds_source import open_tfds


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


def open_split(data: Data, split: str) -> PreparedSplit:
    """Opens the 'train' or 'val' split of an experiment; makes and prepares it first if need be.

    Raises:
        gfl_jax.data.coco_format.DataError: faulty data, every problem named.
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
