"""CVAT for images 1.1: one XML file; images in `images`, if they were exported with it."""

import posixpath
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection
from pathlib import Path

from gfl_jax.data.forms.said import Found, ImageFiles, Saying, enclosing, turned, walked
from gfl_jax.data.forms.xml_lines import line_of, number, read_xml
from gfl_jax.errors import InputError

NAME = "CVAT"

_ROOT = re.compile(rb"<annotations[\s>]")


def found(root: Path) -> list[str]:
    """The annotation files of this form in a folder, relative to it."""
    files = [file for file in walked(root, (".xml",)) if file.count("/") < 2]
    return [f for f in files if not f.startswith("Annotations/") and _is_cvat(root / f)]


def _is_cvat(file: Path) -> bool:
    with open(file, "rb") as opened:
        return bool(_ROOT.search(opened.read(4096)))


def read(root: Path, files: list[str], images: str = "") -> Found:
    """Reads a data set; subsets of a project are its lists.

    Args:
        root: its folder.
        files: those of `found`.
        images: folder of the images, relative to the root; empty: looked for.

    Raises:
        InputError: a file cannot be used at all.
    """
    saying = Saying(ImageFiles(root))
    classes: dict[str, None] = {}
    for file in files:
        try:
            tree = read_xml(root / file)
        except (OSError, ValueError) as error:
            raise InputError(f"{root / file}: {error}") from error
        if (track := tree.find("track")) is not None:
            raise InputError(
                f"{root / file}, {line_of(track)}: this is 'CVAT for video'; export the task again "
                "as 'CVAT for images 1.1'"
            )
        names = [(name.text or "").strip() for name in tree.iterfind(".//labels/label/name")]
        classes |= dict.fromkeys(name for name in names if name)
        for image in tree.iterfind("image"):
            _read_image(saying, file, image, images, classes)
    return Found(root / files[0], root, saying.lists_by_name(classes), saying.conclusion())


def _read_image(
    saying: Saying, file: str, image: ET.Element, images: str, classes: Collection[str]
) -> None:
    place = f"{file}, {line_of(image)}"
    subset, stated = image.get("subset", ""), image.get("name", "")
    lists = {subset.lower()} if subset else set()
    folder = posixpath.dirname(file)
    usual = [posixpath.join(folder, p) for p in (f"images/{subset}", "images", subset, ".")]
    near = [posixpath.normpath(place) for place in ([images] if images else usual)]
    name = saying.files.find(stated, near)
    if name is None:
        detail = f"there is no image {stated!r} below {saying.files.folder}, or several"
        saying.problem("missing image file", place, detail, lists)
        return
    try:
        size = int(number(image, "height")), int(number(image, "width"))
    except (ValueError, OverflowError):
        size = None
    image_id = saying.image(name, size, place, lists)
    if image_id is None:
        return
    for shape in image:
        if shape.tag in ("tag", "attribute"):  # of the whole image
            continue
        place, label = f"{file}, {line_of(shape)}", shape.get("label", "").strip()
        try:
            corners = _corners(shape)
        except ValueError as error:
            saying.problem("bad box", place, str(error), lists)
            continue
        if corners is None:
            detail = f"<{shape.tag}> of {label!r} has no box; remove it, or draw a rectangle"
            saying.problem("not a box", place, detail, lists)
        elif not label:
            saying.problem("no class", place, f"<{shape.tag}> without label", lists)
        elif classes and label not in classes:
            detail = f"label {label!r}; the task has {', '.join(classes)}"
            saying.problem("unknown category", place, detail, lists)
        else:
            if shape.tag != "box" or float(shape.get("rotation", 0)):
                saying.notes["shapes other than upright boxes: the box around each is taken"] += 1
            saying.box(image_id, label, corners, place)


def _corners(shape: ET.Element) -> list[float] | None:
    """x1, y1, x2, y2 in pixels of a shape; None for those that have no extent.

    Raises:
        ValueError: a number is missing or none.
    """
    turn = number(shape, "rotation") if "rotation" in shape.attrib else 0.0
    if shape.tag == "box":
        x1, y1, x2, y2 = (number(shape, side) for side in ("xtl", "ytl", "xbr", "ybr"))
        return turned((x1, y1, x2, y2), turn, ((x1 + x2) / 2, (y1 + y2) / 2))
    if shape.tag == "polygon":
        points = shape.get("points", "")
        try:
            return enclosing([(float(x), float(y)) for x, y in _pairs(points)])
        except ValueError:
            raise ValueError(f"points is {points[:40]!r}: it must be x,y;x,y;...") from None
    if shape.tag == "ellipse":
        x, y, rx, ry = (number(shape, name) for name in ("cx", "cy", "rx", "ry"))
        return turned((x - rx, y - ry, x + rx, y + ry), turn, (x, y))
    if shape.tag == "mask":
        x, y, w, h = (number(shape, name) for name in ("left", "top", "width", "height"))
        return [x, y, x + w, y + h]
    return None


def _pairs(points: str) -> list[list[str]]:
    return [point.split(",") for point in points.split(";")]
