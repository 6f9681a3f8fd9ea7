"""Random access to a prepared data set: the images of a split and their annotations.

A prepared folder can be copied anywhere, even to a bucket. It holds, for each of its splits::

    manifest.json                              what it was made from, its classes and its files
    train/images-00000-of-00002.array_record   the image files' bytes, one record each
    train/table.npz                            the rest of what training needs, see `Table`
    train/annotations.json                     the kept annotations, for the evaluation
    train/report.json                          what was left out, and why

Opening it reads the manifest and the table.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from gfl_jax.data.manifest import read_entry, read_small
from gfl_jax.errors import InputError
from gfl_jax.paths import PathLike, as_path

RULES = ("", "flagged `ignore`", "area 0", "under 1 pixel wide or high")
"""Why an object is not ground truth for training, as in the reference; the first: it is."""
FLAGGED, NO_AREA, THIN = 1, 2, 3


class Table(NamedTuple):
    """Everything but the pixels of N images and their M objects, image by image.

    Attributes:
        image_ids: int64 [N], as in the annotations.
        filenames: bytes [N], UTF-8, as in the annotations.
        sizes: int32 [N, 2], (height, width) in pixels.
        starts: int64 [N + 1]; image i has the objects starts[i] to starts[i + 1] - 1.
        boxes: float32 [M, 4], (x1, y1, x2, y2) in pixels; may extend beyond the image.
        labels: int32 [M], 0-based.
        crowd: bool [M], a region of many objects, not ground truth for training.
        rule: uint8 [M], why it is not ground truth for training either, index into `RULES`.
    """

    image_ids: np.ndarray
    filenames: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    rule: np.ndarray


def load_table(content: bytes) -> Table:
    """Reads the content of a table.npz."""
    with np.load(io.BytesIO(content)) as columns:
        return Table(**columns)


class EncodedImages(Protocol):
    """Random access to the bytes of image files."""

    def __getitems__(self, indices: Sequence[int]) -> Sequence[bytes]:
        """Returns those of several images."""


class RecordSource:
    """Random access to images and their annotations.

    It can be pickled; each process opens the files itself at its first read.
    """

    def __init__(self, name: str, open_images: Callable[[], EncodedImages], table: Table):
        """Takes a name, a picklable function that opens the encoded images, and the table."""
        self.name, self._open_images, self._table = name, open_images, table
        self._images: EncodedImages | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns everything but the open files."""
        return {**self.__dict__, "_images": None}

    def __repr__(self) -> str:
        """Returns the same text in every process."""
        return f"RecordSource({self.name!r})"

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._table.image_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns an image and its annotations.

        Returns:
            image: the bytes of the image file.
            image_id, filename: as in the annotations.
            height, width: of the image, in pixels.
            boxes: float32 [n, 4], (x1, y1, x2, y2) in pixels; may extend beyond the image.
            labels: int32 [n], 0-based.
            crowd: bool [n], a region of many objects, not ground truth for training.
            ignore: bool [n], not ground truth for training either.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns several images and their annotations, read together."""
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
        try:
            if self._images is None:
                self._images = self._open_images()
            encoded = self._images.__getitems__(indices)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{self.name} is damaged ({error}): prepare or copy it again (in the cache: delete "
                "the folder, and the next start prepares it)"
            ) from error
        return [self._record(*pair) for pair in zip(indices, encoded, strict=True)]

    def _record(self, index: int, image: bytes) -> dict[str, Any]:
        table = self._table
        height, width = map(int, table.sizes[index])
        objects = slice(table.starts[index], table.starts[index + 1])
        return {
            "image": image,
            "image_id": int(table.image_ids[index]),
            "filename": table.filenames[index].decode("utf-8", "surrogateescape"),
            "height": height,
            "width": width,
            "boxes": table.boxes[objects],
            "labels": table.labels[objects],
            "crowd": table.crowd[objects],
            "ignore": table.rule[objects] > 0,
        }


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """A split that is ready to be read.

    Attributes:
        source: the images and their annotations, by index.
        table: the same without the images.
        category_ids: the id of each class label.
        category_names: the name of each class label.
        annotations: a COCO json of what was kept, for the evaluation; None if there is none.
        content: CRC-32 of all image files and annotations; 0 where nobody has read them all.
    """

    source: RecordSource
    table: Table
    category_ids: list[int]
    category_names: list[str]
    annotations: epath.Path | None
    content: int = 0

    @property
    def sizes(self) -> np.ndarray:
        """(height, width) of the images in pixels, int32 [N, 2]."""
        return self.table.sizes

    @property
    def image_ids(self) -> np.ndarray:
        """The images' ids, int64 [N]."""
        return self.table.image_ids

    @functools.cached_property
    def num_boxes(self) -> np.ndarray:
        """How many objects of each image are trained on: no crowds, none ignored; int64 [N]."""
        images = np.repeat(np.arange(len(self.table.image_ids)), np.diff(self.table.starts))
        trained = ~self.table.crowd & (self.table.rule == 0)
        return np.bincount(images[trained], minlength=len(self.table.image_ids))


class Shard(NamedTuple):
    """Records of one file, in the form that ArrayRecordDataSource takes."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def open_images(shards: Sequence[Shard]) -> EncodedImages:
    """The encoded images in some array_record files, local or on gs://."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(list(shards))


def open_prepared(folder: PathLike, split: str) -> PreparedSplit:
    """Opens a split of a prepared folder, local or on gs://.

    Raises:
        MissingFileError: there is no complete prepared folder.
        InputError: another version prepared it, it lacks the split, or a file is not as it was.
    """
    folder = as_path(folder)
    entry = read_entry(folder, split)
    shards = [Shard(str(folder / name), 0, n, n) for name, n in entry["shards"].items()]
    table = load_table(read_small(folder, entry, f"{split}/table.npz"))
    return PreparedSplit(
        RecordSource(f"{folder}:{split}", functools.partial(open_images, shards), table),
        table,
        entry["category_ids"],
        entry["category_names"],
        folder / split / "annotations.json",
        entry.get("content", 0),
    )
