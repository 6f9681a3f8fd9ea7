"""What a trained detector gets wrong on its validation images, as a page for a browser.

COCO's numbers, the six kinds of error of TIDE and what each costs, precision and recall,
calibration of the scores, confusion of the classes, AP by size and aspect ratio, and the pictures,
worst first. Fields of the run's data are flags.
"""

import collections
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from gfl_jax.cli import parse_command, positional
from gfl_jax.coco_eval import ground_truth
from gfl_jax.data import images
from gfl_jax.data.classes import class_error
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data, open_split
from gfl_jax.errors import InputError, MissingFileError, naming, needs
from gfl_jax.paths import as_path, local_path, write, writing
from gfl_jax.results import Result, Unreadable
from gfl_jax.run import Run, load
from gfl_jax.tools.report.costs import Detected, costs
from gfl_jax.tools.report.errors import IGNORED, Objects, judge
from gfl_jax.tools.report.gallery import data_url, entry_of, thumbnail
from gfl_jax.tools.report.numbers import numbers_of
from gfl_jax.tools.report.page import page

EMBEDDED = 300
"""Of so many images the pictures are in the page itself; of more they lie in a folder beside it."""


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """What `report` takes.

    Attributes:
        folder: a work directory of `train`, whose best checkpoint is used; a folder of
            checkpoints; or anything else that `gfl_jax.load` opens.
        data: where the validation images are; by default where they were in training.
        out: the page to write; of more than 300 images the pictures lie in a folder beside it.
        results: COCO results to report on, such as those of `eval`; without them the images are
            predicted on, and the page shows the distributions of sides too.
        limit: only the first so many images; 0: all.
        score_threshold: least score of the detections in the pictures and the confusion matrix.
        picture_size: longest side of the pictures, in pixels.
        batch_size: images computed together; 0: one on a CPU, eight elsewhere.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    data: Data = Data()
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.html"
    results: str = ""
    limit: int = 0
    score_threshold: float = 0.3
    picture_size: int = 640
    batch_size: int = 0


def main(arguments: list[str]) -> None:
    """Checkpoint to a page."""
    default = ReportCommand(tyro.MISSING)
    if named := positional(arguments):
        run = load(named)
        default = ReportCommand(named, run.experiment.data)
    command = parse_command(default, arguments, "gfl-jax report", __doc__)
    with needs("report"):  # before minutes of computing
        import hotcoco  # noqa: F401
    out = local_path(command.out, "--out")
    run = dataclasses.replace(
        run, experiment=dataclasses.replace(run.experiment, data=command.data)
    )
    run.predictor.batch_size = command.batch_size or run.predictor.batch_size

    split = open_split(command.data, "val")
    if split.category_names != run.category_names:
        ours = list(zip(run.category_ids, run.category_names, strict=True))
        theirs = list(zip(split.category_ids, split.category_names, strict=True))
        raise class_error("the detector", ours, "the data", theirs)
    indices = range(len(split.image_ids))[: command.limit or None]
    if command.results:
        found = stored(command.results, split, indices)
    else:
        found = predicted(run, split, indices)
    title = f"Detections of {command.folder}"
    about = {
        "step": str(run.step),
        "images": str(len(indices)),
        "classes": str(len(split.category_ids)),
    }
    about |= {"from": command.results} if command.results else {}
    ap = write_report(
        out, title, about, split, indices, found, command.score_threshold, command.picture_size
    )
    print(f"AP {ap:.3f} on {len(indices)} images\nreport {out}")


def predicted(run: Run, split: PreparedSplit, indices: range) -> Iterator[Result]:
    """The detections on images of a split, with the distributions of their sides."""
    pictures = (pixels(split, index) for index in indices)
    for result in run.predictor.stream(pictures, distributions=True):
        if isinstance(result, Unreadable):
            raise result.error
        yield result


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
                rows[row["image_id"]].append([x, y, x + width, y + height, label, score])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"not COCO results of these classes: a list of image_id, category_id, bbox and "
                f"score ({error!r})"
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


def write_report(
    out: Path,
    title: str,
    about: dict[str, str],
    split: PreparedSplit,
    indices: range,
    found: Iterator[Result],
    score_threshold: float,
    picture_size: int,
) -> float:
    """Writes the page and its pictures; returns the AP.

    Args:
        out: the page.
        title: of it.
        about: what the page says it is of.
        split: the images and their objects.
        indices: of the images in the split.
        found: the detections on each of them.
        score_threshold: least score of the detections in the pictures and the confusion matrix.
        picture_size: longest side of the pictures, in pixels.
    """
    image_ids = split.image_ids[indices.start : indices.stop].tolist()
    truth, objects = annotations_of(split, image_ids)
    folder = out.with_name(f"{out.stem}_pictures")
    inside = len(indices) <= EMBEDDED
    with writing(out):
        (out.parent if inside else folder).mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    detected: list[Detected] = []
    shown: list[dict[str, Any]] = []
    rows = zip(indices, image_ids, found, strict=True)
    for index, image_id, result in tqdm(rows, total=len(indices), unit=" images", desc="report"):
        own = objects[image_id]
        judged = judge(own, result.boxes, result.labels)
        results += result.to_coco(image_id)
        detected.append(Detected(judged, result.scores, result.labels, own.labels, own.crowd))
        name = split.table.filenames[index].decode("utf-8", "replace")
        jpeg, file = thumbnail(result.image, picture_size), folder / f"{len(shown):06}.jpg"
        if not inside:
            write(file, jpeg)
        entry = entry_of(name, result, own, judged, score_threshold)
        address = data_url(jpeg) if inside else f"{folder.name}/{file.name}"
        shown.append(entry | {"picture": address})
    numbers = numbers_of(truth, results, score_threshold)
    counted = [image.judged.kind != IGNORED for image in detected]
    scores, ious = (
        np.concatenate([values[c] for values, c in zip(of, counted, strict=True)])
        for of in ([d.scores for d in detected], [d.judged.iou_of_class for d in detected])
    )
    errors = costs(detected, len(split.category_ids))
    names = split.category_names
    text = page(title, about, names, numbers, errors, scores, ious, shown, score_threshold)
    write(out, text)
    return numbers.metrics["AP"]


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


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax report, or python -m gfl_jax report")
