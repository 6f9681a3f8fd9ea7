"""`shapes`, the default data set: generated from a seed, so nothing has to be downloaded.

Textured shapes of six classes at many scales over cluttered backgrounds, some partly hidden, some
casting a shadow. Some of their sides are *blurred*: the shape fades out over a ramp and no
annotator could say where it ends, so the label of that side is drawn at random around the middle of
the ramp, and the standard deviation of that draw, the side's *ambiguity*, is stored with the label.
The uncertainty that a detector predicts for a side can thus be compared with the truth.

The data set is an ordinary COCO folder::

    root/spec.json                            the `Shapes` it was made from
    root/train/000000.jpg ...                 root/val/000000.jpg ...
    root/annotations/instances_train.json     root/annotations/instances_val.json

with three more fields per annotation: `ambiguity` [left, top, right, bottom], in pixels;
`nominal_bbox`, the box before its blurred sides were drawn; and `visible`.
"""

import dataclasses
import functools
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from gfl_jax.data.cache import open_in_cache
from gfl_jax.data.folders import local_folder, locked, new_folder
from gfl_jax.data.prepare import RawSplit
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.shapes.render import CLASSES, MIN_SIDE, Shape, render_scene
from gfl_jax.errors import InputError, WriteError

SPLITS = ("train", "val")
VERSION = 1  # increase it whenever the same spec would give other images or labels


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A procedural data set, generated on first use. Equal values make equal data sets.

    Attributes:
        num_train: number of training images.
        num_val: number of validation images.
        image_size: (height, width) of every image, in pixels.
        seed: any non-negative integer. Image `i` of a split depends only on the seed, the split,
            `i`, the image size and `blurred`, so a larger data set begins with the smaller one.
        blurred: probability of trying to blur one or two sides of a shape; about a third of the
            attempts fail.
        root: folder to make it in; empty: in the cache.
        cache_dir: where prepared data is kept.
    """

    num_train: int = 3000
    num_val: int = 200
    image_size: tuple[int, int] = (128, 128)
    seed: int = 0
    blurred: float = 0.4
    root: str = ""
    cache_dir: str = "~/.cache/gfl_jax"

    def __post_init__(self) -> None:
        """Raises InputError for values that no data set can be made from."""
        if not 0 <= self.blurred <= 1:
            raise InputError(f"data.blurred is {self.blurred}; it must be a probability")
        for field in ("num_train", "num_val", "seed"):
            if getattr(self, field) < 0:
                raise InputError(f"data.{field} is {getattr(self, field)}; it must be at least 0")
        if len(self.image_size) != 2 or min(self.image_size) < 2 * MIN_SIDE:
            raise InputError(
                f"data.image_size is {self.image_size}; give (height, width), each at least "
                f"{2 * MIN_SIDE:.0f} pixels"
            )

    def open(self, split: str) -> PreparedSplit:
        """Opens 'train' or 'val'; makes and prepares the data set first if needed."""
        cache = local_folder(self.cache_dir, "--data.cache-dir")
        name = f"shapes-{self.num_train}-{self.num_val}-" + "x".join(
            map(str, (*self.image_size, self.seed, self.blurred))
        )
        root = local_folder(self.root, "--data.root") if self.root else cache / name
        root = make_shapes(root, self)
        raw = RawSplit(root / "annotations" / f"instances_{split}.json", root / split)
        return open_in_cache(split, raw, cache, "raise")


def _write_image(folder: Path, spec: Shapes, split: str, index: int) -> list[Shape]:
    """Renders and writes image `index` of a split; returns its shapes."""
    rng = np.random.default_rng((spec.seed, SPLITS.index(split), index))
    image, shapes = render_scene(rng, *spec.image_size, spec.blurred)
    path = folder / split / f"{index:06d}.jpg"
    if not cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise WriteError(f"cannot write {path}")
    return shapes


def _annotations(spec: Shapes, split: str, scenes: list[list[Shape]]) -> dict[str, Any]:
    """The labels of a split in COCO's format; `area` is that of the box."""

    def xywh(box: tuple[float, ...]) -> list[float]:
        x0, y0, x1, y1 = (round(value, 2) for value in box)
        return [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]

    height, width = spec.image_size
    ids = itertools.count(1)
    return {
        "info": {"description": f"gfl_jax shapes, {split}", "spec": _described(spec)},
        "images": [
            {"id": i + 1, "file_name": f"{i:06d}.jpg", "width": width, "height": height}
            for i in range(len(scenes))
        ],
        "annotations": [
            {
                "id": next(ids),
                "image_id": i + 1,
                "category_id": shape.label + 1,
                "bbox": xywh(shape.box),
                "area": round(float(np.prod(xywh(shape.box)[2:])), 2),
                "iscrowd": 0,
                "ambiguity": [round(value, 3) for value in shape.ambiguity],
                "nominal_bbox": xywh(shape.nominal),
                "visible": round(shape.visible, 3),
            }
            for i, scene in enumerate(scenes)
            for shape in scene
        ],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }


def _described(spec: Shapes) -> dict[str, Any]:
    """Returns everything that determines the images and labels, as read back from JSON."""
    fields = {k: v for k, v in dataclasses.asdict(spec).items() if k not in ("root", "cache_dir")}
    return json.loads(json.dumps({"version": VERSION, **fields}))


def _is_made(root: Path, spec: Shapes) -> bool:
    """Whether the folder holds this data set; raises InputError if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        stored = json.loads((root / "spec.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{root} is in the way: not a folder made by make_shapes") from error
    for field, value in _described(spec).items():
        if stored.get(field) != value:
            raise InputError(
                f"{root} holds another data set: its {field} is {stored.get(field)} instead of "
                f"{value}; delete the folder or choose another"
            )
    return True


def make_shapes(root: str | os.PathLike[str], spec: Shapes) -> Path:
    """Makes the data set in a folder, unless it is already there.

    Everything is written to a folder beside `root` and renamed when complete, so `root` is never
    incomplete; leftovers of a killed run are deleted by the next one.

    Args:
        root: The folder; missing parents are created.
        spec: What to make.

    Returns:
        The folder's absolute path.

    Raises:
        InputError: The folder holds something else, or was made from another spec.
    """
    root = Path(root).absolute()
    if _is_made(root, spec):
        return root
    with locked(root):
        if _is_made(root, spec):  # by another process in the meantime
            return root
        with new_folder(root) as partial:
            (partial / "annotations").mkdir()
            for split, count in zip(SPLITS, (spec.num_train, spec.num_val), strict=True):
                (partial / split).mkdir()
                write = functools.partial(_write_image, partial, spec, split)
                pool = ThreadPoolExecutor(os.cpu_count())
                try:
                    made = pool.map(write, range(count))
                    scenes = list(tqdm(made, f"making shapes/{split}", count, unit="image"))
                finally:
                    pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the others
                content = json.dumps(_annotations(spec, split, scenes))
                (partial / "annotations" / f"instances_{split}.json").write_text(content)
            (partial / "spec.json").write_text(json.dumps(_described(spec), indent=4) + "\n")
    return root
