"""What the files of a data set say, put together as COCO jsons would say it."""

import collections
import dataclasses
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gfl_jax.data.coco_format import STATED_IN, Problem
from gfl_jax.data.images import SUFFIXES, image_size

Content = dict[str, Any]
"""What a COCO json says: `images`, `annotations`, `categories`; and `problems` found on the way."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A data set in one of the forms.

    Attributes:
        file: the file or folder that says where the objects are, for messages.
        folder: that names of image files are relative to.
        lists: what a COCO json of each list of images would say; "" where there are no lists.
        notes: what else was noticed, one sentence each.
    """

    file: Path
    folder: Path
    lists: dict[str, Content]
    notes: Sequence[str] = ()


class ImageFiles:
    """The image files of a folder and of those in it, found by what annotations call them."""

    def __init__(self, folder: Path):
        """Takes the folder, in which nothing is looked up yet."""
        self.folder = folder
        self._by_name: dict[str, list[str]] | None = None

    def find(self, name: str, near: Iterable[str] = (), by_stem: bool = False) -> str | None:
        r"""The path of an image file relative to the folder; None: there is none, or several.

        Args:
            name: a path or file name in an annotation, with / or \.
            near: folders, relative to the folder, that are looked into first.
            by_stem: whether the name has no ending such as .jpg.
        """
        name = name.replace("\\", "/")
        for place in ("", *near):
            if not by_stem and name and os.path.isfile(self.folder / place / name):
                return os.path.normpath(os.path.join(place, name)).replace(os.sep, "/")
        if self._by_name is None:
            self._by_name = collections.defaultdict(list)
            for path in walked(self.folder, SUFFIXES):
                file = path.rpartition("/")[2]
                self._by_name[normal(file)].append(path)
                self._by_name[normal(file.rpartition(".")[0]) + "."].append(path)
        wanted = normal(name).split("/")
        found = self._by_name.get(wanted[-1] + "." * by_stem, [])

        def agreement(path: str) -> tuple[bool, int]:
            """How many folders of the path are those of the name, from the last on."""
            folders = normal(path).split("/")[:-1]
            pairs = zip(reversed(folders), reversed(wanted[:-1]), strict=False)
            count = next((i for i, (a, b) in enumerate(pairs) if a != b), len(wanted) - 1)
            return path.rpartition("/")[0] in near, count

        best = max(map(agreement, found), default=(False, 0))
        found = [path for path in found if agreement(path) == best]
        return found[0] if len(found) == 1 else None

    def sizes(self, names: Iterable[str]) -> dict[str, tuple[int, int] | str]:
        """(height, width) in pixels of upright images; of a broken one, what is wrong with it."""

        def size(name: str) -> tuple[int, int] | str:
            try:
                return image_size((self.folder / name).read_bytes(), name)
            except (OSError, ValueError) as error:
                return str(error).removeprefix(f"{name}: ")

        names = list(dict.fromkeys(names))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(names, pool.map(size, names), strict=True))


class Saying:
    """Collects images, boxes and problems of a data set, list by list.

    Attributes:
        files: the image files.
        notes: what else was noticed, with how often; see `conclusion`.
    """

    def __init__(self, files: ImageFiles):
        """Begins with nothing."""
        self.files = files
        self._problems: list[tuple[Problem, frozenset[str]]] = []
        self.notes: collections.Counter[str] = collections.Counter()
        self._images: dict[str, dict[str, Any]] = {}
        self._lists: dict[int, set[str]] = collections.defaultdict(set)
        self._boxes: list[dict[str, Any]] = []

    def problem(self, kind: str, place: str, detail: str, lists: Iterable[str] = ()) -> None:
        """Something is wrong, and left out.

        Args:
            kind: of problem; they are counted by it.
            place: where it is: file and line.
            detail: what is wrong.
            lists: that are concerned; empty: all.
        """
        self._problems.append((Problem(kind, place, None, None, detail), frozenset(lists)))

    def image(
        self, name: str, size: tuple[int, int] | None, place: str, lists: Iterable[str]
    ) -> int | None:
        """Adds an image, or further lists of one that is known.

        Args:
            name: of its file, relative to the folder.
            size: (height, width) in pixels; None: read from the file.
            place: where it is stated: file and line.
            lists: that it is in.

        Returns:
            Its id. None if its size is to be read and cannot be: that is a problem.
        """
        if name not in self._images:
            if not size or min(size) <= 0:
                read = self.files.sizes([name])[name]
                if isinstance(read, str):
                    self.problem("broken image file", name, read, lists)
                    return None
                size = read
            entry = {"id": len(self._images) + 1, "file_name": name, STATED_IN: place}
            self._images[name] = entry | {"height": int(size[0]), "width": int(size[1])}
        image_id = self._images[name]["id"]
        self._lists[image_id] |= set(lists)
        return image_id

    @property
    def count(self) -> int:
        """Number of objects so far."""
        return len(self._boxes)

    def box(
        self, image_id: int, label: str | int, corners: Sequence[float], place: str, ignore: int = 0
    ) -> None:
        """Adds an object.

        Args:
            image_id: of its image.
            label: its class, by name or id.
            corners: x1, y1, x2, y2 in pixels.
            place: where it is stated: file and line.
            ignore: 1 if it is not to be found.
        """
        x1, y1, x2, y2 = corners
        entry = {"id": len(self._boxes) + 1, "image_id": image_id, "category_id": label}
        bbox = [x1, y1, x2 - x1, y2 - y1]
        self._boxes.append(entry | {"bbox": bbox, "ignore": ignore, STATED_IN: place})

    def lists_by_name(self, classes: Iterable[str] = ()) -> dict[str, Content]:
        """What a COCO json of each list would say, where objects have the names of classes.

        Args:
            classes: in the order in which they are numbered, from 1; others follow by the alphabet.
        """
        names = [*classes]
        names += sorted({box["category_id"] for box in self._boxes} - {*names})
        ids = {name: i for i, name in enumerate(names, start=1)}
        self._boxes = [box | {"category_id": ids[box["category_id"]]} for box in self._boxes]
        return self.lists({i: name for name, i in ids.items()})

    def lists(self, classes: Mapping[int, str]) -> dict[str, Content]:
        """What a COCO json of each list would say, where objects have the ids of classes.

        Args:
            classes: name of each class id.
        """
        categories = [{"id": i, "name": name} for i, name in classes.items()]
        names = sorted(set().union(*self._lists.values())) or [""]
        if alone := sum(not lists for lists in self._lists.values() if names != [""]):
            self.notes["images in none of the lists: left out"] += alone
        contents: dict[str, Content] = {}
        for name in names:
            chosen = {i for i, lists in self._lists.items() if not name or name in lists}
            contents[name] = {
                "images": [image for image in self._images.values() if image["id"] in chosen],
                "annotations": [box for box in self._boxes if box["image_id"] in chosen],
                "categories": categories,
                "problems": [p for p, lists in self._problems if not lists or name in lists],
            }
        return contents

    def conclusion(self) -> list[str]:
        """The notes, with how often each was made."""
        return [f"{count} {note}" for note, count in self.notes.items()]


def walked(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """Sorted paths, relative to a folder, of files in it and below with one of these endings.

    Files and folders that begin with a dot or with __ (as in archives made by macOS) are left out.
    """
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        inside = os.path.relpath(place, folder)
        found += [
            os.path.normpath(os.path.join(inside, name)).replace(os.sep, "/")
            for name in files
            if name.lower().endswith(tuple(suffixes)) and not name.startswith(".")
        ]
    return sorted(found)


def normal(name: str) -> str:
    """A name by which two that differ only in case or in how an accent is written are equal."""
    return unicodedata.normalize("NFC", name).casefold()


def enclosing(points: Sequence[Sequence[float]]) -> list[float]:
    """x1, y1, x2, y2 of the upright box around some points (x, y)."""
    x, y = zip(*points, strict=True)
    return [min(x), min(y), max(x), max(y)]


def turned(box: Sequence[float], degrees: float, around: Sequence[float]) -> list[float]:
    """The upright box around a box, x1, y1, x2, y2, turned clockwise around a point (x, y)."""
    if not degrees:
        return list(box)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x1, y1, x2, y2 = box
    moved = [(x - around[0], y - around[1]) for x in (x1, x2) for y in (y1, y2)]
    return enclosing(
        [(around[0] + x * cos - y * sin, around[1] + x * sin + y * cos) for x, y in moved]
    )


def text_of(file: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        ValueError: it is neither.
    """
    data = file.read_bytes()
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not a text in UTF-8 ({error.reason}): save it as UTF-8") from error
