"""A detection dataset that tfds has prepared as array_record, such as `coco/2017`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tqdm import tqdm

from gfl_jax.data import images
from gfl_jax.data.coco_format import data_error, read_json
from gfl_jax.data.records import PreparedSplit, boxes_of, load_split, open_records, save_table

# The category ids of COCO's 80 classes.
_COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


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
        info, records = open_records(directory, split)
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
        save_table(table, **_tfds_table(info, records, annotations))
    return load_split(directory, split, table, annotations)


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
    """Returns the columns of `save_table` for a dataset prepared by tfds."""
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
        boxes = boxes_of(example["objects"], *size)
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
