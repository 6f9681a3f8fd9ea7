"""What each kind of error costs in AP: how much AP50 rises if it is mended, after TIDE.

Bolya et al., arXiv 2008.08115, section 2.3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gfl_jax.tools.report import errors
from gfl_jax.tools.report.errors import Judged

RECALLS = np.linspace(0, 1, 101)


class Detected(NamedTuple):
    """The detections and objects of an image with what is right and wrong about them.

    Attributes:
        judged: what is said of them.
        scores: [n].
        labels: int [n].
        truth_labels: int [m].
        crowd: bool [m].
    """

    judged: Judged
    scores: np.ndarray
    labels: np.ndarray
    truth_labels: np.ndarray
    crowd: np.ndarray


class Cost(NamedTuple):
    """A kind of error.

    Attributes:
        number: how many detections, or for missed objects how many objects.
        ap: by how much AP50 rises without them. The costs of all kinds do not add up.
    """

    number: int
    ap: float


def costs(images: Sequence[Detected], classes: int) -> dict[str, Cost]:
    """The cost of the six kinds of error, by name.

    A detection with an error of class or localization becomes correct if its object has not been
    found and no other such detection of the object has a higher score, or else is left out, as are
    those of the other kinds; missed objects are not counted.

    Args:
        images: all of them.
        classes: how many there are.
    """
    ends = np.cumsum([len(image.truth_labels) for image in images])
    kind, score, label = (
        _joined(part)
        for part in zip(*((i.judged.kind, i.scores, i.labels) for i in images), strict=True)
    )
    target = _joined(
        [
            np.where(image.judged.truth < 0, -1, image.judged.truth + end - len(image.truth_labels))
            for image, end in zip(images, ends, strict=True)
        ]
    )
    truth, found, missed, crowd = (
        _joined(part)
        for part in zip(
            *((i.truth_labels, i.judged.found >= 0, i.judged.missed, i.crowd) for i in images),
            strict=True,
        )
    )
    order = np.argsort(-score, kind="stable")
    order = order[kind[order] != errors.IGNORED]
    kind, label, target = kind[order], label[order], target[order]
    objects = np.bincount(truth[~crowd], minlength=classes)

    def ap(rows: np.ndarray, correct: np.ndarray, labels: np.ndarray, n: np.ndarray) -> float:
        values = [average_precision(correct[rows & (labels == c)], n[c]) for c in np.flatnonzero(n)]
        return float(np.mean(values)) if values else 0.0

    correct, everything = kind == errors.CORRECT, np.ones(len(kind), bool)
    before = ap(everything, correct, label, objects)
    result = {}
    nearly = np.flatnonzero((kind == errors.CLASS) | (kind == errors.LOCALIZATION))
    nearly = nearly[~found[target[nearly]]]
    best = nearly[np.unique(target[nearly], return_index=True)[1]]  # the first: the best score
    for number in (errors.CLASS, errors.LOCALIZATION):
        mended = np.isin(np.arange(len(kind)), best) & (kind == number)
        renamed = np.where(mended, truth[target], label) if len(truth) else label
        after = ap((kind != number) | mended, correct | mended, renamed, objects)
        result[errors.KINDS[number]] = Cost(int((kind == number).sum()), after - before)
    for number in (errors.BOTH, errors.DUPLICATE, errors.ON_BACKGROUND):
        after = ap(kind != number, correct, label, objects)
        result[errors.KINDS[number]] = Cost(int((kind == number).sum()), after - before)
    rest = objects - np.bincount(truth[missed], minlength=classes)
    after = ap(everything, correct, label, rest)
    return result | {"missed": Cost(int(missed.sum()), after - before)}


def average_precision(correct: np.ndarray, objects: int) -> float:
    """COCO's AP at one IoU: the mean over 101 recalls of the best precision from there on.

    Args:
        correct: bool [n], of the detections of a class by descending score.
        objects: of the class.
    """
    right = np.cumsum(correct)
    precision = right / np.arange(1, len(right) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(right / objects, RECALLS, side="left")
    return float(np.append(precision, 0)[place].mean())


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.asarray(parts[0]).dtype), *parts])
