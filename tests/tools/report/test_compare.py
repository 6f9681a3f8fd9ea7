"""Two detectors on the same images: the interval of the difference, and the page."""

import numpy as np
import pytest
from made_up import made_up

pytest.importorskip("hotcoco")

from gfl_jax.tools.report.bootstrap import average_precisions, differences, intervals, matched
from gfl_jax.tools.report.numbers import numbers_of


def rescored(results, noise, seed=1):
    rng = np.random.default_rng(seed)
    moved = (float(np.clip(r["score"] + noise * rng.normal(), 0, 1)) for r in results)
    return [result | {"score": score} for result, score in zip(results, moved, strict=True)]


def drawn_again(truth, results, drawn):
    """The images that were drawn, each as often as it was, as if they were different ones."""
    images, annotations, found = [], [], []
    for number, image in enumerate(drawn, start=1):
        images.append({"id": number})
        for entry in truth["annotations"]:
            if entry["image_id"] == image:
                new = {"id": len(annotations) + 1, "image_id": number}
                annotations.append(entry | new)
        found += [r | {"image_id": number} for r in results if r["image_id"] == image]
    return truth | {"images": images, "annotations": annotations}, found


def by(truth, first, second, resamples=200, seed=0):
    pair = (matched(truth, results) for results in (first, second))
    return differences(*pair, len(truth["images"]), resamples, seed)


def test_differences_are_those_of_the_metrics():
    truth, first = made_up(3, images=30)
    second = rescored(first, 0.2)
    one, other = (numbers_of(truth, results).metrics for results in (first, second))
    found = by(truth, first, second, resamples=5)
    assert list(found) == ["AP", "AP50", "AP75"]
    for name, difference in found.items():
        assert difference.value == pytest.approx(other[name] - one[name], abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_weights_are_images_that_occur_so_often(seed):
    truth, results = made_up(seed, images=20)
    drawn = np.random.default_rng(seed).integers(20, size=20)
    found = average_precisions(matched(truth, results), np.bincount(drawn, minlength=20))
    expected = numbers_of(*drawn_again(truth, results, drawn + 1)).metrics
    assert expected["AP"] > 0
    assert found.mean() == pytest.approx(expected["AP"], abs=1e-12)
    assert found[[0, 5]] == pytest.approx([expected["AP50"], expected["AP75"]], abs=1e-12)


def test_a_detector_does_not_differ_from_itself():
    truth, results = made_up(3, images=30)
    ap = by(truth, results, results)["AP"]
    assert ap == (0, 0, 0)
    assert not ap.real


def test_a_detector_that_finds_more_is_better_by_more_than_chance():
    truth, _ = made_up(3, images=60)
    every = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for entry in truth["annotations"]
    ]
    ap = by(truth, every[::2], every)["AP"]
    assert ap.real and 0 < ap.low < ap.value < ap.high
    worse = by(truth, every, every[::2])["AP"]
    assert worse.real and worse.high < 0


@pytest.mark.slow
def test_noise_alone_is_mostly_within_the_interval():
    """Of two equally good detectors one is taken for better in about one case of twenty."""
    wrong = 0
    for seed in range(40):
        truth, results = made_up(seed, images=25)
        wrong += by(truth, rescored(results, 0.2, 1), rescored(results, 0.2, 2), 100)["AP"].real
    assert wrong <= 7  # more than 7 of 40 at 5% each: a probability of 0.0008


def test_the_same_seed_gives_the_same_interval():
    truth, first = made_up(3, images=30)
    second = rescored(first, 0.2)
    one, same, other = (by(truth, first, second, 50, seed)["AP"] for seed in (1, 1, 2))
    assert one == same
    assert one.low != other.low


def test_the_interval_of_an_ap_is_that_of_its_difference_from_none():
    truth, results = made_up(3, images=30)
    images = len(truth["images"])
    alone = intervals(matched(truth, results), images, 50, seed=3)
    nothing = matched(truth, results[:0])
    assert alone == differences(nothing, matched(truth, results), images, 50, seed=3)
    value, low, high = alone["AP"]
    assert value == pytest.approx(numbers_of(truth, results).metrics["AP"])
    assert low < value < high


def test_there_may_be_no_detections():
    truth, results = made_up(3, images=30)
    ap = by(truth, [], results)["AP"]
    assert ap.value == pytest.approx(numbers_of(truth, results).metrics["AP"])
