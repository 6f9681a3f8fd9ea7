"""What is wrong with each detection: the six kinds of error of TIDE.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020,
arXiv 2008.08115, section 2.2. Where several kinds apply, the order is that of the authors' program:
localization, class, duplicate, background, both.
"""

from typing import NamedTuple

import numpy as np

from gfl_jax.data.images import box_iou

FOREGROUND = 0.5
"""IoU from which a detection has found an object; t_f in the paper."""
BACKGROUND = 0.1
"""IoU up to which a detection is on no object; t_b in the paper."""

KINDS = ("correct", "class", "localization", "both", "duplicate", "background", "ignored")
CORRECT, CLASS, LOCALIZATION, BOTH, DUPLICATE, ON_BACKGROUND, IGNORED = range(7)


class Objects(NamedTuple):
    """The annotated objects of an image.

    Attributes:
        boxes: [m, 4], x1 y1 x2 y2 in pixels.
        labels: int [m].
        crowd: bool [m], regions of many objects: what is on them counts neither way.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


class Judged(NamedTuple):
    """What is right and wrong about the n detections and m objects of an image.

    Attributes:
        kind: int [n], of each detection, index into `KINDS`.
        truth: int [n], the object that it found, or that it would have found without its error, or
            that it overlaps most; -1: it overlaps none.
        iou: [n], with that object.
        iou_of_class: [n], with the closest object of its class: what GFL's score predicts.
        found: int [m], the detection that found each object; -1: none, and of crowds.
        missed: bool [m], not found, nor by a detection with an error of class or localization.
    """

    kind: np.ndarray
    truth: np.ndarray
    iou: np.ndarray
    iou_of_class: np.ndarray
    found: np.ndarray
    missed: np.ndarray


def judge(objects: Objects, boxes: np.ndarray, labels: np.ndarray) -> Judged:
    """Matches detections with objects as COCO does at IoU 0.5, and names the errors.

    Args:
        objects: of the image.
        boxes: [n, 4], x1 y1 x2 y2 in pixels, by descending score.
        labels: int [n].
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    # A column for no object, so that images without objects are no special case.
    truths = np.concatenate([np.asarray(objects.boxes, float).reshape(-1, 4), np.zeros((1, 4))])
    single = np.append(~objects.crowd, True)
    same = np.asarray(labels)[:, None] == np.append(objects.labels, -1)
    all_iou = box_iou(boxes[:, None], truths)
    iou = np.where(single, all_iou, 0)

    found = np.full(len(truths), -1)
    match = np.full(len(boxes), -1)
    for detection, row in enumerate(np.where(same, iou, 0)):
        row = np.where(found < 0, row, 0)
        if row.max() >= FOREGROUND:
            match[detection] = row.argmax()
            found[match[detection]] = detection

    own, other = np.where(same, iou, 0), np.where(same, 0, iou)
    on_crowd = (_covered(boxes, truths) * (same & ~single)).max(1) >= FOREGROUND
    wrong = {
        CORRECT: match >= 0,
        IGNORED: on_crowd,
        LOCALIZATION: (own.max(1) >= BACKGROUND) & (own.max(1) <= FOREGROUND),
        CLASS: other.max(1) >= FOREGROUND,
        DUPLICATE: own.max(1) >= FOREGROUND,
        ON_BACKGROUND: iou.max(1) <= BACKGROUND,
    }
    kind = np.select(list(wrong.values()), list(wrong), BOTH).astype(int)
    nearest = np.select(
        [kind == CORRECT, (kind == LOCALIZATION) | (kind == DUPLICATE), kind == CLASS],
        [match, own.argmax(1), other.argmax(1)],
        iou.argmax(1),
    )
    nearest_iou = iou[np.arange(len(boxes)), nearest]
    nearly = nearest[(kind == LOCALIZATION) | (kind == CLASS)]
    missed = (found < 0) & single & ~np.isin(np.arange(len(truths)), nearly)
    truth = np.where(nearest_iou > 0, nearest, -1)
    return Judged(kind, truth, nearest_iou, own.max(1), found[:-1], missed[:-1])


def _covered(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """The share of each box that lies in each region, [boxes, regions]."""
    low = np.maximum(boxes[:, None, :2], regions[:, :2])
    high = np.minimum(boxes[:, None, 2:], regions[:, 2:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None]
    return np.maximum(high - low, 0).prod(2) / np.maximum(areas, 1e-6)
