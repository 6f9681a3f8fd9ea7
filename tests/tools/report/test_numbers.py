"""The numbers are pycocotools' and what hand-made cases say."""

import contextlib
import io
import itertools
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

pytest.importorskip("hotcoco")

from made_up import detected, made_up

from gfl_jax.tools.report.errors import CORRECT, IGNORED
from gfl_jax.tools.report.numbers import ASPECTS, METRICS, SIZES, confusion, numbers_of, slices


def pycocotools(truth, results, value=None, edges=()):
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO()
        objects.dataset = json.loads(json.dumps(truth))
        objects.createIndex()
        found = objects.loadRes([dict(result) for result in results])
        evaluator = COCOeval(objects, found, "bbox")
        if value:
            for entry in (*objects.anns.values(), *found.anns.values()):
                entry["area"] = value(entry)
            ranges = [[a, np.nextafter(b, 0)] for a, b in itertools.pairwise(edges)]
            evaluator.params.areaRng = [[0, np.inf], *ranges]
            evaluator.params.areaRngLbl = ["all", *map(str, range(len(ranges)))]
        evaluator.evaluate()
        evaluator.accumulate()
        if not value:
            evaluator.summarize()
    return evaluator


@pytest.mark.parametrize("seed", range(8))
def test_ap_is_that_of_pycocotools(seed):
    truth, results = made_up(seed)
    expected = pycocotools(truth, results)
    numbers = numbers_of(truth, results)
    np.testing.assert_array_equal([numbers.metrics[name] for name in METRICS], expected.stats)
    precision = expected.eval["precision"][:, :, :, 0, 2]
    np.testing.assert_allclose(
        [entry.ap for entry in numbers.classes], precision.mean((0, 1)), atol=1e-12
    )
    np.testing.assert_allclose(
        [entry.ap75 for entry in numbers.classes], precision[5].mean(0), atol=1e-12
    )
    np.testing.assert_allclose(numbers.precision, precision[[0, 5, 8]].mean(2), atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("edges", [SIZES, ASPECTS])
def test_slices_are_pycocotools_with_other_ranges(seed, edges):
    def value(entry):
        width, height = entry["bbox"][2:]
        return width / height if edges == ASPECTS else (width * height) ** 0.5

    truth, results = made_up(seed)
    expected = pycocotools(truth, results, value, edges).eval["precision"]
    found = slices(truth, results, edges, value)
    assert len(found) > 4
    for part in found:
        precision = expected[:, :, :, 1 + edges.index(part.low), 2]
        known = precision[precision > -1]
        np.testing.assert_allclose(part.ap, known.mean(), atol=1e-12)
    singles = sum(not entry["iscrowd"] for entry in truth["annotations"])
    assert sum(part.objects for part in found) == singles


@pytest.mark.parametrize("seed", range(4))
def test_calibration_is_the_share_of_correct_detections(seed):
    truth, results = made_up(seed)
    rows = [
        np.stack([image.scores, image.judged.kind == CORRECT], 1)[image.judged.kind != IGNORED]
        for image in detected(truth, results)
    ]
    scores, correct = np.concatenate(rows).T
    numbers = numbers_of(truth, results)
    assert sum(count for *_, count in numbers.calibration) == len(scores)
    gaps = 0
    for place, (score, share, count) in enumerate(numbers.calibration):
        inside = np.floor(scores * 10) == place
        assert count == inside.sum()
        np.testing.assert_allclose(score, scores[inside].mean(), atol=1e-6)
        np.testing.assert_allclose(share, correct[inside].mean(), atol=1e-6)
        gaps += count * abs(scores[inside].mean() - correct[inside].mean())
    np.testing.assert_allclose(numbers.calibration_error, gaps / len(scores), atol=1e-6)


def test_the_confusion_matrix_counts_objects_by_what_they_were_taken_for():
    boxes = [[300 * i, 0, 100, 100] for i in range(3)]
    truth = {
        "images": [{"id": 7, "width": 2000, "height": 200}],
        "annotations": [
            {"id": i + 1, "image_id": 7, "category_id": 3 + 2 * (i > 0), "bbox": box, "area": 1e4}
            | {"iscrowd": 0}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    }
    detections = [(3, boxes[0], 0.9), (3, boxes[1], 0.8), (5, boxes[2], 0.1), (5, boxes[0], 0.2)]
    results = [
        {"image_id": 7, "category_id": category, "bbox": box, "score": score}
        for category, box, score in [*detections, (5, [1500, 0, 50, 50], 0.5)]
    ]
    found = confusion(truth, results, 0.3)
    # Found: a cat; a dog as a cat; the other dog scores too little; a dog where nothing is.
    assert found.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]


def test_there_may_be_no_detections_or_no_objects():
    truth, results = made_up(0)
    nothing = numbers_of(truth, [])
    assert nothing.metrics["AP"] == 0
    assert nothing.calibration == []
    empty = numbers_of({**truth, "annotations": []}, results)
    assert empty.metrics["AP"] == -1
    assert empty.sizes == empty.aspects == []
