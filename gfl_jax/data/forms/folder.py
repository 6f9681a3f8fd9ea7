"""A folder in any of the forms: which one it is, and which images are for training."""

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any, Literal

from gfl_jax.data.forms import coco, cvat, label_studio, voc, yolo
from gfl_jax.data.forms.said import Content, Found, walked
from gfl_jax.errors import InputError, MissingFileError

Form = Literal["auto", "coco", "voc", "yolo", "cvat", "label-studio"]

FORMS: dict[str, Any] = {
    "coco": coco,
    "voc": voc,
    "yolo": yolo,
    "cvat": cvat,
    "label-studio": label_studio,
}

TRAIN = ("train", "training", "trainval")
VAL = ("val", "valid", "validation", "test")


def read_folder(root: Path, form: Form = "auto", images: str = "") -> tuple[Found, str]:
    """Reads a data set in the form that its files show.

    Args:
        root: its folder.
        form: the form; "auto": the one of which there are files.
        images: folder of the images, relative to the root; empty: looked for.

    Returns:
        What was read, and a sentence that says by which files the form was recognised.

    Raises:
        MissingFileError: there is no such folder.
        InputError: it shows no form, or several; or it cannot be read.
    """
    if not root.is_dir():
        raise MissingFileError(f"there is no folder {root}")
    if images and not (root / images).is_dir():
        raise MissingFileError(f"there is no folder {root / images}: --images is relative to SRC")
    names = [*FORMS] if form == "auto" else [form]
    shown = {name: files for name in names if (files := FORMS[name].found(root))}
    if not shown:
        raise InputError(f"{root} {_nothing(root)}")
    if len(shown) > 1:
        listed = "; ".join(f"--form {name} ({files[0]})" for name, files in shown.items())
        raise InputError(f"{root} could be read in several ways: choose {listed}")
    ((name, files),) = shown.items()
    read: Found = FORMS[name].read(root, files, images)
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return read, f"{root} is read as {FORMS[name].NAME}, because of {files[0]}{more}"


def _nothing(root: Path) -> str:
    """Why a folder shows no form: what was looked for, and jsons that cannot be read."""
    looked = (
        "has none of: a COCO json; Annotations/*.xml (Pascal VOC); data.yaml, classes.txt or "
        "obj.names (YOLO); annotations.xml (CVAT for images 1.1); a json of Label Studio"
    )
    for file in walked(root, (".json",)):
        try:
            json.loads((root / file).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            return f"{looked}. {file} is no valid json: {error}"
    if yamls := walked(root, (".yaml", ".yml")):
        return f"{looked}. {yamls[0]} has no `names:`, which a data.yaml of YOLO needs"
    zips = walked(root, (".zip",))
    return looked + (f". Unpack {zips[0]} first" if zips else "")


def splits_of(
    found: Found, train: str = "", val: str = "", share: float = 0.2
) -> tuple[dict[str, Content], str]:
    """The images to train on and those to evaluate on.

    Where there are no lists of both, images are divided by a hash of their names: always in the
    same way, wherever the folder lies, and however many images are added.

    Args:
        found: what was read.
        train: name of the list to train on; empty: train, or else trainval.
        val: name of the list to evaluate on; empty: val, or else test.
        share: of the images to evaluate on where there are no lists.

    Returns:
        What a COCO json of 'train' and 'val' would say, and a sentence that says why.

    Raises:
        InputError: there is no such list.
    """
    for flag, name in (("--train-list", train), ("--val-list", val)):
        if name and name not in found.lists:
            known = ", ".join(filter(None, found.lists)) or "none"
            raise InputError(f"{flag} is {name}; {found.file} has these lists: {known}")
    if not 0 < share < 1:
        raise InputError(f"--val-share is {share}; it must be between 0 and 1")
    train = train or next((name for name in TRAIN if name in found.lists), "")
    val = val or next((name for name in VAL if name in found.lists), "")
    if train and val:
        first, second = found.lists[train], found.lists[val]
        unused = [name for name in found.lists if name not in (train, val)]
        said = f"train is its list {train!r}, val its list {val!r}"
        said += f"; not used: {', '.join(unused)}" if unused else ""
        if both := _names(first) & _names(second):
            said += f"; WARNING: {len(both)} images are in both, such as {min(both)}"
        problems = [p for p in second.get("problems", []) if p not in first.get("problems", [])]
        return {"train": first, "val": second | {"problems": problems}}, said
    if len(found.lists) > 1:
        raise InputError(
            f"{found.file} has the lists {', '.join(found.lists)}: say which are for training and "
            "evaluation with --train-list and --val-list"
        )
    ((name, content),) = found.lists.items()
    if len(content["images"]) == 1 and not content.get("problems"):
        raise InputError(
            f"{found.file} has one image that can be used: at least two are needed, one to train "
            "on and one to evaluate on"
        )
    said = f"{'it has only the list ' + repr(name) if name else 'it has no lists of images'}: "
    said += f"{share:.0%} of them, chosen by a hash of their names, are for evaluation"
    return divided(content, share), said


def divided(content: Content, share: float) -> dict[str, Content]:
    """Divides images by a hash of their names.

    Args:
        content: what a COCO json says.
        share: of the images that 'val' gets; both get at least one.
    """

    def rank(image: Any) -> float:
        name = str(image.get("file_name") if isinstance(image, dict) else image)
        data = unicodedata.normalize("NFC", name).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64

    ordered = sorted(content["images"], key=rank)
    count = sum(rank(image) < share for image in ordered)
    count = min(max(count, 1), max(len(ordered) - 1, 0))
    chosen = {id(image) for image in ordered[:count]}
    val = [image for image in content["images"] if id(image) in chosen]
    train = [image for image in content["images"] if id(image) not in chosen]

    def id_in(entry: Any, field: str) -> int | None:
        stated = entry.get(field) if isinstance(entry, dict) else None
        return stated if isinstance(stated, int) else None

    ids = {id_in(image, "id") for image in val} - {None}
    parts: tuple[list[Any], list[Any]] = [], []
    for annotation in content["annotations"]:
        parts[id_in(annotation, "image_id") in ids].append(annotation)
    return {
        "train": content | {"images": train, "annotations": parts[0]},
        "val": content | {"images": val, "annotations": parts[1], "problems": []},
    }


def _names(content: Content) -> set[str]:
    return {str(image.get("file_name")) for image in content["images"] if isinstance(image, dict)}
