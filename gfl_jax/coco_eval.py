"""COCO evaluation: pycocotools judges, against the annotations that preparing kept."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gfl_jax.data.records import FLAGGED, PreparedSplit

METRICS = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")
"""pycocotools' twelve numbers, in its order. -1 where there is nothing to measure."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """metrics: by the names of METRICS.  per_class: name to AP and AP50, -1 if it has no box."""

    metrics: dict[str, float]
    per_class: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        rows = [f"{name:>6} {value:.3f}" for name, value in self.metrics.items()]
        lines = ["  ".join(rows[start : start + 6]) for start in (0, 6)]
        return "\n".join(lines)

    def class_table(self) -> str:
        """One line a class, by descending AP; classes without boxes last."""
        width = max(len(name) for name in self.per_class)
        ranked = sorted(self.per_class.items(), key=lambda item: -item[1][0])
        lines = [f"{'class':<{width}}     AP   AP50"]
        for name, values in ranked:
            cells = (f"{value:6.3f}" if value >= 0 else "     -" for value in values)
            lines.append(f"{name:<{width}} {' '.join(cells)}")
        return "\n".join(lines)


def ground_truth(split: PreparedSplit) -> COCO:
    """The annotations that preparing kept; those of the records where there is no json."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        if split.annotations:
            coco.dataset = json.loads(split.annotations.read_text())
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


def evaluate(results: list[dict[str, Any]], truth: COCO, image_ids: Iterable[int]) -> Evaluation:
    """Pycocotools' bbox evaluation of COCO results on these images."""
    with contextlib.redirect_stdout(io.StringIO()):
        # Copies, since pycocotools adds fields.
        detections = truth.loadRes([dict(result) for result in results]) if results else COCO()
        if not results:
            detections.dataset = {**truth.dataset, "annotations": []}
            detections.createIndex()
        judge = COCOeval(truth, detections, "bbox")
        judge.params.imgIds = sorted(image_ids)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"]  # IoU thresholds, recalls, classes, areas, detections
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}

    def average(values: np.ndarray) -> float:
        known = values[values > -1]
        return float(known.mean()) if known.size else -1.0

    per_class = {
        names[category]: (average(precision[:, :, k, 0, -1]), average(precision[0, :, k, 0, -1]))
        for k, category in enumerate(judge.params.catIds)
    }
    return Evaluation(dict(zip(METRICS, map(float, judge.stats), strict=True)), per_class)
