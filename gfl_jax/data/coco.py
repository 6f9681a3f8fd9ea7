"""A COCO-format folder, checked and prepared once as array_record, then read at random.

Two sources give the same `PreparedSplit`: `prepare` for a folder of images with a COCO-format json,
`open_tfds` for a dataset that tfds has prepared as array_record, such as `coco/2017`. Neither needs
TensorFlow.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from gfl_jax.data import images

OnError = Literal["raise", "skip"]

# The category ids of COCO's 80 classes.
_COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
_SPLIT = "all_images"
_SHARD_BYTES = 1 << 27
_LISTED_PROBLEMS = 20
_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "categories": ("category", {"id": int, "name": str}),
    "images": ("image", {"id": int, "file_name": str, "height": int, "width": int}),
    "annotations": (
        "annotation",
        {"id": int, "image_id": int, "category_id": int, "bbox": list},
    ),
}


@dataclasses.dataclass(frozen=True)
class CocoFolder:
    """A dataset in COCO's format.

    Attributes:
        annotations: the json file.
        images: the folder its `file_name`s are relative to.
    """

    annotations: Path
    images: Path


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset.

    Attributes:
        kind: what sort of problem; problems are counted by it.
        file: the image file, or the json where no image can be named.
        image_id: id of the image, if one is concerned.
        annotation_id: id of the annotation, if one is concerned.
        detail: what was found.
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


class DataError(ValueError):
    """A dataset cannot be used as it is.

    Attributes:
        problems: everything that was found, also what the message leaves out.
    """

    def __init__(self, problems: Sequence[Problem], advice: str = ""):
        """Lists the first problems of every kind, with counts, and says how to go on."""
        self.problems = list(problems)
        kinds = collections.defaultdict(list)
        for problem in problems:
            kinds[problem.kind].append(problem)
        share = max(1, _LISTED_PROBLEMS // len(kinds))
        lines = [f"{len(problems)} problem{'s' * (len(problems) > 1)} in the dataset"]
        for kind, found in kinds.items():
            lines += [f"{kind} ({len(found)}):", *(f"  {problem}" for problem in found[:share])]
            lines += [f"  ... and {len(found) - share} more"] * (len(found) > share)
        super().__init__("\n".join([*lines, advice]).rstrip())


def _error(kind: str, file: Path | str, detail: str, advice: str = "") -> DataError:
    return DataError([Problem(kind, str(file), None, None, detail)], advice)


@dataclasses.dataclass
class Report:
    """What became of a dataset's images and annotations; nothing goes without being counted here.

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
        crowd: number of kept annotations that mark a crowd; no ground truth for training.
        dropped_by_rule: number of other kept annotations that are, as in the reference, no ground
            truth for training: flagged `ignore`, area <= 0, or less than 1 pixel wide or high.
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
    dropped_by_rule: int = 0

    def conclude(self, records: list[dict[str, Any]], on_error: OnError) -> None:
        """Counts what is kept; raises a DataError on any problem or, to skip, if nothing is."""
        objects = [entry for record in records for entry in record["objects"]]
        self.images_kept = len(records)
        self.annotations_kept = len(objects)
        self.crowd = sum(entry["is_crowd"] for entry in objects)
        self.dropped_by_rule = sum(entry["ignore"] and not entry["is_crowd"] for entry in objects)
        if self.problems and on_error == "raise":
            raise DataError(
                self.problems,
                f"The dataset is {self.annotations_file}. Correct it, or leave the faulty entries "
                "out with --data.on-error=skip.",
            )
        if not records:
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
            "  kept, not trained on: by rule": self.dropped_by_rule,
            **collections.Counter(f"problem: {problem.kind}" for problem in self.problems),
        }
        lines = (f"  {row:<38}{number:>9,}" for row, number in rows.items())
        return "\n".join([self.annotations_file, *lines])


def check(folder: CocoFolder, on_error: OnError) -> tuple[list[dict[str, Any]], Report]:
    """Reads a COCO json and checks all of it; image files are only looked up, not read.

    Args:
        folder: what to check.
        on_error: "raise" stops at any problem; "skip" leaves faulty entries out.

    Returns:
        One record per image, by ascending image id: the features of `CocoRecords` without the
        image itself; and the report.

    Raises:
        DataError: with "raise", there are problems; in any case if the json cannot be read or
            nothing is left.
    """
    content = _read_json(folder.annotations)
    if not folder.images.is_dir():
        raise _error("missing image folder", folder.images, "no such folder")
    listed = {
        entry["id"]: str(entry.get("file_name", folder.annotations))
        for entry in reversed(content["images"])
        if isinstance(entry, dict) and isinstance(entry.get("id"), int)
    }
    problems: list[Problem] = []

    def report(kind: str, detail: str, image_id: Any, annotation_id: Any = None) -> None:
        name = listed.get(image_id) if isinstance(image_id, int) else None
        problems.append(
            Problem(kind, name or str(folder.annotations), image_id, annotation_id, detail)
        )

    def by_id(key: str) -> dict[int, dict[str, Any]]:
        """Returns the well-formed entries of a list of the json, the first of each id."""
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
            report(kind, f"{fault or 'id is taken'}: {str(entry)[:80]}", *ids)
        return entries

    categories = dict(sorted(by_id("categories").items()))
    labels = {category_id: label for label, category_id in enumerate(categories)}
    records = {}
    for image_id, image in sorted(by_id("images").items()):
        name = image["file_name"]
        if not (folder.images / name).is_file():
            report("missing image file", f"no such file in {folder.images}", image_id)
            continue
        size = {"height": image["height"], "width": image["width"]}
        records[image_id] = {"image/filename": name, "image/id": image_id, **size, "objects": []}
    for annotation_id, annotation in by_id("annotations").items():
        image_id, label = annotation["image_id"], labels.get(annotation["category_id"])
        record = records.get(image_id)
        faults = []
        if image_id not in listed:
            faults.append(("absent image", f"the json lists no image {image_id}"))
        if label is None:
            detail = f"the json lists no category {annotation['category_id']}"
            faults.append(("unknown category", detail))
        if fault := _box_fault(annotation["bbox"], record):
            faults.append(fault)
        for kind, detail in faults:
            report(kind, detail, image_id, annotation_id)
        if record and label is not None and not faults:
            record["objects"].append(_object(annotation, record, label))

    kept = list(records.values())
    result = Report(
        annotations_file=str(folder.annotations),
        category_ids=list(categories),
        category_names=[category["name"] for category in categories.values()],
        images_found=len(content["images"]),
        annotations_found=len(content["annotations"]),
        problems=problems,
    )
    result.conclude(kept, on_error)
    return kept, result


def _read_json(file: Path) -> dict[str, Any]:
    """Reads a COCO json without its segmentations, or raises a DataError."""
    if not file.is_file():
        raise _error("missing annotation file", file, "no such file")

    def without_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop("segmentation", None)  # most of the file, and not used
        return entry

    try:
        content = json.loads(file.read_bytes(), object_hook=without_segmentation)
    except (ValueError, RecursionError) as error:
        raise _error("invalid json", file, str(error)) from error
    for key in _FIELDS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise _error("missing list", file, f"a COCO json is an object with a list '{key}'")
    return content


def _fault(entry: Any, fields: dict[str, Any]) -> str | None:
    """Returns what is wrong with the fields of an entry of the json, if anything is."""
    if not isinstance(entry, dict):
        return "no object"
    for name, kind in fields.items():
        value = entry.get(name)
        if name not in entry:
            return f"no '{name}'"
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"'{name}' is no {kind.__name__}"
        if kind is int and not -(2**63) <= value < 2**63:
            return f"'{name}' exceeds 64 bits"
        if name in ("height", "width") and not 0 < value < 2**31:
            return f"'{name}' is no size"
    if not _is_number(entry.get("area", 0)):
        return "'area' is no finite number"
    return None


def _box_fault(box: list[Any], record: dict[str, Any] | None) -> tuple[str, str] | None:
    """Returns (kind, detail) of what is wrong with a box (x, y, w, h) in an image, if known."""
    if len(box) != 4 or not all(map(_is_number, box)):
        return "bad box", f"box {box} is not four finite numbers"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "empty box", f"box {box} has no positive width and height"
    if record and not (-w < x < record["width"] and -h < y < record["height"]):
        size = f"{record['width']} x {record['height']}"
        return "box outside image", f"box {box} lies outside the image, {size}"
    return None


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, and one that float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


def _object(annotation: dict[str, Any], record: dict[str, Any], label: int) -> dict[str, Any]:
    """Returns the features of an annotation that has no fault."""
    x, y, w, h = annotation["bbox"]
    size = [record["height"], record["width"]] * 2
    area = annotation.get("area", w * h)
    return {
        "id": annotation["id"],
        "area": area,
        "bbox": np.divide([y, x, y + h, x + w], size).astype(np.float32),
        "label": label,
        "is_crowd": bool(annotation.get("iscrowd")),
        "ignore": bool(annotation.get("ignore")) or area <= 0 or w < 1 or h < 1,
    }


class CocoRecords(tfds.core.ShardBasedBuilder):
    """Prepares a COCO-format folder; the features are those of tfds's `coco/2017` and a few more.

    Not a GeneratorBasedBuilder: beyond 1 GB that one sorts through files that it opens with
    TensorFlow. The image files' bytes are stored as they are, images by ascending id. The folder of
    the dataset also gets `report.json` and `table.npz`, before it takes its final name.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, folder: CocoFolder, on_error: OnError, data_dir: Path):
        """Takes what `prepare` takes; data_dir holds this one dataset."""
        self._folder = folder
        self._on_error = on_error
        self._kept: list[dict[str, Any]] = []
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        objects = {
            "id": np.int64,
            "area": np.float32,
            # (y1, x1, y2, x2) / image size. No BBoxFeature: a box may stick out of the image.
            "bbox": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "label": np.int64,
            "is_crowd": np.bool_,
            "ignore": np.bool_,
        }
        features = {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "height": np.int32,
            "width": np.int32,
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="A dataset in COCO's format.",
            features=tfds.features.FeaturesDict(features),
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        self._report.conclude(self._kept, self._on_error)
        directory = Path(self.data_dir)  # still under its temporary name
        report = json.dumps(dataclasses.asdict(self._report), indent=1)
        (directory / "report.json").write_text(report)
        _save_table(
            directory / "table.npz",
            sizes=[(record["height"], record["width"]) for record in self._kept],
            num_boxes=[
                sum(not (entry["is_crowd"] or entry["ignore"]) for entry in record["objects"])
                for record in self._kept
            ],
            image_ids=[record["image/id"] for record in self._kept],
            category_ids=self._report.category_ids,
            category_names=self._report.category_names,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Any]]:
        records, self._report = check(self._folder, self._on_error)
        files = [self._folder.images / record["image/filename"] for record in records]
        shards = np.cumsum([file.stat().st_size for file in files]) // _SHARD_BYTES
        starts = np.unique(shards, return_index=True)[1].tolist()
        progress = tqdm(total=len(records), desc="preparing", unit=" images")
        return {
            _SPLIT: [
                functools.partial(self._examples, records[start:end], progress)
                for start, end in zip(starts, [*starts[1:], len(records)], strict=True)
            ]
        }

    def _examples(
        self, records: list[dict[str, Any]], progress: tqdm
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the examples of a shard; a faulty image file becomes a problem instead."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(records), 64):
                block = records[start : start + 64]
                for record, loaded in zip(block, pool.map(self._load, block), strict=True):
                    progress.update()
                    if isinstance(loaded, Problem):
                        self._report.problems.append(loaded)
                    else:
                        self._kept.append(record)
                        yield record["image/id"], {"image": loaded, **record}
        if progress.n == progress.total:
            progress.close()

    def _load(self, record: dict[str, Any]) -> bytes | Problem:
        """Reads an image file and makes sure that it decodes to the size the json states."""
        name = record["image/filename"]
        try:
            data = (self._folder.images / name).read_bytes()
            images.decode(data, (record["height"], record["width"]), name)
        except (OSError, ValueError) as error:
            wrong_size = isinstance(error, images.ImageSizeError)
            kind = "wrong image size" if wrong_size else "broken image file"
            detail = str(error).removeprefix(f"{name}: ")
            return Problem(kind, name, record["image/id"], None, detail)
        return data


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
            self._records = _open_records(self.directory, self._split)[1]
        example = self._records[index]
        height, width = map(int, self._sizes[index])
        return {
            "image": example["image"],
            "image_id": int(example["image/id"]),
            "filename": example["image/filename"].decode(),
            "height": height,
            "width": width,
            **_boxes(example["objects"], height, width),
        }


def _open_records(directory: Path, split: str) -> tuple[tfds.core.DatasetInfo, Sequence[Any]]:
    """Opens a dataset prepared by tfds; its images are left encoded."""
    builder = tfds.builder_from_directory(directory)
    decoders = {"image": tfds.decode.SkipDecoding()}
    return builder.info, builder.as_data_source(split, decoders=decoders)


def _boxes(objects: dict[str, np.ndarray], height: int, width: int) -> dict[str, np.ndarray]:
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


def _save_table(file: Path, **columns: list[Any]) -> None:
    """Saves the arrays of a `PreparedSplit`; the file is there in full or not at all."""
    temporary = file.with_name(f"{file.stem}.{os.getpid()}.npz")
    types = {"sizes": np.int32, "num_boxes": np.int32, "category_names": np.str_}
    arrays: dict[str, Any] = {
        name: np.array(column, types.get(name, np.int64)) for name, column in columns.items()
    }
    np.savez(temporary, **arrays)
    temporary.replace(file)


def _load_split(
    directory: Path, split: str, table: Path, annotations: Path | None
) -> PreparedSplit:
    with np.load(table) as columns:
        arrays = dict(columns)
    arrays["category_ids"] = arrays["category_ids"].tolist()
    arrays["category_names"] = arrays["category_names"].tolist()
    source = RecordSource(directory, split, arrays["sizes"])
    return PreparedSplit(source=source, annotations=annotations, **arrays)


def prepare(
    folder: CocoFolder, cache_dir: Path | str, on_error: OnError = "raise"
) -> PreparedSplit:
    """Checks a COCO-format folder and prepares it, once; later calls find the result again.

    It is prepared anew if the json or the list of image files (names, sizes, times) changes.
    Several processes may call this at once: one prepares, the others wait. What became of the
    images and annotations is printed, and kept as `report.json` beside the records.

    Args:
        folder: the dataset.
        cache_dir: where prepared datasets are kept.
        on_error: "raise" stops at bad input; "skip" leaves it out.

    Raises:
        DataError: there are problems (see `check`), or image files that do not decode to the size
            that the json states.
    """
    folder = CocoFolder(Path(folder.annotations).absolute(), Path(folder.images).absolute())
    cache_dir = Path(cache_dir).expanduser().absolute()
    root = cache_dir / _key(folder, on_error, cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    directory = root / CocoRecords.name / str(CocoRecords.VERSION)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed when the process ends, however it ends
        if not directory.exists():
            shutil.rmtree(directory.parent, ignore_errors=True)  # of an interrupted run
            with contextlib.redirect_stdout(io.StringIO()):  # tfds announces a download
                CocoRecords(folder, on_error, root).download_and_prepare()
    report = json.loads((directory / "report.json").read_text())
    report["problems"] = [Problem(**problem) for problem in report["problems"]]
    print(f"{Report(**report).summary()}\n  prepared in {directory}, see report.json")
    return _load_split(directory, _SPLIT, directory / "table.npz", folder.annotations)


def _key(folder: CocoFolder, on_error: OnError, cache_dir: Path) -> str:
    """Names a prepared dataset by what it is made from; cache_dir may lie beside the images."""
    key = hashlib.sha256(f"{folder.images} {CocoRecords.VERSION} {on_error}".encode())
    if folder.annotations.is_file():
        key.update(folder.annotations.read_bytes())
    for parent, subfolders, names in os.walk(folder.images):
        subfolders[:] = sorted(s for s in subfolders if Path(parent, s) != cache_dir)
        for file in (os.path.join(parent, name) for name in sorted(names)):
            if os.path.isfile(file):  # no dangling link
                stat = os.stat(file)
                key.update(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode())
    return f"{folder.annotations.stem}-{key.hexdigest()[:16]}"


def open_tfds(
    name: str,
    split: str,
    data_dir: Path | str,
    cache_dir: Path | str,
    annotations: Path | None = None,
) -> PreparedSplit:
    """Opens a detection dataset that tfds has prepared as array_record, such as `coco/2017`.

    The first call reads all of it for the sizes of the images and the numbers of boxes.

    Args:
        name: the dataset and its config, if need be with the version: `coco/2017:1.1.0`.
        split: such as `train` or `validation[:10%]`.
        data_dir: where tfds keeps its datasets.
        cache_dir: where the sizes are kept.
        annotations: the original json, if there is one: for the evaluation, and for the category
            ids unless the classes are COCO's 80.

    Raises:
        DataError: there is no such dataset or split as array_record, or the json belongs to
            another dataset.
    """
    directory = _tfds_directory(name, Path(data_dir).expanduser())
    try:
        info, records = _open_records(directory, split)
    except (NotImplementedError, ValueError) as error:
        advice = "tfds convert_format --out_file_format=array_record --dataset_version_dir="
        raise _error("unreadable dataset", directory, str(error), f"{advice}{directory}") from error
    if annotations and not annotations.is_file():
        raise _error("missing annotation file", annotations, "no such file")
    original = annotations.read_bytes() if annotations else b""
    key = hashlib.sha256((directory / "dataset_info.json").read_bytes() + original)
    key.update(f"{directory} {split}".encode())
    table = Path(cache_dir).expanduser() / f"tfds-{key.hexdigest()[:16]}.npz"
    if not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        _save_table(table, **_tfds_table(info, records, annotations))
    return _load_split(directory, split, table, annotations)


def _tfds_directory(name: str, data_dir: Path) -> Path:
    """Returns the folder of a dataset's newest, or named, version."""
    name, _, version = name.partition(":")
    found = (data_dir / name).glob(f"{version or '*.*.*'}/dataset_info.json")
    versions = [tfds.core.Version(file.parent.name) for file in found]
    if not versions:
        advice = f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
        raise _error(
            "missing dataset", data_dir / name, f"no version {version or 'at all'}", advice
        )
    return data_dir / name / str(max(versions))


def _tfds_table(
    info: tfds.core.DatasetInfo, records: Sequence[Any], annotations: Path | None
) -> dict[str, list[Any]]:
    """Returns the columns of `_save_table` for a dataset prepared by tfds."""
    label = info.features["objects"]["label"]
    stated: dict[int, tuple[int, int]] = {}
    category_ids = _COCO_IDS
    if annotations:
        content = _read_json(annotations)
        stated = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        category_ids = sorted(category["id"] for category in content["categories"])
    if len(category_ids) != label.num_classes:
        detail = f"{label.num_classes} classes, where the annotations have {len(category_ids)}"
        raise _error("other classes", annotations or info.full_name, detail)
    sizes, num_boxes, image_ids = [], [], []
    for example in tqdm(records, desc=f"reading {info.full_name}", unit=" images"):
        image_id, file = int(example["image/id"]), example["image/filename"].decode()
        if annotations and image_id not in stated:
            raise _error("absent image", annotations, f"it lists no image {image_id} ({file})")
        size = stated.get(image_id) or images.image_size(example["image"], file)
        boxes = _boxes(example["objects"], *size)
        sizes.append(size)
        num_boxes.append(int((~boxes["crowd"] & ~boxes["ignore"]).sum()))
        image_ids.append(image_id)
    return {
        "sizes": sizes,
        "num_boxes": num_boxes,
        "image_ids": image_ids,
        "category_ids": category_ids,
        "category_names": label.names,
    }
