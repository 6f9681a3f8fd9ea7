"""How much an AP varies if the images are drawn again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gfl_jax.errors import needs
from gfl_jax.tools.report.costs import RECALLS

CONFIDENCE = 0.95


class Matched(NamedTuple):
    """The detections of a class on all images, by descending score.

    Attributes:
        images: int [n], index of the image of each.
        correct: bool [IoUs, n].
        counts: bool [IoUs, n], those on crowds do not.
        objects: int [images], how many the class has in each.
    """

    images: np.ndarray
    correct: np.ndarray
    counts: np.ndarray
    objects: np.ndarray


def matched(truth: dict[str, Any], results: list[dict[str, Any]]) -> list[Matched]:
    """The detections of each class with objects, matched as COCO does at its ten IoUs.

    Args:
        truth: images, annotations and categories as in COCO's format.
        results: detections as COCO results.

    Raises:
        MissingExtraError: hotcoco is not installed.
    """
    with needs("report"):
        import hotcoco
    objects = hotcoco.COCO(truth)
    evaluator = hotcoco.COCOeval(objects, objects.loadRes(results), "bbox")
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluator.evaluate()
    places = {image["id"]: place for place, image in enumerate(truth["images"])}
    by_class: dict[int, list[Any]] = {category["id"]: [] for category in truth["categories"]}
    for entry in evaluator.eval_imgs:
        if entry:
            by_class[entry["category_id"]].append(entry)
    classes = []
    for entries in by_class.values():
        count = np.zeros(len(places), int)
        for entry in entries:
            count[places[entry["image_id"]]] = np.sum(~np.array(entry["gtIgnore"], bool))
        if not count.any():
            continue
        sizes = [len(entry["dtScores"]) for entry in entries]
        order = np.argsort(-np.concatenate([e["dtScores"] for e in entries]), kind="stable")
        images = np.repeat([places[entry["image_id"]] for entry in entries], sizes)[order]
        correct, ignored = (
            np.concatenate([np.array(e[key], bool).reshape(10, -1) for e in entries], 1)[:, order]
            for key in ("dtMatched", "dtIgnore")
        )
        classes.append(Matched(images, correct & ~ignored, ~ignored, count))
    return classes


def average_precisions(classes: list[Matched], weights: np.ndarray) -> np.ndarray:
    """COCO's AP at its ten IoUs if each image occurs as often as its weight says.

    Args:
        classes: of all images.
        weights: int [images].

    Returns:
        [10], means over the classes that then have objects; -1 if none has.
    """
    values = []
    for entry in classes:
        objects = weights @ entry.objects
        if not objects:
            continue
        times = weights[entry.images]
        right = np.cumsum(entry.correct * times, 1)
        precision = right / np.maximum(np.cumsum(entry.counts * times, 1), 1)
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        values.append(
            [
                np.append(best, 0)[np.searchsorted(recall, RECALLS, side="left")].mean()
                for recall, best in zip(right / objects, precision, strict=True)
            ]
        )
    return np.mean(values, 0) if values else np.full(10, -1.0)


class Difference(NamedTuple):
    """How much the second of two detectors is better.

    Attributes:
        value: second minus first.
        low: end of the interval of `CONFIDENCE`.
        high: end of the interval.
    """

    value: float
    low: float
    high: float

    @property
    def real(self) -> bool:
        """Whether it is more than chance: the interval does not hold 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def differences(
    first: list[Matched], second: list[Matched], images: int, resamples: int, seed: int = 0
) -> dict[str, Difference]:
    """How much the second detector is better in AP, AP50 and AP75.

    The interval is of the percentile bootstrap over images, both detectors on the same draws (Efron
    and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        first: what `matched` says of the first.
        second: of the second, on the same images.
        images: how many there are.
        resamples: how often they are drawn again.
        seed: of these draws.
    """

    def difference(weights: np.ndarray) -> np.ndarray:
        return average_precisions(second, weights) - average_precisions(first, weights)

    found = _bootstrap(difference, images, resamples, seed)
    return {name: Difference(*entry) for name, entry in found.items()}


def intervals(
    classes: list[Matched], images: int, resamples: int, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """AP, AP50 and AP75 of one detector, each with both ends of its interval of `CONFIDENCE`.

    Args:
        classes: what `matched` says of it.
        images: how many there are.
        resamples: how often they are drawn again.
        seed: of these draws.
    """
    return _bootstrap(lambda weights: average_precisions(classes, weights), images, resamples, seed)


def _bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], images: int, resamples: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """A statistic at ten IoUs as AP, AP50 and AP75: its value and its percentile interval."""

    def three(weights: np.ndarray) -> list[float]:
        by = statistic(weights)
        return [by.mean(), by[0], by[5]]

    rng, values = np.random.default_rng(seed), []
    for _ in tqdm(range(resamples), desc="bootstrap", unit=" draws", leave=False):
        drawn = rng.integers(images, size=images)
        values.append(three(np.bincount(drawn, minlength=images)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail], axis=0)
    columns = np.stack([three(np.ones(images, int)), low, high], 1).tolist()
    return {
        name: (v, a, b) for name, (v, a, b) in zip(("AP", "AP50", "AP75"), columns, strict=True)
    }
