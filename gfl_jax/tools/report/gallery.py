"""The pictures of a report: images with their objects and detections, as data for the page."""

import base64
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from gfl_jax.detectors.sides import Sides, spread
from gfl_jax.results import Result
from gfl_jax.tools.report.errors import Judged, Objects

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Probabilities of positions, relative to the largest, are written as one of these each."""

STATES = ("crowd", "found", "nearly", "missed")
"""Of an object; nearly: a detection on it has the wrong class or too little IoU."""


def entry_of(
    name: str, result: Result, objects: Objects, judged: Judged, score_threshold: float
) -> dict[str, Any]:
    """What the page knows about an image; `page.js` reads it.

    Args:
        name: of the file.
        result: the detections.
        objects: of the image.
        judged: what is right and wrong about both.
        score_threshold: least score of the detections that are shown.

    Returns:
        name, size (width, height), objects: [x1, y1, x2, y2, label, index into `STATES`, score of
        the detection that found it or 0], and detections: [x1, y1, x2, y2, label, score, kind,
        object or -1, IoU], and of each its sides or null.
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
    height, width = result.image.shape[:2]
    return {
        "name": name,
        "size": [width, height],
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


def thumbnail(image: np.ndarray, longest: int) -> bytes:
    """A JPEG of an image that is at most so many pixels wide and high."""
    scale = min(1, longest / max(image.shape[:2]))
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(
        ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82]
    )[1]
    return encoded.tobytes()


def data_url(jpeg: bytes) -> str:
    """A picture that stands in the page itself."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    return np.asarray(values, np.float64).round(1).tolist()
