"""The numbers of a report, by hotcoco, whose AP is that of pycocotools."""

import contextlib
import io
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gfl_jax.coco_eval import METRICS
from gfl_jax.errors import needs
from gfl_jax.tools.report.errors import FOREGROUND

IOUS = (0.5, 0.75, 0.9)
"""IoU thresholds of the precision-recall curves."""

SIZES = (0, 16, 32, 64, 96, 192, 384, math.inf)
"""Square roots of areas in pixels; COCO's small, medium and large change at 32 and 96."""

ASPECTS = (0, 1 / 4, 1 / 2, 4 / 5, 5 / 4, 2, 4, math.inf)
"""Width / height."""


class ClassNumbers(NamedTuple):
    """A class: AP is -1 without objects.

    Attributes:
        name: of it.
        objects: how many there are, without crowds.
        ap: averaged over IoUs from 0.5 to 0.95.
        ap50: at IoU 0.5.
        ap75: at IoU 0.75.
        precision: [101] at the recalls 0, 0.01, ..., 1 and IoU 0.5.
    """

    name: str
    objects: int
    ap: float
    ap50: float
    ap75: float
    precision: np.ndarray


class Slice(NamedTuple):
    """The objects of a range of sizes or aspect ratios.

    Attributes:
        low: end of the range.
        high: end of the range.
        objects: how many there are, without crowds.
        ap: of them alone: other objects, and detections of other sizes on no object, do not count.
        ap50: the same at IoU 0.5.
    """

    low: float
    high: float
    objects: int
    ap: float
    ap50: float


class Numbers(NamedTuple):
    """What is said about all images together.

    Attributes:
        metrics: COCO's twelve, by the names of `METRICS`.
        classes: in the order of the category ids.
        precision: [IOUS, 101], means over the classes.
        calibration: (mean score, share correct at IoU 0.5, detections) of each bin of scores.
        calibration_error: mean distance of the two, weighted by the detections.
        sizes: by the square root of the area.
        aspects: by width / height.
    """

    metrics: dict[str, float]
    classes: list[ClassNumbers]
    precision: np.ndarray
    calibration: list[tuple[float, float, int]]
    calibration_error: float
    sizes: list[Slice]
    aspects: list[Slice]


def numbers_of(truth: dict[str, Any], results: list[dict[str, Any]]) -> Numbers:
    """Everything but what is said about single detections.

    Args:
        truth: images, annotations and categories as in COCO's format.
        results: detections as COCO results.

    Raises:
        MissingExtraError: hotcoco is not installed.
    """
    evaluator = _evaluator(truth, results)
    evaluator.evaluate()
    evaluator.accumulate()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.summarize()
    precision = evaluator.eval["precision"][..., 0, -1]  # IoUs, recalls, classes
    at = [round(20 * (iou - 0.5)) for iou in IOUS]
    singles = [entry["category_id"] for entry in truth["annotations"] if not entry["iscrowd"]]
    classes = [
        ClassNumbers(
            category["name"],
            singles.count(category["id"]),
            _average(precision[:, :, k]),
            _average(precision[0, :, k]),
            _average(precision[5, :, k]),
            precision[0, :, k],
        )
        for k, category in enumerate(sorted(truth["categories"], key=lambda c: c["id"]))
    ]
    known = precision[:, :, precision[0, 0] > -1]
    curves = known[at].mean(2) if known.size else np.zeros((len(IOUS), precision.shape[1]))
    calibration = evaluator.calibration(10, FOREGROUND)
    bins = [(b["avg_confidence"], b["avg_accuracy"], b["count"]) for b in calibration["bins"]]
    return Numbers(
        dict(zip(METRICS, map(float, evaluator.stats), strict=True)),
        classes,
        curves,
        [b for b in bins if b[2]],
        calibration["ece"],
        slices(truth, results, SIZES, lambda entry: math.sqrt(_area(entry))),
        slices(truth, results, ASPECTS, _aspect),
    )


def confusion(
    truth: dict[str, Any], results: list[dict[str, Any]], score_threshold: float
) -> np.ndarray:
    """How many objects of each class are detected as which, at IoU 0.5.

    Args:
        truth: as for `numbers_of`.
        results: COCO results, without those on crowds, which would count as background.
        score_threshold: least score of the detections that count.

    Returns:
        int [k + 1, k + 1]: annotated and detected class; the last is background.
    """
    evaluator = _evaluator(truth, results)
    return evaluator.confusion_matrix(FOREGROUND, min_score=score_threshold)["matrix"].astype(int)


def slices(
    truth: dict[str, Any], results: list[dict[str, Any]], edges: Sequence[float], value: Any
) -> list[Slice]:
    """AP of the objects in each range of a value, as COCO does for three ranges of area.

    Args:
        truth: as for `numbers_of`.
        results: detections as COCO results.
        edges: of the ranges, ascending.
        value: of an annotation or a detection.

    Returns:
        The ranges that have objects. An object on an edge is in the upper one.
    """
    # The value stands where COCO's area does, so that its rules apply unchanged.
    entries = [{**entry, "area": value(entry)} for entry in truth["annotations"]]
    found = [
        {**result, "id": number, "area": value(result), "iscrowd": 0}
        for number, result in enumerate(results, start=1)
    ]
    evaluator = _evaluator({**truth, "annotations": entries}, found, loaded=False)
    # Without the number just below the upper edge, COCO would count an object on it twice.
    ranges = [[low, np.nextafter(high, 0)] for low, high in itertools.pairwise(edges)]
    evaluator.params.areaRng = [[0, math.inf], *ranges]
    evaluator.params.areaRngLbl = ["all", *map(str, range(len(ranges)))]
    evaluator.evaluate()
    evaluator.accumulate()
    precision = evaluator.eval["precision"][..., -1]
    values = np.array([entry["area"] for entry in entries if not entry["iscrowd"]])
    counts = [int(((values >= low) & (values <= high)).sum()) for low, high in ranges]
    return [
        Slice(*pair, count, _average(precision[:, :, :, i]), _average(precision[0, :, :, i]))
        for i, (pair, count) in enumerate(zip(itertools.pairwise(edges), counts, strict=True), 1)
        if count
    ]


def _evaluator(truth: dict[str, Any], results: list[dict[str, Any]], loaded: bool = True) -> Any:
    """Hotcoco's counterpart of COCOeval; `loaded`: the results' areas are those of the boxes."""
    with needs("report"):
        import hotcoco
    objects = hotcoco.COCO(truth)
    found = objects.loadRes(results) if loaded else hotcoco.COCO({**truth, "annotations": results})
    return hotcoco.COCOeval(objects, found, "bbox")


def _average(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _area(entry: dict[str, Any]) -> float:
    width, height = entry["bbox"][2:]
    return max(entry.get("area", width * height), 0.0)


def _aspect(entry: dict[str, Any]) -> float:
    width, height = entry["bbox"][2:]
    return max(width, 1e-6) / max(height, 1e-6)
