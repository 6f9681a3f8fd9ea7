"""COCO's annotation format: reads a json, checks all of it, and lists every problem."""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gfl_jax.data.records import FLAGGED, NO_AREA, RULES, THIN
from gfl_jax.errors import InputError

OnError = Literal["raise", "skip"]

STATED_IN = "stated_in"
"""Field of an image or annotation that was not read from a COCO json: the place that states it,
such as "labels/a.txt, line 3". Messages name it in place of ids."""

_LISTED_PROBLEMS = 20
_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "categories": ("category", {"id": int, "name": str}),
    "images": ("image", {"id": int, "file_name": str, "height": int, "width": int}),
    "annotations": (
        "annotation",
        {"id": int, "image_id": int, "category_id": int, "bbox": list},
    ),
}


class Object(NamedTuple):
    """An object of an image.

    Attributes:
        box: (x1, y1, x2, y2) in pixels; may extend beyond the image.
        label: 0-based.
        crowd: a region of many objects, not ground truth for training.
        rule: why it is not ground truth for training either, an index of `RULES`; 0: it is.
    """

    box: tuple[float, float, float, float]
    label: int
    crowd: bool
    rule: int


@dataclasses.dataclass(frozen=True)
class ImageEntry:
    """An image with a valid entry in the json.

    Attributes:
        image_id: as in the json.
        filename: relative to the image folder, as in the json.
        size: (height, width) in pixels.
        stated: its entry in the json.
        objects: its kept annotations.
        annotations: their entries in the json, for the evaluation, see `_normalised`.
    """

    image_id: int
    filename: str
    size: tuple[int, int]
    stated: dict[str, Any]
    objects: list[Object] = dataclasses.field(default_factory=list)
    annotations: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset.

    Attributes:
        kind: what sort of problem; problems are counted by it.
        file: the image file, or the json if no image can be named.
        image_id: id of the image, if the problem has one.
        annotation_id: id of the annotation, if the problem has one.
        detail: what is wrong.
    """

    kind: str
    file: str
    image_id: int | None
    annotation_id: int | None
    detail: str

    def __str__(self) -> str:
        """Returns one line that says where and what."""
        ids = {"image": self.image_id, "annotation": self.annotation_id}
        where = [self.file, *(f"{noun} {i}" for noun, i in ids.items() if i is not None)]
        return f"{', '.join(where)}: {self.detail}"


class DataError(InputError):
    """A dataset cannot be used as it is.

    Attributes:
        problems: all of them, including those that the message leaves out.
    """

    def __init__(self, problems: Sequence[Problem], advice: str = ""):
        """Lists the first problems of each kind, with counts, and says what to do."""
        self.problems = list(problems)
        kinds = collections.defaultdict(list)
        for problem in problems:
            kinds[problem.kind].append(problem)
        share = max(1, _LISTED_PROBLEMS // len(kinds))
        noun = "problem" if len(problems) == 1 else "problems"
        lines = [f"{len(problems)} {noun} in the dataset"]
        for kind, listed in kinds.items():
            lines += [f"{kind} ({len(listed)}):", *(f"  {problem}" for problem in listed[:share])]
            if len(listed) > share:
                lines.append(f"  ... and {len(listed) - share} more")
        super().__init__("\n".join([*lines, advice]).rstrip())


def data_error(kind: str, file: Path | str, detail: str, advice: str = "") -> DataError:
    """The error for a single problem with a whole file or folder."""
    return DataError([Problem(kind, str(file), None, None, detail)], advice)


@dataclasses.dataclass
class DataReport:
    """What became of a dataset's images and annotations; nothing is dropped without being counted.

    Attributes:
        annotations_file: the json file.
        category_ids: id of each class label, ascending.
        category_names: name of each class label.
        images_found: number of images the json lists.
        annotations_found: number of annotations the json lists.
        problems: what is wrong with those left out.
        images_kept: number of images that are used.
        annotations_kept: number of annotations that are used: all but faulty ones and those of
            images left out.
        crowd: number of kept annotations that mark a crowd; not ground truth for training.
        dropped: number of other kept annotations that are not ground truth for training, by rule.
    """

    annotations_file: str
    category_ids: list[int]
    category_names: list[str]
    images_found: int
    annotations_found: int
    problems: list[Problem]
    images_kept: int = 0
    annotations_kept: int = 0
    crowd: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)

    def conclude(self, kept: Sequence[ImageEntry], on_error: OnError) -> None:
        """Counts what is kept; raises DataError on any problem or, with skip, if nothing is."""
        objects = [entry for image in kept for entry in image.objects]
        self.images_kept = len(kept)
        self.annotations_kept = len(objects)
        self.crowd = sum(entry.crowd for entry in objects)
        rules = collections.Counter(entry.rule for entry in objects if not entry.crowd)
        self.dropped = {rule: rules[i] for i, rule in enumerate(RULES) if i}
        if self.problems and on_error == "raise":
            raise DataError(
                self.problems,
                f"The dataset is {self.annotations_file}. Fix it, or leave out the faulty entries "
                "with --data.on-error=skip (gfl-jax prepare: --on-error skip).",
            )
        if not kept:
            detail = f"none of its {self.images_found} images can be used"
            nothing = Problem("nothing left", self.annotations_file, None, None, detail)
            raise DataError([nothing, *self.problems])

    def summary(self) -> str:
        """Returns a small table of the counts."""
        rows = {
            "images": self.images_found,
            "  left out": self.images_found - self.images_kept,
            "annotations": self.annotations_found,
            "  left out, or of an image left out": self.annotations_found - self.annotations_kept,
            "  kept, not trained on: crowd": self.crowd,
            **{f"  kept, not trained on: {rule}": count for rule, count in self.dropped.items()},
            **collections.Counter(f"problem: {problem.kind}" for problem in self.problems),
        }
        lines = (f"  {row:<52}{number:>9,}" for row, number in rows.items())
        return "\n".join([self.annotations_file, *lines])


def check(
    content: dict[str, Any], file: Path, images: Path | None, on_error: OnError
) -> tuple[list[ImageEntry], DataReport]:
    """Checks a whole COCO json; image files must exist, but are not read.

    Args:
        content: the json's, from `read_json`; or what `gfl_jax.data.forms` made of other files,
            with the `problems` that it found.
        file: the json, for messages.
        images: the folder that its file names are relative to; None: not looked up.
        on_error: "raise" stops at any problem; "skip" leaves faulty entries out.

    Returns:
        What is kept, by ascending image id; and the report.

    Raises:
        DataError: there are problems, with "raise"; or nothing is left.
    """
    if images and not os.path.isdir(images):
        raise data_error("missing image folder", images, "no such folder")
    listed = {
        entry["id"]: str(entry.get("file_name", file))
        for entry in reversed(content["images"])
        if isinstance(entry, dict) and isinstance(entry.get("id"), int)
    }
    problems: list[Problem] = list(content.get("problems", []))

    def report(
        kind: str, detail: str, image_id: Any, annotation_id: Any = None, place: str | None = None
    ) -> None:
        name = listed.get(image_id) if isinstance(image_id, int) else None
        if place:
            name, image_id, annotation_id = place, None, None
        problems.append(Problem(kind, name or str(file), image_id, annotation_id, detail))

    def by_id(key: str) -> dict[int, dict[str, Any]]:
        """Returns the well-formed entries of a list in the json, the first with each id."""
        noun, fields = _FIELDS[key]
        entries: dict[int, dict[str, Any]] = {}
        for entry in content[key]:
            fault = _fault(entry, fields)
            if not fault and entry["id"] not in entries:
                entries[entry["id"]] = entry
                continue
            known = entry if isinstance(entry, dict) else {}
            ids = {
                "image": (known.get("id"), None),
                "annotation": (known.get("image_id"), known.get("id")),
            }.get(noun, (None, None))
            kind = f"malformed {noun}" if fault else f"duplicate {noun} id"
            detail = f"{fault or 'the id is already taken'}: {str(entry)[:80]}"
            report(kind, detail, *ids, place=known.get(STATED_IN))
        return entries

    categories = dict(sorted(by_id("categories").items()))
    labels = {category_id: label for label, category_id in enumerate(categories)}
    entries = {}
    for image_id, image in sorted(by_id("images").items()):
        name = image["file_name"]
        if images and not os.path.isfile(images / name):  # False too for what cannot be a name
            detail = "no such file in the image folder"
            report("missing image file", detail, image_id, place=image.get(STATED_IN))
            continue
        stated = {key: value for key, value in image.items() if key != STATED_IN}
        entries[image_id] = ImageEntry(image_id, name, (image["height"], image["width"]), stated)
    for annotation_id, annotation in by_id("annotations").items():
        image_id, label = annotation["image_id"], labels.get(annotation["category_id"])
        entry = entries.get(image_id)
        faults = []
        if image_id not in listed:
            faults.append(("absent image", f"the json lists no image {image_id}"))
        if label is None:
            detail = f"the json lists no category {annotation['category_id']}"
            faults.append(("unknown category", detail))
        if fault := _box_fault(annotation["bbox"], entry.size if entry else None):
            faults.append(fault)
        for kind, detail in faults:
            report(kind, detail, image_id, annotation_id, annotation.get(STATED_IN))
        if entry and label is not None and not faults:
            annotation = _normalised(annotation)
            entry.annotations.append(annotation)
            entry.objects.append(_object(annotation, label))

    kept = list(entries.values())
    result = DataReport(
        annotations_file=str(file),
        category_ids=list(categories),
        category_names=[category["name"] for category in categories.values()],
        images_found=len(content["images"]),
        annotations_found=len(content["annotations"]),
        problems=problems,
    )
    result.conclude(kept, on_error)
    return kept, result


def read_json(file: Path) -> tuple[dict[str, Any], str]:
    """Reads a COCO json without its segmentations.

    Returns:
        Its content, and the sha256 of its bytes in hexadecimal digits.

    Raises:
        DataError: there is no such file, or it is not a COCO json.
    """
    if not os.path.isfile(file):
        folder = os.path.dirname(file)
        raise data_error(
            "missing annotation file",
            file,
            "no such file" if os.path.isdir(folder) else f"there is no folder {folder}",
            "--data.root, --data.train-annotations and --data.val-annotations name the files; data "
            "in other forms (Pascal VOC, YOLO, CVAT, Label Studio) is read by gfl-jax prepare",
        )
    try:
        data = file.read_bytes()
    except OSError as error:
        raise data_error("unreadable annotation file", file, str(error)) from error

    def without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop("segmentation", None)  # most of the file, and not used
        return entry

    try:
        content = json.loads(data, object_hook=without_segmentation)
    except (ValueError, RecursionError) as error:
        raise data_error("invalid json", file, str(error)) from error
    for key in _FIELDS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise data_error("missing list", file, f"a COCO json is an object with a list '{key}'")
    return {key: content[key] for key in _FIELDS}, hashlib.sha256(data).hexdigest()


def _fault(entry: Any, fields: dict[str, Any]) -> str | None:
    """Returns what is wrong with the fields of an entry in the json, if anything."""
    if not isinstance(entry, dict):
        return "not an object"
    for name, kind in fields.items():
        value = entry.get(name)
        if name not in entry:
            return f"no '{name}'"
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"'{name}' is not of type {kind.__name__}"
        if kind is int and not -(2**53) <= value <= 2**53:
            return f"'{name}' is beyond 2^53, up to which every reader of JSON keeps numbers apart"
        if name in ("height", "width") and not 0 < value < 2**31:
            return f"'{name}' is not a valid size"
    if entry.get("area") is not None and not _is_number(entry["area"]):
        return "'area' is not a finite number"
    for name in ("iscrowd", "ignore"):
        if entry.get(name) not in (None, False, True):
            return f"'{name}' is {entry[name]!r}, neither 0 nor 1"
    return None


def _box_fault(box: list[Any], size: tuple[int, int] | None) -> tuple[str, str] | None:
    """Returns (kind, detail) of what is wrong with a box (x, y, w, h) in an image of this size."""
    if len(box) != 4 or not all(map(_is_number, box)):
        return "bad box", f"box {box} is not four finite numbers"
    x, y, w, h = box
    if x + w <= x or y + h <= y:  # also a width too small to be seen beside x
        return "empty box", f"the width and height of box {box} are not both positive"
    if size and not (-w < x < size[1] and -h < y < size[0]):
        return "box outside image", f"box {box} lies outside the image, {size[1]} x {size[0]}"
    return None


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _normalised(annotation: dict[str, Any]) -> dict[str, Any]:
    """Returns a valid annotation with missing fields filled in and flags of 0 or 1."""
    w, h = annotation["bbox"][2:]
    area = w * h if annotation.get("area") is None else annotation["area"]
    flags = {name: int(annotation.get(name) or 0) for name in ("iscrowd", "ignore")}
    stated = {key: value for key, value in annotation.items() if key != STATED_IN}
    return stated | {"area": area} | flags


def _object(annotation: dict[str, Any], label: int) -> Object:
    """Returns the object of a normalised annotation."""
    x, y, w, h = annotation["bbox"]
    rules = {FLAGGED: annotation["ignore"], THIN: w < 1 or h < 1, NO_AREA: annotation["area"] <= 0}
    rule = next((rule for rule, holds in rules.items() if holds), 0)
    return Object((x, y, x + w, y + h), label, bool(annotation["iscrowd"]), rule)


def for_evaluation(entries: Sequence[ImageEntry], categories: dict[int, str]) -> dict[str, Any]:
    """The COCO json that these images are evaluated against.

    Args:
        entries: the images.
        categories: name of each category by its id.

    Returns:
        The json. Its annotations are numbered from 1, since pycocotools takes a match with 0 for
        none. Those flagged `ignore` become crowds, the only ones that it does not count as missed.
    """
    annotations = (annotation for entry in entries for annotation in entry.annotations)
    return {
        "images": [entry.stated for entry in entries],
        "annotations": [
            a | {"id": number, "iscrowd": a["iscrowd"] | a["ignore"]}
            for number, a in enumerate(annotations, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }
