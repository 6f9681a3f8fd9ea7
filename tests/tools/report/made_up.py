"""Made-up annotations and detections with every kind of error."""

import numpy as np

from gfl_jax.tools.report.costs import Detected
from gfl_jax.tools.report.errors import Objects, judge


def made_up(seed, images=12, classes=3, crowd=0.15):
    """Objects and detections with every kind of error, crowds and all sizes."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 7)):
            box = np.array([*rng.uniform(0, 300, 2), *np.exp(rng.uniform(1.5, 5.5, 2))])
            label = int(rng.integers(1, classes + 1))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3] * rng.uniform(0.5, 1)),
                    "iscrowd": int(rng.random() < crowd),
                }
            )
            for _ in range(rng.integers(0, 4)):
                noise = rng.normal(size=4) * rng.uniform(0, 0.35) * np.tile(box[2:], 2)
                moved = box + noise
                moved[2:] = np.maximum(moved[2:], 1)
                wrong = rng.random() > 0.7
                category = int(rng.integers(1, classes + 1)) if wrong else label
                results.append((image, category, moved.tolist()))
        for _ in range(rng.integers(0, 3)):
            box = [*rng.uniform(0, 300, 2), *rng.uniform(5, 100, 2)]
            results.append((image, int(rng.integers(1, classes + 1)), box))
    truth = {
        "images": [{"id": image, "width": 400, "height": 400} for image in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in range(1, classes + 1)],
    }
    scores = rng.permutation(len(results)) / len(results)
    keys = ("image_id", "category_id", "bbox", "score")
    rows = zip(results, scores.tolist(), strict=True)
    return truth, [dict(zip(keys, (*row, score), strict=True)) for row, score in rows]


def detected(truth, results):
    """What is right and wrong about each image; labels are category ids less 1."""
    images = []
    for image in truth["images"]:
        own = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        found = [result for result in results if result["image_id"] == image["id"]]
        found.sort(key=lambda result: -result["score"])
        (boxes, labels), (found_boxes, found_labels) = map(_boxes_and_labels, (own, found))
        crowd = np.array([entry["iscrowd"] for entry in own], bool)
        judged = judge(Objects(boxes, labels, crowd), found_boxes, found_labels)
        scores = np.array([result["score"] for result in found])
        images.append(Detected(judged, scores, found_labels, labels, crowd))
    return images


def _boxes_and_labels(entries):
    boxes = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, np.array([entry["category_id"] - 1 for entry in entries], int)
