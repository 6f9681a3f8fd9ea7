"""A prepared dataset, read at random: the images of a split and their annotations."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class RecordSource:
    """Random access to the images of a prepared dataset and their boxes.

    It can be pickled; every process opens the files for itself when it first reads.
    """

    def __init__(self, directory: Path, split: str, sizes: np.ndarray):
        """Takes the dataset's folder, its split and int32 [N, 2] (height, width) of the images."""
        self.directory, self._split, self._sizes = directory, split, sizes
        self._records: Sequence[Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but the open files."""
        return {**self.__dict__, "_records": None}

    def __repr__(self) -> str:
        """Returns the same text in every process."""
        return f"RecordSource({str(self.directory)!r}, {self._split!r})"

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns an image and its annotations.

        Returns:
            image: the bytes of the image file.
            image_id, filename: as in the json.
            height, width: of the image, in pixels.
            boxes: float32 [n, 4], (x1, y1, x2, y2) in pixels; may stick out of the image.
            labels: int32 [n], 0-based.
            crowd: bool [n], a region of many objects, no ground truth for training.
            ignore: bool [n], no ground truth for training either.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        if self._records is None:
            self._records = open_records(self.directory, self._split)[1]
        example = self._records[index]
        height, width = map(int, self._sizes[index])
        return {
            "image": example["image"],
            "image_id": int(example["image/id"]),
            "filename": example["image/filename"].decode(),
            "height": height,
            "width": width,
            **boxes_of(example["objects"], height, width),
        }


def open_records(directory: Path, split: str) -> tuple[tfds.core.DatasetInfo, Sequence[Any]]:
    """Opens a dataset prepared by tfds; its images are left encoded."""
    builder = tfds.builder_from_directory(directory)
    decoders = {"image": tfds.decode.SkipDecoding()}
    return builder.info, builder.as_data_source(split, decoders=decoders)


def boxes_of(objects: dict[str, np.ndarray], height: int, width: int) -> dict[str, np.ndarray]:
    """Returns boxes, labels, crowd and ignore of `RecordSource` from the stored features."""
    yxyx = np.reshape(objects["bbox"], (-1, 4)) * np.array([height, width] * 2, np.float64)
    # COCO's boxes have two decimals; float32 moves a width of 1 by less than 1e-3.
    small = (yxyx[:, 2:] - yxyx[:, :2] < 1 - 1e-3).any(axis=1)
    return {
        "boxes": yxyx[:, [1, 0, 3, 2]].astype(np.float32),
        "labels": np.array(objects["label"], np.int32),
        "crowd": np.array(objects["is_crowd"], bool),
        # tfds's own datasets lack `ignore`, and their whole-number areas cannot tell 0 from 0.9.
        "ignore": np.array(objects.get("ignore", small), bool),
    }


@dataclasses.dataclass(frozen=True)
class PreparedSplit:
    """A dataset that is ready to be read; entry i of each array belongs to image i of `source`.

    Attributes:
        source: the images and their annotations.
        sizes: int32 [N, 2], (height, width) in pixels.
        num_boxes: int32 [N], boxes that are ground truth for training: no crowd, not ignored.
        image_ids: int64 [N].
        category_ids: the id of each class label.
        category_names: the name of each class label.
        annotations: the original json, for the evaluation, if there is one.
    """

    source: RecordSource
    sizes: np.ndarray
    num_boxes: np.ndarray
    image_ids: np.ndarray
    category_ids: list[int]
    category_names: list[str]
    annotations: Path | None


def save_table(file: Path, **columns: list[Any]) -> None:
    """Saves the arrays of a `PreparedSplit`; the file is there in full or not at all."""
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.npz")
    types = {"sizes": np.int32, "num_boxes": np.int32, "category_names": np.str_}
    arrays: dict[str, Any] = {
        name: np.array(column, types.get(name, np.int64)) for name, column in columns.items()
    }
    np.savez(temporary, **arrays)
    temporary.replace(file)


def load_split(directory: Path, split: str, table: Path, annotations: Path | None) -> PreparedSplit:
    """Opens a prepared dataset by its table of sizes."""
    with np.load(table) as columns:
        arrays = dict(columns)
    arrays["category_ids"] = arrays["category_ids"].tolist()
    arrays["category_names"] = arrays["category_names"].tolist()
    source = RecordSource(directory, split, arrays["sizes"])
    return PreparedSplit(source=source, annotations=annotations, **arrays)
