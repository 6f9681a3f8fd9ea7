"""COCO jsons of any name, as Label Studio, CVAT and others export them."""

import json
import posixpath
import re
from pathlib import Path

from gfl_jax.data.coco_format import read_json
from gfl_jax.data.forms.said import Found, ImageFiles, text_of, walked
from gfl_jax.errors import InputError

NAME = "COCO"
LISTS = ("trainval", "train", "validation", "valid", "val", "test")


def found(root: Path) -> list[str]:
    """The jsons of this form in a folder, relative to it."""
    return [f for f in walked(root, (".json",)) if f.count("/") < 2 and _is_coco(root / f)]


def _is_coco(file: Path) -> bool:
    try:
        content = json.loads(text_of(file))
    except (OSError, ValueError, RecursionError):
        return False
    keys = "images", "annotations", "categories"
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys)


def read(root: Path, files: list[str], images: str = "") -> Found:
    """Reads a data set; a json whose name or folder says train, val, ... is that list.

    Args:
        root: its folder.
        files: those of `found`.
        images: folder of the images, relative to the root; empty: looked for.

    Raises:
        InputError: several jsons are of the same list.
    """
    image_files = ImageFiles(root)
    lists = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.lower())
        name = next((name for name in LISTS if name in words), "")
        if name in lists:
            raise InputError(
                f"{root} has several jsons: {', '.join(files)}. Say which is which with "
                "--train-annotations, --train-images, --val-annotations and --val-images"
            )
        content, _ = read_json(root / file)
        folder = posixpath.dirname(file)
        above = posixpath.dirname(folder)
        near = [images] if images else [folder, posixpath.join(above, "images"), above]
        for image in content["images"]:
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                place = image_files.find(image["file_name"], near)
                image["file_name"] = place or image["file_name"]
        lists[name] = content
    return Found(root / files[0], root, lists)
