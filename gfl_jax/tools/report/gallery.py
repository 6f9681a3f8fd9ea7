"""The pictures of a report: images with their objects and detections, as data for the page."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np

from gfl_jax.detectors.sides import Sides, spread
from gfl_jax.paths import write, writing
from gfl_jax.results import Result
from gfl_jax.tools.report.errors import Judged, Objects

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Probabilities of positions, relative to the largest, are written as one of these each."""

EMBEDDED = 300
"""Of so many images the pictures are in the page itself; of more they lie in a folder beside it."""

STATES = ("crowd", "found", "nearly", "missed")
"""Of an object; nearly: a detection on it has the wrong class or too little IoU."""


def entry_of(
    result: Result, objects: Objects, judged: Judged, score_threshold: float
) -> dict[str, Any]:
    """What the page knows about the detections on an image; `page.js` reads it.

    Args:
        result: the detections.
        objects: of the image.
        judged: what is right and wrong about both.
        score_threshold: least score of the detections that are shown.

    Returns:
        objects: [x1, y1, x2, y2, label, index into `STATES`, score of the detection that found it
        or 0]; detections: [x1, y1, x2, y2, label, score, kind, object or -1, IoU]; and the sides
        of each, if known.
    """
    state = np.select([objects.crowd, judged.found >= 0, ~judged.missed], [0, 1, 2], 3)
    scores = np.append(result.scores, 0)[judged.found]
    shown = result.above(score_threshold)
    detections = [
        [*_rounded(box), int(label), round(float(score), 3), int(kind), int(truth), iou]
        for box, label, score, kind, truth, iou in zip(
            shown.boxes,
            shown.labels,
            shown.scores,
            judged.kind,
            judged.truth,
            judged.iou.round(3).tolist(),
            strict=False,  # the best ones, of all
        )
    ]
    return {
        "objects": [
            [*_rounded(box), int(label), int(s), round(float(score), 3)]
            for box, label, s, score in zip(
                objects.boxes, objects.labels, state, scores, strict=True
            )
        ],
        "detections": detections,
        "sides": sides_of(shown.sides) if shown.sides else [],
    }


def sides_of(sides: Sides) -> list[list[Any]]:
    """The distributions of detections for the page; none for boxes that are four numbers.

    Returns:
        Of each detection the first and last position of each side, since positions are evenly
        spaced, the four standard deviations, and the probabilities as `DIGITS`.
    """
    positions, probabilities = map(np.asarray, sides)
    if positions.shape[-1] < 2:
        return []
    relative = probabilities / probabilities.max(-1, keepdims=True)
    digits = np.array(list(DIGITS))[(63 * relative).round().astype(int)]
    ends = positions[..., [0, -1]].reshape(len(positions), 8)
    return [
        [_rounded(end), _rounded(deviation), "".join(text.ravel())]
        for end, deviation, text in zip(ends, spread(sides), digits, strict=True)
    ]


class Pictures:
    """Keeps the pictures of a page: of few images in the page itself, else in a folder beside it.

    Attributes:
        images: of each its name, size (width, height) and the address of its picture.
    """

    def __init__(self, page: Path, names: Sequence[str], longest: int):
        """Nothing yet.

        Args:
            page: the file of the page.
            names: of all images, in order.
            longest: most pixels of a picture's width and height.
        """
        self.images: list[dict[str, Any]] = []
        self._names, self._longest = names, longest
        self._folder = page.with_name(f"{page.stem}_pictures") if len(names) > EMBEDDED else None
        with writing(page):
            (self._folder or page.parent).mkdir(parents=True, exist_ok=True)

    def keep(self, image: np.ndarray) -> None:
        """Keeps the next image; uint8 RGB [height, width, 3]."""
        number, (height, width) = len(self.images), image.shape[:2]
        jpeg = thumbnail(image, self._longest)
        address = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        if self._folder:
            write(self._folder / f"{number:06}.jpg", jpeg)
            address = f"{quote(self._folder.name)}/{number:06}.jpg"
        size = [width, height]
        self.images.append({"name": self._names[number], "size": size, "picture": address})

    def beside(self, *versions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The images with what `entry_of` says of each detector."""
        each = zip(self.images, *versions, strict=True)
        return [image | {"versions": entries} for image, *entries in each]


def thumbnail(image: np.ndarray, longest: int) -> bytes:
    """A JPEG of an image that is at most so many pixels wide and high."""
    scale = min(1, longest / max(image.shape[:2]))
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82]
    )[1]
    return encoded.tobytes()


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return np.asarray(values, np.float64).round(1).tolist()
