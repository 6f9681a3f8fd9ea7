"""A detection data set that tfds has prepared as array_record, such as `coco/2017`.

tfds is imported where it is used: opening a trained detector does not need it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from gfl_jax.data import images
from gfl_jax.data.coco_format import check, data_error, for_evaluation, read_json
from gfl_jax.data.folders import local_folder, locked, new_folder
from gfl_jax.data.manifest import FORMAT, read_entry, split_entry, whole, write_manifest
from gfl_jax.data.prepare import make_table, save_table
from gfl_jax.data.records import FLAGGED, THIN, PreparedSplit, RecordSource, load_table

# The category ids of COCO's 80 classes.
_COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


@dataclasses.dataclass(frozen=True)
class Tfds:
    """A detection data set that tfds has prepared as array_record. Needs no TensorFlow.

    Attributes:
        name: the data set and its config, optionally with a version: 'coco/2017:1.1.0'.
        root: where tfds keeps its data sets.
        val_annotations: the original json of the validation split, relative to root, to evaluate
            against. If there is no such file, evaluation uses what tfds stored.
        cache_dir: where sizes and boxes of all images are kept; the first start reads them.
    """

    name: str = "coco/2017"
    root: str = "~/tensorflow_datasets"
    val_annotations: str = "annotations/instances_val2017.json"
    cache_dir: str = "~/.cache/gfl_jax"

    def open(self, split: str) -> PreparedSplit:
        """Opens 'train' or 'val'."""
        root = local_folder(self.root, "--data.root")
        original = root / self.val_annotations
        has_original = split == "val" and original.is_file()
        name = {"train": "train", "val": "validation"}[split]
        cache = local_folder(self.cache_dir, "--data.cache-dir")
        return open_tfds(self.name, name, root, cache, original if has_original else None)


class TfdsImages:
    """The encoded images of a tfds data set."""

    def __init__(self, directory: Path, split: str):
        """Opens a data set prepared by tfds; its images are left encoded."""
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(directory)
        decoders = {"image": tfds.decode.SkipDecoding()}
        self.info = builder.info
        self.examples = builder.as_data_source(split, decoders=decoders)

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the bytes of several image files."""
        return [example["image"] for example in self.examples.__getitems__(indices)]


def open_tfds(
    name: str, split: str, data_dir: Path, cache_dir: Path, annotations: Path | None = None
) -> PreparedSplit:
    """Opens a split of a tfds data set.

    The first call reads all of it to collect the sizes of the images and their boxes.

    Args:
        name: the data set and its config, optionally with a version: `coco/2017:1.1.0`.
        split: such as `train` or `validation[:10%]`.
        data_dir: where tfds keeps its data sets.
        cache_dir: where the sizes and boxes are kept.
        annotations: the original json, for the evaluation and the category ids; without one the
            classes must be COCO's 80.

    Raises:
        DataError: there is no such data set or split in array_record, or the json belongs to
            another data set.
    """
    directory = _directory(name, data_dir)
    try:
        encoded = TfdsImages(directory, split)
    except (NotImplementedError, ValueError) as error:
        advice = (
            f"tfds convert_format --out_file_format=array_record --dataset_version_dir={directory}"
        )
        raise data_error("unreadable dataset", directory, str(error), advice) from error
    key = hashlib.sha256((directory / "dataset_info.json").read_bytes())
    key.update(f"{directory} {split} {FORMAT}".encode())
    if annotations:
        if not annotations.is_file():
            raise data_error("missing annotation file", annotations, "no such file")
        status = annotations.stat()
        key.update(f"{annotations} {status.st_size} {status.st_mtime_ns}".encode())
    folder = cache_dir / f"tfds-{key.hexdigest()[:16]}"
    if not whole(epath.Path(folder), "read"):
        with locked(folder):
            if not whole(epath.Path(folder), "read"):
                with new_folder(folder) as partial:
                    _write(epath.Path(partial), encoded, annotations)
    entry = read_entry(epath.Path(folder), "read")
    table = load_table((folder / "read" / "table.npz").read_bytes())
    kept = epath.Path(folder / "read" / "annotations.json")
    return PreparedSplit(
        RecordSource(
            f"{directory}:{split}", functools.partial(TfdsImages, directory, split), table
        ),
        table,
        entry["category_ids"],
        encoded.info.features["objects"]["label"].names,
        kept if annotations else None,
    )


def _directory(name: str, data_dir: Path) -> Path:
    """Returns the folder of a data set's newest, or named, version."""
    import tensorflow_datasets as tfds

    name, _, version = name.partition(":")
    files = (data_dir / name).glob(f"{version or '*.*.*'}/dataset_info.json")
    versions = [tfds.core.Version(file.parent.name) for file in files]
    if not versions:
        advice = f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
        raise data_error(
            "missing dataset", data_dir / name, f"no version {version or 'at all'}", advice
        )
    return data_dir / name / str(max(versions))


def _write(folder: epath.Path, encoded: TfdsImages, annotations: Path | None) -> None:
    """Reads all examples and writes what is known of them, as a split `read` without images.

    Raises:
        DataError: the json belongs to another data set.
    """
    names = encoded.info.features["objects"]["label"].names
    category_ids, entries = _COCO_IDS, None
    if annotations:
        checked, report = check(read_json(annotations)[0], annotations, None, "skip")
        if report.problems:
            print(report.summary())
        category_ids, entries = report.category_ids, {entry.image_id: entry for entry in checked}
    if len(category_ids) != len(names) or (annotations and report.category_names != names):
        stated = report.category_names if annotations else f"{len(category_ids)} classes"
        detail = f"{names}, but the annotations have {stated}"
        raise data_error("other classes", annotations or encoded.info.full_name, detail)
    image_ids, filenames, sizes, objects = [], [], [], []
    examples = tqdm(encoded.examples, desc=f"reading {encoded.info.full_name}", unit=" images")
    for example in examples:
        image_id, file = int(example["image/id"]), example["image/filename"].decode()
        if entries is None:
            sizes.append(images.image_size(example["image"], file))
            objects.append(_objects(example["objects"], sizes[-1]))
        elif image_id in entries:
            sizes.append(entries[image_id].size)
            objects.append(entries[image_id].objects)
        else:
            detail = f"it lists no image {image_id} ({file})"
            raise data_error("absent image", annotations or file, detail)
        image_ids.append(image_id)
        filenames.append(file)
    made = folder / "read"
    made.mkdir()
    save_table(made / "table.npz", make_table(image_ids, filenames, sizes, objects))
    if entries is not None:
        categories = dict(zip(category_ids, names, strict=True))
        kept = for_evaluation([entries[image_id] for image_id in image_ids], categories)
        (made / "annotations.json").write_text(json.dumps(kept))
    write_manifest(
        folder, {"read": {"category_ids": category_ids, **split_entry(folder, "read", {})}}
    )


def _objects(objects: dict[str, np.ndarray], size: tuple[int, int]) -> Sequence[Any]:
    """The objects of an example as `make_table` takes them.

    tfds stores boxes as (y1, x1, y2, x2) as fractions of the image's height and width.
    """
    yxyx = np.reshape(objects["bbox"], (-1, 4)) * np.array([*size, *size], np.float64)
    # tfds data sets lack `ignore`, and their integer areas cannot tell 0 from 0.9. COCO's boxes
    # have two decimals; float32 fractions shift a width of 1 by less than 1e-3.
    thin = (yxyx[:, 2:] - yxyx[:, :2] < 1 - 1e-3).any(axis=1)
    boxes, labels = yxyx[:, [1, 0, 3, 2]], np.asarray(objects["label"])
    crowd = np.asarray(objects["is_crowd"])
    flagged = np.asarray(objects.get("ignore", np.zeros_like(thin)))
    rule = np.where(flagged, FLAGGED, np.where(thin, THIN, 0))
    return list(zip(boxes, labels, crowd, rule, strict=True))
