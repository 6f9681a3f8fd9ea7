"""Label Studio: its JSON and JSON-MIN exports, with the images anywhere in the folder."""

import json
import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gfl_jax.data.forms.said import Found, ImageFiles, Saying, enclosing, text_of, turned, walked
from gfl_jax.data.images import SUFFIXES
from gfl_jax.errors import InputError

NAME = "Label Studio"

_UPLOADED = re.compile(r"^[0-9a-f]{8}-")
"""What Label Studio puts before the names of files that are uploaded."""

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What reading something else than numbers, texts, lists and objects in their places ends in."""


def found(root: Path) -> list[str]:
    """The exports of this form in a folder, relative to it."""
    return [f for f in walked(root, (".json",)) if f.count("/") < 2 and _tasks(root / f)]


def _tasks(file: Path) -> list[Any]:
    """The tasks of an export; empty: it is none."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
        tasks = json.loads(text_of(file)) if start.startswith(b"[") else []
    except (OSError, ValueError, RecursionError):
        return []
    known = [t for t in tasks[:20] if isinstance(t, dict) and ("data" in t or "lead_time" in t)]
    return tasks if known else []


def read(root: Path, files: list[str], images: str = "") -> Found:
    """Reads a data set; of several annotations of an image, the newest that was not cancelled.

    Args:
        root: its folder.
        files: those of `found`.
        images: folder of the images, relative to the root; empty: the whole root is looked through.

    Raises:
        InputError: no task was annotated.
    """
    saying = Saying(ImageFiles(root))
    unlabelled = 0
    for file in files:
        for number, task in enumerate(_tasks(root / file), start=1):
            place = f"{file}, task {task.get('id', number) if isinstance(task, dict) else number}"
            try:
                results = _results(saying, task)
                if results is None:
                    unlabelled += 1
                else:
                    _read_task(saying, place, task, results, images)
            except MALFORMED as error:
                saying.problem("malformed task", place, _cannot_be_read(task, error))
    if unlabelled:
        saying.notes["tasks without an annotation: left out"] += unlabelled
    lists = saying.lists_by_name()
    if not any(content["images"] or content["problems"] for content in lists.values()):
        raise InputError(f"{root / files[0]}: none of its {unlabelled} tasks has an annotation")
    return Found(root / files[0], root, lists, saying.conclusion())


def _results(saying: Saying, task: Any) -> list[Any] | None:
    """The regions of a task; None: it was not annotated."""
    if not isinstance(task, dict):
        return None
    if "annotations" in task or "completions" in task:
        done = task.get("annotations", task.get("completions")) or []
        done = [d for d in done if isinstance(d, dict) and not d.get("was_cancelled")]
        if not done:
            return None
        if len(done) > 1:
            saying.notes["images with several annotations: the newest of each is taken"] += 1
        return max(done, key=lambda d: str(d.get("updated_at", ""))).get("result") or []
    regions = (v for v in task.values() if isinstance(v, list) and v and isinstance(v[0], dict))
    return next(regions, [])  # JSON-MIN


def _read_task(saying: Saying, place: str, task: Any, results: list[Any], images: str) -> None:
    data = task.get("data", task)
    texts = [v for v in data.values() if isinstance(v, str)] if isinstance(data, dict) else []
    named = [candidates for text in texts if (candidates := _candidates(text))]
    names = (saying.files.find(c, [images]) for candidates in named for c in candidates)
    name = next((name for name in names if name), None)
    if name is None:
        wanted = " or ".join(posixpath.basename(c) for c in named[0]) if named else "that it names"
        detail = f"there is no image {wanted} below {saying.files.folder}, or several: Label "
        saying.problem("missing image file", place, detail + "Studio exports the json alone")
        return
    sizes = [
        (r.get("original_height"), r.get("original_width")) for r in results if isinstance(r, dict)
    ]
    size: Any = next((s for s in sizes if all(isinstance(x, int) for x in s)), None)
    image_id = saying.image(name, size, place, ())
    if image_id is None:
        return
    if size is None:
        read = saying.files.sizes([name])[name] if results else (0, 0)
        size = read if not isinstance(read, str) else None
    for number, result in enumerate(results, start=1):
        try:
            _read_region(saying, f"{place}, region {number}", image_id, result, size)
        except MALFORMED as error:
            detail = _cannot_be_read(result, error)
            saying.problem("bad box", f"{place}, region {number}", detail)


def _cannot_be_read(entry: Any, error: Exception) -> str:
    missing = "no " if isinstance(error, KeyError) else ""
    return f"cannot be read ({missing}{error}): {str(entry)[:80]}"


def _candidates(text: str) -> list[str]:
    """The file names that a URL or path may stand for; empty: it is not of an image.

    /data/upload/1/0a1b2c3d-a.jpg, /data/local-files/?d=photos/a.jpg, s3://bucket/a.jpg, ...
    """
    url = urlsplit(text.replace("\\", "/"))
    path = parse_qs(url.query).get("d", [unquote(url.path)])[0].lstrip("/")
    if not path.lower().endswith(SUFFIXES):
        return []
    folder, name = posixpath.split(path)
    bare = _UPLOADED.sub("", name)
    return [path] if bare == name else [path, posixpath.join(folder, bare)]


def _read_region(
    saying: Saying, place: str, image_id: int, result: dict[str, Any], size: Any
) -> None:
    """Adds the objects of a region, stated in percent of the image's width and height."""
    value = result.get("value", result)
    labels = next((v for k, v in value.items() if k.endswith("labels")), None)
    kind = result.get("type", next((k for k in value if k.endswith("labels")), ""))
    if labels is None:
        if {"x", "y", "points"} & set(value):
            saying.problem("no class", place, f"a region of type {kind!r} without a label")
        return  # of the whole image: a choice, a text, a rating, ...
    if turn := result.get("image_rotation", 0):
        raise ValueError(f"the image was turned by {turn} degrees: turn the file and annotate it")
    height, width = size
    if "width" in value:
        x, y = value["x"] * width / 100, value["y"] * height / 100
        box = x, y, x + value["width"] * width / 100, y + value["height"] * height / 100
        corners = turned(box, value.get("rotation", 0), (x, y))
        upright = not value.get("rotation", 0)
    elif "points" in value and "vertices" not in value:
        corners = enclosing([(x * width / 100, y * height / 100) for x, y in value["points"]])
        upright = False
    elif "radiusX" in value:
        x, y = value["x"] * width / 100, value["y"] * height / 100
        rx, ry = value["radiusX"] * width / 100, value["radiusY"] * height / 100
        corners = turned((x - rx, y - ry, x + rx, y + ry), value.get("rotation", 0), (x, y))
        upright = False
    else:
        detail = f"a region of type {kind!r} has no box; remove it, or draw a rectangle"
        saying.problem("not a box", place, detail)
        return
    if not upright:
        saying.notes["shapes other than upright boxes: the box around each is taken"] += 1
    for label in labels:
        saying.box(image_id, str(label), corners, place)
