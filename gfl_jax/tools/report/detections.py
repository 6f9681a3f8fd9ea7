"""What a detector says about the images of a split, judged by their annotations."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gfl_jax.coco_eval import ground_truth
from gfl_jax.data import images
from gfl_jax.data.classes import class_error
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import open_split
from gfl_jax.errors import InputError, MissingFileError, naming
from gfl_jax.paths import as_path
from gfl_jax.results import Result, Unreadable
from gfl_jax.run import Run
from gfl_jax.tools.report.costs import Detected
from gfl_jax.tools.report.errors import IGNORED, Objects, judge
from gfl_jax.tools.report.gallery import entry_of


class Seen(NamedTuple):
    """What a detector says about all images.

    Attributes:
        results: COCO results.
        detected: the detections on each image, judged.
        entries: what the page says about each image.
    """

    results: list[dict[str, Any]]
    detected: list[Detected]
    entries: list[dict[str, Any]]

    def counted(self) -> list[dict[str, Any]]:
        """The results without those on crowds."""
        kinds = np.concatenate([image.judged.kind for image in self.detected])
        pairs = zip(self.results, kinds.tolist(), strict=True)
        return [result for result, kind in pairs if kind != IGNORED]


def see(
    found: Iterator[Result],
    image_ids: list[int],
    objects: dict[int, Objects],
    score_threshold: float,
    keep: Callable[[np.ndarray], None] = lambda image: None,
) -> Seen:
    """Judges the detections on all images.

    Args:
        found: the detections on each image.
        image_ids: of the images.
        objects: by image id.
        score_threshold: least score of the detections in the pictures.
        keep: called with the pixels of each image.
    """
    seen = Seen([], [], [])
    progress = tqdm(found, total=len(image_ids), unit=" images", desc="report")
    for image_id, result in zip(image_ids, progress, strict=True):
        own = objects[image_id]
        judged = judge(own, result.boxes, result.labels)
        seen.results.extend(result.to_coco(image_id))
        seen.detected.append(Detected(judged, result.scores, result.labels, own.labels, own.crowd))
        seen.entries.append(entry_of(result, own, judged, score_threshold))
        keep(result.image)
    return seen


def open_images(run: Run) -> PreparedSplit:
    """The validation images of a run.

    Raises:
        InputError: their classes are not those of the run.
    """
    split = open_split(run.experiment.data, "val")
    if split.category_names != run.category_names:
        ours = list(zip(run.category_ids, run.category_names, strict=True))
        theirs = list(zip(split.category_ids, split.category_names, strict=True))
        raise class_error("the detector", ours, "the data", theirs)
    return split


def names_of(split: PreparedSplit, indices: range) -> list[str]:
    """The images' file names."""
    return [split.table.filenames[index].decode("utf-8", "replace") for index in indices]


def predicted(run: Run, split: PreparedSplit, indices: range) -> Iterator[Result]:
    """The detections on images of a split, with the distributions of their sides.

    Their category ids are those of the split: the detector may have been trained on others.
    """
    pictures = (pixels(split, index) for index in indices)
    for result in run.predictor.stream(pictures, distributions=True):
        if isinstance(result, Unreadable):
            raise result.error
        ids = [split.category_ids[label] for label in result.labels]
        yield dataclasses.replace(result, category_ids=ids)


def stored(file: str, split: PreparedSplit, indices: range) -> Iterator[Result]:
    """The detections in a file of COCO results.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is not COCO results of this split.
    """
    path = as_path(file)
    if not path.exists():
        raise MissingFileError(f"{file}: there is no such file")
    rows = collections.defaultdict(list)
    labels = {category: label for label, category in enumerate(split.category_ids)}
    with naming(file):
        try:
            for row in json.loads(path.read_text()):
                x, y, width, height = map(float, row["bbox"])
                label, score = labels[row["category_id"]], float(row["score"])
                if not (0 <= score <= 1 and math.isfinite(x + y + width + height)):
                    raise ValueError(f"bbox {row['bbox']}, score {score}")
                rows[row["image_id"]].append([x, y, x + width, y + height, label, score])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                "not COCO results of these classes: a list of image_id, category_id, bbox and a "
                f"score from 0 to 1 ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        if foreign := set(rows) - set(split.image_ids.tolist()):
            raise InputError(
                f"{len(foreign)} of its images are not in the data, such as {min(foreign, key=str)}"
            )
    return (_of_rows(split, index, rows) for index in indices)


def _of_rows(split: PreparedSplit, index: int, rows: dict[Any, list]) -> Result:
    own = np.array(rows.get(int(split.image_ids[index]), ())).reshape(-1, 6)
    own = own[np.argsort(-own[:, 5], kind="stable")]
    labels = own[:, 4].astype(int)
    return Result(
        "",
        pixels(split, index),
        own[:, :4],
        own[:, 5],
        labels,
        [split.category_names[label] for label in labels],
        [split.category_ids[label] for label in labels],
    )


def pixels(split: PreparedSplit, index: int) -> np.ndarray:
    """An image of a split; uint8 RGB [height, width, 3]."""
    record = split.source[index]
    return images.decode(record["image"], (record["height"], record["width"]), record["filename"])


def annotations_of(
    split: PreparedSplit, image_ids: list[int]
) -> tuple[dict[str, Any], dict[int, Objects]]:
    """The annotations of some images, as in COCO's format and as objects by image id."""
    wanted = set(image_ids)
    dataset = ground_truth(split).dataset
    entries = [entry for entry in dataset["annotations"] if entry["image_id"] in wanted]
    truth = {
        "images": [entry for entry in dataset["images"] if entry["id"] in wanted],
        "annotations": entries,
        "categories": dataset["categories"],
    }
    labels = {category: label for label, category in enumerate(split.category_ids)}
    rows: dict[int, list[Any]] = {image_id: [] for image_id in image_ids}
    for entry in entries:
        x, y, width, height = entry["bbox"]
        label, crowd = labels[entry["category_id"]], entry["iscrowd"]
        rows[entry["image_id"]].append([x, y, x + width, y + height, label, crowd])
    arrays = {image_id: np.array(values).reshape(-1, 6) for image_id, values in rows.items()}
    return truth, {
        image_id: Objects(a[:, :4], a[:, 4].astype(int), a[:, 5] > 0)
        for image_id, a in arrays.items()
    }
