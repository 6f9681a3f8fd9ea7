"""COCO evaluation by pycocotools, against the annotations that preparing kept."""

import collections
import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gfl_jax.data.records import FLAGGED, PreparedSplit
from gfl_jax.errors import InputError

METRICS = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")
"""pycocotools' twelve numbers, in its order. -1 where there is nothing to measure."""


_COUNTED = 100
"""Detections of a class in an image that COCO's AP counts."""


class ClassAP(NamedTuple):
    """The AP and AP50 of a class, -1 if it has no box."""

    name: str
    ap: float
    ap50: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What pycocotools says of some detections.

    Attributes:
        metrics: by the names of METRICS.
        per_class: by category id, in the order of the class labels.
        note: a line on images with more objects than COCO counts; empty: there is none.
    """

    metrics: dict[str, float]
    per_class: dict[int, ClassAP]
    note: str = ""

    def __str__(self) -> str:
        rows = [f"{name:>6} {value:.3f}" for name, value in self.metrics.items()]
        lines = ["  ".join(rows[start : start + 6]) for start in (0, 6)]
        return "\n".join([*lines, self.note]).rstrip()

    def class_table(self) -> str:
        """One line a class, by descending AP; classes without boxes last."""
        times = collections.Counter(entry.name for entry in self.per_class.values())
        names = {
            i: entry.name + (f" (id {i})" if times[entry.name] > 1 else "")
            for i, entry in self.per_class.items()
        }
        width = max(map(len, names.values()))
        lines = [f"{'class':<{width}}     AP   AP50"]
        for i, entry in sorted(self.per_class.items(), key=lambda item: -item[1].ap):
            cells = (f"{value:6.3f}" if value >= 0 else "     -" for value in entry[1:])
            lines.append(f"{names[i]:<{width}} {' '.join(cells)}")
        return "\n".join(lines)


def ground_truth(split: PreparedSplit) -> COCO:
    """The annotations that preparing kept; those of the records where there is no json."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        if split.annotations:
            try:
                coco.dataset = json.loads(split.annotations.read_text())
            except ValueError as error:
                raise InputError(
                    f"{split.annotations} is damaged: copy or prepare the data set again"
                ) from error
        else:
            coco.dataset = _recorded(split)
        coco.createIndex()
    return coco


def _recorded(split: PreparedSplit) -> dict[str, Any]:
    table, ids = split.table, split.category_ids
    images = np.repeat(table.image_ids, np.diff(table.starts)).tolist()
    corners = table.boxes.tolist()
    labels = table.labels.tolist()
    crowds = (table.crowd | (table.rule == FLAGGED)).tolist()
    annotations = [
        {
            "id": number,
            "image_id": image_id,
            "category_id": ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": int(crowd),
        }
        for number, (image_id, (x1, y1, x2, y2), label, crowd) in enumerate(
            zip(images, corners, labels, crowds, strict=True), start=1
        )
    ]
    names = zip(ids, split.category_names, strict=True)
    return {
        "images": [{"id": image_id} for image_id in table.image_ids.tolist()],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in names],
    }


def evaluate(
    results: list[dict[str, Any]],
    truth: COCO,
    image_ids: Iterable[int],
    max_per_image: int = _COUNTED,
) -> Evaluation:
    """Pycocotools' bbox evaluation.

    Args:
        results: detections as COCO results.
        truth: the annotations to compare them with.
        image_ids: the images that count.
        max_per_image: detections that each may have.
    """
    image_ids = sorted(image_ids)
    (image_id, category), most = _fullest(truth, image_ids, "image_id", "category_id")
    (crowded,), objects = _fullest(truth, image_ids, "image_id")
    with contextlib.redirect_stdout(io.StringIO()):
        # Copies, since pycocotools adds fields.
        detections = truth.loadRes([dict(result) for result in results]) if results else COCO()
        if not results:
            detections.dataset = {**truth.dataset, "annotations": []}
            detections.createIndex()
        coco_eval = COCOeval(truth, detections, "bbox")
        coco_eval.params.imgIds = image_ids
        if most > _COUNTED and max_per_image > _COUNTED:
            coco_eval.params.maxDets = [*coco_eval.params.maxDets, max_per_image]
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    precision = coco_eval.eval["precision"]  # IoU thresholds, recalls, classes, areas, detections
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}

    def average(values: np.ndarray) -> float:
        known = values[values > -1]
        return float(known.mean()) if known.size else -1.0

    per_class = {
        i: ClassAP(names[i], average(precision[:, :, k, 0, 2]), average(precision[0, :, k, 0, 2]))
        for k, i in enumerate(coco_eval.params.catIds)
    }
    note = ""
    if most > _COUNTED:
        note = (
            f"COCO's AP counts {_COUNTED} detections of a class in an image, but image {image_id} "
            f"has {most} of {names[category]!r}"
        )
        if max_per_image > _COUNTED:
            ap = average(precision[:, :, :, 0, -1])
            note += f": with detector.inference.max_per_image {max_per_image} AP is {ap:.3f}"
        else:
            note += ": with a larger detector.inference.max_per_image that AP is shown as well"
    elif objects > max_per_image:
        note = (
            f"image {crowded} has {objects} objects, but a detector gives at most "
            f"{max_per_image} detections: raise detector.inference.max_per_image"
        )
    return Evaluation(dict(zip(METRICS, map(float, coco_eval.stats), strict=True)), per_class, note)


def _fullest(truth: COCO, image_ids: list[int], *fields: str) -> tuple[list[int], int]:
    """What the most objects in these images share in some fields, and how many they are."""
    known = set(image_ids)
    counts = collections.Counter(
        tuple(entry[field] for field in fields)
        for entry in truth.dataset["annotations"]
        if not entry["iscrowd"] and entry["image_id"] in known
    )
    nothing = (0,) * len(fields), 0
    shared, most = max(counts.items(), key=lambda item: item[1], default=nothing)
    return list(shared), most
