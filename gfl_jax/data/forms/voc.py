"""Pascal VOC: an XML file an image, in `Annotations`; images in `JPEGImages`, lists in `ImageSets`.

Also as other programs write it: all XML files in one folder, or beside their images in folders
named train, valid and test.
"""

import posixpath
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from gfl_jax.data.forms.said import Found, ImageFiles, Saying, text_of, walked
from gfl_jax.data.forms.xml_lines import line_of, number, read_xml
from gfl_jax.errors import InputError

NAME = "Pascal VOC"
LISTS = ("train", "val", "trainval", "test", "valid", "validation")

_ONE_BASED = re.compile(r"VOC ?20\d\d", re.I)
_ROOT = re.compile(rb"<annotation[\s>]")


def found(root: Path) -> list[str]:
    """The annotation files of this form in a folder, relative to it."""
    files = walked(root, (".xml",))
    inside = [file for file in files if "Annotations" in file.split("/")[:-1]] or files
    return inside if any(_is_voc(root / file) for file in inside[:20]) else []


def _is_voc(file: Path) -> bool:
    with open(file, "rb") as opened:
        return bool(_ROOT.search(opened.read(4096).replace(b"\0", b"")))


def read(root: Path, files: list[str], images: str = "") -> Found:
    """Reads a data set.

    Args:
        root: its folder.
        files: those of `found`.
        images: folder of the images, relative to the root; empty: looked for.
    """
    saying = Saying(ImageFiles(root))
    listed = _listed(root)
    for file in files:
        stem = posixpath.basename(file)[:-4]
        parts = [part.lower() for part in file.split("/")[:-1]]
        lists = {name for name, stems in listed.items() if stem in stems}
        lists |= set() if listed else {part for part in parts if part in LISTS}
        if listed and not lists:
            saying.notes["annotation files in none of the lists: left out"] += 1
            continue
        try:
            _read_file(saying, root / file, file, lists, images)
        except (OSError, ValueError) as error:
            saying.problem("unreadable annotation file", file, str(error), lists)
    known = {posixpath.basename(file)[:-4] for file in files}
    for name, stems in listed.items():
        for stem, line in stems.items():
            if stem not in known:
                place = f"ImageSets/Main/{name}.txt, line {line}"
                saying.problem("missing annotation file", place, f"there is no {stem}.xml", {name})
    return Found(root, root, saying.lists_by_name(), saying.conclusion())


def _listed(root: Path) -> dict[str, dict[str, int]]:
    """The images of each list in ImageSets, without their endings, and the line of each."""
    lists: dict[str, dict[str, int]] = {}
    for file in walked(root, (".txt",)):
        *folders, name = file.split("/")
        if name[:-4] in LISTS and folders[-1:] in (["Main"], ["ImageSets"]):
            try:
                lines = text_of(root / file).splitlines()
            except (OSError, ValueError) as error:
                raise InputError(f"{root / file}: {error}") from error
            lists.setdefault(name[:-4], {}).update(
                (re.sub(r"\.(jpe?g|png|xml)$", "", line.strip(), flags=re.I), number)
                for number, line in enumerate(lines, start=1)
                if line.strip()
            )
    return lists


def _read_file(saying: Saying, path: Path, file: str, lists: set[str], images: str) -> None:
    """Reads the objects of an image; raises ValueError if the file cannot be used at all."""
    tree = read_xml(path)
    if tree.tag != "annotation":
        raise ValueError(f"its outermost element is <{tree.tag}>, not <annotation>")
    folder = posixpath.dirname(file)
    above = posixpath.dirname(folder)
    near = [images] if images else [posixpath.join(above, "JPEGImages"), folder]
    near += [] if images else [posixpath.join(above, "images"), above]
    stated = (tree.findtext("filename") or "").strip()
    stem = posixpath.basename(file)[:-4]
    name = saying.files.find(stem, near, by_stem=True) or saying.files.find(stated, near)
    if name is None:
        detail = f"no image {stem}.jpg, .png, ... and none called {stated!r}, or several"
        saying.problem("missing image file", file, detail, lists)
        return
    size = tree.find("size")
    try:
        height, width = int(number(size, "height")), int(number(size, "width"))
    except (ValueError, OverflowError):
        height = width = 0  # then the file says it
    image_id = saying.image(name, (height, width), file, lists)
    if image_id is None:
        return
    one_based = any(_ONE_BASED.search(text or "") for text in _texts(tree.find("source")))
    for entry in tree.findall("object"):
        place = f"{file}, {line_of(entry)}"
        label = (entry.findtext("name") or "").strip()
        if not label:
            saying.problem("no class", place, "an <object> without <name>", lists)
            continue
        try:
            box = entry.find("bndbox")
            corners = [number(box, side) for side in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError as error:
            saying.problem("bad box", place, str(error), lists)
            continue
        if one_based:
            corners = [corners[0] - 1, corners[1] - 1, *corners[2:]]
        difficult = (entry.findtext("difficult") or "0").strip() == "1"
        saying.box(image_id, label, corners, place, ignore=int(difficult))


def _texts(element: ET.Element | None) -> list[str]:
    return [] if element is None else [child.text or "" for child in element]
