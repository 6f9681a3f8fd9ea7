"""A COCO-format folder, checked and prepared once as array_record, then read at random.

Two sources give the same `PreparedSplit`: `prepare` for a folder of images with a COCO-format json,
`open_tfds` for a dataset that tfds has prepared as array_record, such as `coco/2017`. Neither needs
TensorFlow.
"""

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
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from gfl_jax.data import images
from gfl_jax.data.coco_format import (
    CocoFolder,
    OnError,
    Problem,
    Report,
    check,
    data_error,
    read_json,
)

# The category ids of COCO's 80 classes.
_COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
_SPLIT = "all_images"
_SHARD_BYTES = 1 << 27


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
        advice = (
            f"tfds convert_format --out_file_format=array_record --dataset_version_dir={directory}"
        )
        raise data_error("unreadable dataset", directory, str(error), advice) from error
    if annotations and not annotations.is_file():
        raise data_error("missing annotation file", annotations, "no such file")
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
        raise data_error(
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
        content = read_json(annotations)
        stated = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        category_ids = sorted(category["id"] for category in content["categories"])
    if len(category_ids) != label.num_classes:
        detail = f"{label.num_classes} classes, where the annotations have {len(category_ids)}"
        raise data_error("other classes", annotations or info.full_name, detail)
    sizes, num_boxes, image_ids = [], [], []
    for example in tqdm(records, desc=f"reading {info.full_name}", unit=" images"):
        image_id, file = int(example["image/id"]), example["image/filename"].decode()
        if annotations and image_id not in stated:
            raise data_error("absent image", annotations, f"it lists no image {image_id} ({file})")
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
