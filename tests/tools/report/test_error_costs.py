"""What errors cost is what AP rises by without them."""

import numpy as np
import pytest
from made_up import detected, made_up

from gfl_jax.tools.report.costs import average_precision, costs

TIDE = {
    "class": "Cls",
    "localization": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}


@pytest.mark.parametrize("seed", range(8))
def test_without_crowds_counts_and_costs_are_those_of_hotcoco(seed):
    """Hotcoco takes a crowd for an object that could have been found; the authors do not."""
    hotcoco = pytest.importorskip("hotcoco")
    truth, results = made_up(seed, crowd=0)
    objects = hotcoco.COCO(truth)
    evaluator = hotcoco.COCOeval(objects, objects.loadRes(results), "bbox")
    evaluator.evaluate()
    expected = evaluator.tide_errors(0.5, 0.1)
    found = costs(detected(truth, results), 3)
    for kind, name in TIDE.items():
        assert found[kind].number == expected["counts"][name]
        assert found[kind].ap == pytest.approx(expected["delta_ap"][name], abs=1e-9)
    assert sum(cost.number > 0 for cost in found.values()) == 6
    assert sum(cost.ap > 0 for cost in found.values()) >= 5


def test_the_cost_of_an_error_is_the_ap_without_it():
    """One class, four objects of which one is found; the rest is mended one kind at a time."""

    def box(x, width=100):
        return [x, 0, width, 100]

    truth = {
        "images": [{"id": 1, "width": 2000, "height": 200}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box(300 * i), "area": 1e4}
            | {"iscrowd": 0}
            for i in range(4)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    detections = [(1, box(1500), 0.9), (1, box(0), 0.8), (1, box(360), 0.7), (2, box(600), 0.6)]
    results = [
        {"image_id": 1, "category_id": category, "bbox": place, "score": score}
        for category, place, score in detections
    ]
    found = costs(detected(truth, results), 2)
    assert {name: cost.number for name, cost in found.items()} == {
        "class": 1,
        "localization": 1,
        "both": 0,
        "duplicate": 0,
        "background": 1,
        "missed": 1,
    }
    # By hand, of 101 recalls: found at rank 2 of 4 objects, 26 recalls (0 to 0.25).
    before = 26 * (1 / 2) / 101
    mended = {
        "background": 26 / 101,  # found at rank 1
        "localization": 51 * (2 / 3) / 101,  # found at ranks 2 and 3 of 3
        "class": (26 * 0.5 + 25 * 0.5) / 101,  # found at ranks 2 and 4 of 4
        "missed": 34 * (1 / 2) / 101,  # of 3 objects: recalls 0 to 0.33
    }
    for name, ap in mended.items():
        assert found[name].ap == pytest.approx(ap - before, abs=1e-9), name


def test_average_precision_is_the_best_precision_from_each_recall_on():
    # Precisions 1, 1/2, 2/3 at the recalls 1/2, 1/2, 1.
    found = average_precision(np.array([True, False, True]), 2)
    assert found == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    assert average_precision(np.zeros(0, bool), 5) == 0


def test_without_detections_everything_is_missed():
    truth, _ = made_up(0)
    found = costs(detected(truth, []), 3)
    assert found["missed"].number == sum(not entry["iscrowd"] for entry in truth["annotations"])
    assert sum(cost.number for cost in found.values()) == found["missed"].number
