"""A COCO-format folder, checked and prepared once as array_record; needs no TensorFlow."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from gfl_jax.data import images
from gfl_jax.data.coco_format import CocoFolder, OnError, Problem, Report, check
from gfl_jax.data.records import PreparedSplit, load_split, save_table

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
        save_table(
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
    return load_split(directory, _SPLIT, directory / "table.npz", folder.annotations)


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
