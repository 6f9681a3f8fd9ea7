"""YOLO: a text file of shares an image. Classes in data.yaml, classes.txt or obj.names."""

import math
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gfl_jax.data.forms.said import Found, ImageFiles, Saying, enclosing, text_of, walked
from gfl_jax.data.images import SUFFIXES
from gfl_jax.errors import InputError

NAME = "YOLO"
LISTS = ("train", "val", "test")
CLASSES = ("classes.txt", "obj.names")


def found(root: Path) -> list[str]:
    """The file that names the classes, relative to a folder."""
    yamls = [file for file in walked(root, (".yaml", ".yml")) if file.count("/") < 2]
    with_names = [file for file in yamls if "\nnames:" in "\n" + _text(root / file)]
    texts = [file for file in walked(root, CLASSES) if posixpath.basename(file) in CLASSES]
    return with_names or texts


def read(root: Path, files: list[str], images: str = "") -> Found:
    """Reads a data set.

    Args:
        root: its folder.
        files: those of `found`.
        images: folder of the images, relative to the root; empty: as data.yaml says.

    Raises:
        InputError: the classes are not stated, or a list of images does not exist.
    """
    if len(files) > 1:
        raise InputError(f"{root} has several lists of classes: {', '.join(files)}; keep one")
    file = root / files[0]
    stated = _yaml(file) if file.suffix in (".yaml", ".yml") else _darknet(file)
    saying = Saying(ImageFiles(root))
    entries = {"": images} if images else {n: stated[n] for n in (*LISTS, "") if stated.get(n)}
    if "valid" in stated and "val" not in entries:
        entries["val"] = stated["valid"]
    names: dict[str, set[str]] = {}
    places: dict[str, str] = {}
    for name, entry in entries.items():
        for image, place in _images(saying, file, stated.get("path", ""), name, entry):
            names.setdefault(image, set()).update({name} - {""})
            places.setdefault(image, place)
    sizes = saying.files.sizes(names)
    labelled = 0
    for image, lists in names.items():
        label_file = _label_file(image)
        size = sizes[image]
        if isinstance(size, str):
            saying.problem("broken image file", image, size, lists)
            continue
        image_id = saying.image(image, size, places[image], lists)
        assert image_id is not None
        if os.path.isfile(root / label_file):
            labelled += 1
            _read_file(saying, root / label_file, label_file, image_id, size, lists, stated)
        else:
            saying.notes["images without a label file: taken to show no objects"] += 1
    if names and not labelled:
        first = next(iter(names))
        raise InputError(
            f"{file}: none of its {len(names)} images has a label file; that of {first} would be "
            f"{_label_file(first)}: `labels` instead of `images`, .txt at the end"
        )
    _unused(saying, root, names)
    classes = dict(sorted(stated["names"].items()))
    return Found(file, root, saying.lists(classes), saying.conclusion())


def _text(file: Path) -> str:
    try:
        return text_of(file)
    except (OSError, ValueError):
        return ""


def _yaml(file: Path) -> dict[str, Any]:
    """What data.yaml says; all of it text, so that a class may be called `no` or 007.

    Raises:
        InputError: it is not valid, or does not name the classes.
    """
    try:
        stated = yaml.load(text_of(file), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    names = stated.get("names") if isinstance(stated, dict) else None
    try:
        pairs = names.items() if isinstance(names, dict) else enumerate(names)  # type: ignore[arg-type]
        numbered = {int(i): name for i, name in pairs}
        if isinstance(names, str) or not all(isinstance(name, str) for name in numbered.values()):
            raise TypeError
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{file}: `names` must be a list of the classes, or their names by number (0: cat)"
        ) from error
    count = stated.get("nc", str(len(numbered)))
    if count != str(len(numbered)):
        raise InputError(f"{file}: `nc` is {count}, but `names` has {len(numbered)} classes")
    return stated | {"names": numbered}


def _darknet(file: Path) -> dict[str, Any]:
    """The same of a list of classes, one a line, with the lists of images that lie beside it."""
    try:
        lines = [line.strip() for line in text_of(file).splitlines()]
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error
    while lines and not lines[-1]:
        lines.pop()
    beside = {n: f"{n}.txt" for n in LISTS if (file.parent / f"{n}.txt").is_file()}
    if not beside and (file.parent / "images").is_dir():
        beside = {"": "images"}
    return {"names": dict(enumerate(lines)), **(beside or {"": "."})}


def _images(
    saying: Saying, file: Path, path: str, name: str, entry: Any
) -> Iterator[tuple[str, str]]:
    """Yields images of a list, relative to the root, and where each is listed.

    Args:
        saying: takes problems.
        file: data.yaml, for messages.
        path: its `path`, which need not exist: data sets are copied.
        name: of the list.
        entry: a folder, a text file of images, or a list of these.

    Raises:
        InputError: there is no such folder or file.
    """
    root = saying.files.folder
    for part in entry if isinstance(entry, list) else [entry]:
        if not isinstance(part, str):
            raise InputError(f"{file}: `{name}` must be a folder, a text file, or a list of these")
        part = part.replace("\\", "/")
        shorter = part
        while shorter.startswith("../"):  # as some exporters write what lies beside data.yaml
            shorter = shorter[3:]
        bases = [file.parent / path, file.parent, root]
        places = [base / spelling for spelling in (part, shorter) for base in bases]
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise InputError(
                f"{file}: `{name}` is {part}, but there is no {places[0]}"
                + (f" and no {places[1]}" if path else "")
            )
        if place.is_dir():
            inside = _relative(place, root)
            for image in walked(place, SUFFIXES):
                yield posixpath.normpath(posixpath.join(inside, image)), inside
            continue
        listing = _relative(place, root)
        for number, line in enumerate(text_of(place).splitlines(), start=1):
            if wanted := line.strip():
                known = saying.files.find(wanted, [posixpath.dirname(listing)])
                where = f"{listing}, line {number}"
                if known is None:
                    detail = f"there is no image {wanted}, or several of this name"
                    saying.problem("missing image file", where, detail, {name})
                else:
                    yield known, where


def _relative(path: Path, root: Path) -> str:
    return os.path.relpath(path, root).replace(os.sep, "/")


def _label_file(image: str) -> str:
    """labels/a.txt of images/a.jpg; the last folder called `images` counts. Else a.txt beside."""
    folders, name = image.split("/")[:-1], image.rpartition("/")[2]
    for i in reversed(range(len(folders))):
        if folders[i] == "images":
            folders[i] = "labels"
            break
    return "/".join([*folders, name.rpartition(".")[0] + ".txt"])


def _read_file(
    saying: Saying,
    path: Path,
    file: str,
    image_id: int,
    size: tuple[int, int],
    lists: set[str],
    stated: dict[str, Any],
) -> None:
    """Reads the objects of an image; shares are of its upright width and height."""
    try:
        lines = text_of(path).splitlines()
    except (OSError, ValueError) as error:
        saying.problem("unreadable annotation file", file, str(error), lists)
        return
    lines_of_objects = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
    before = saying.count
    for number, line in lines_of_objects:
        place = f"{file}, line {number}"
        try:
            label, *values = map(_number, line.split())
            label_id, corners = _box(label, values, "kpt_shape" in stated)
        except ValueError as error:
            saying.problem("bad line", place, f"{error}: {line.strip()[:60]!r}", lists)
            continue
        if label_id not in stated["names"]:
            named = ", ".join(map(str, sorted(stated["names"]))) or "none"
            detail = f"class {label_id} has no name; those with names are {named}"
            saying.problem("unknown category", place, detail, lists)
            continue
        if len(values) > 4 and "kpt_shape" not in stated:
            saying.notes["polygons: the upright box around each is taken"] += 1
        scale = (size[1], size[0]) * 2
        pixels = [share * side for share, side in zip(corners, scale, strict=True)]
        saying.box(image_id, label_id, pixels, place)
    if lines_of_objects and saying.count == before:
        saying.notes["images of whose labels none can be used: left without objects"] += 1


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number such as 0.5") from None


def _box(label: float, values: list[float], keypoints: bool) -> tuple[int, list[float]]:
    """The class and x1, y1, x2, y2 as shares; raises ValueError if a line makes no sense."""
    if label != label or math.isinf(label) or label != int(label) or label < 0:
        raise ValueError("a line begins with the number of the class")
    if not all(map(math.isfinite, values)):
        raise ValueError("numbers must be finite")
    if max(values, default=0) > 2:
        raise ValueError(
            "numbers above 1: shares of the image's width and height are needed, not pixels"
        )
    if len(values) == 4 or (keypoints and len(values) > 4):
        x, y, w, h = values[:4]
        return int(label), [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    if len(values) < 6 or len(values) % 2:
        raise ValueError(
            f"{len(values)} numbers after the class: a box has 4, a polygon 2 for each of its 3 or "
            "more corners"
        )
    return int(label), enclosing(list(zip(values[::2], values[1::2], strict=True)))


def _unused(saying: Saying, root: Path, names: dict[str, set[str]]) -> None:
    """Label files of images that no list has: of missing ones they are a problem."""
    used = {_label_file(image) for image in names}
    folders = {posixpath.dirname(file) for file in used}
    for file in walked(root, (".txt",)):
        folder, name = posixpath.dirname(file), posixpath.basename(file)
        if "labels" not in folder.split("/") or folder not in folders or file in used:
            continue
        if name not in CLASSES and saying.files.find(name[:-4], by_stem=True) is None:
            saying.problem("missing image file", file, "labels of an image that is not there")
