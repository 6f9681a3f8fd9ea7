"""Top-k and NMS against plain sorting and a plain greedy loop."""

import functools

import jax
import numpy as np
import pytest

from gfl_jax.detectors.inference import Inference, nms, top_pairs

_nms = jax.jit(nms, static_argnames="inference")
_top_pairs = jax.jit(top_pairs, static_argnames="k")


@pytest.mark.parametrize("k", [1, 7, 30, 119, 500])
def test_top_pairs_are_the_first_of_all_pairs_sorted(k):
    cells, classes = 30, 4
    rng = np.random.default_rng(k)
    scores = rng.permutation(cells * classes).reshape(cells, classes).astype(np.float32)
    scores[3] += 200  # several classes of one cell among the best
    order = np.argsort(-scores, axis=None)[:k]
    found, cell, label = map(np.asarray, _top_pairs(scores, k=k))
    np.testing.assert_array_equal(cell, order // classes)
    np.testing.assert_array_equal(label, order % classes)
    np.testing.assert_array_equal(found, scores[cell, label])


def test_top_pairs_of_equal_scores_are_distinct_pairs_of_the_best_scores():
    scores = np.random.default_rng(0).integers(0, 3, (30, 4)).astype(np.float32)
    found, cell, label = map(np.asarray, _top_pairs(scores, k=30))
    np.testing.assert_array_equal(found, np.sort(scores, axis=None)[::-1][:30])
    np.testing.assert_array_equal(found, scores[cell, label])
    assert len(set(zip(cell.tolist(), label.tolist(), strict=True))) == 30


def overlap(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    return width * height / (areas - width * height)


def nms_by_hand(boxes, scores, labels, inference):
    """Indices of the survivors, each class for itself."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):  # stable
        x1, y1, x2, y2 = map(float, boxes[i])
        if scores[i] <= 0 or x2 <= x1 or y2 <= y1:
            continue
        rivals = [j for j in kept if labels[j] == labels[i]]
        if all(overlap(boxes[i].tolist(), boxes[j].tolist()) <= inference.nms_iou for j in rivals):
            kept.append(i)
    return kept[: inference.max_per_image]


N = 80  # boxes: one shape, one compilation a rule
FEW = Inference(max_per_image=10)
ALL = Inference(max_per_image=100)


def check(boxes, scores, labels, inference):
    boxes, scores = np.asarray(boxes, np.float32), np.asarray(scores, np.float32)
    expected = nms_by_hand(boxes, scores, labels, inference)
    found = jax.tree.map(np.asarray, _nms(boxes, scores, labels, inference=inference))
    size = inference.max_per_image
    assert found.boxes.shape == (size, 4)
    assert found.scores.shape == found.labels.shape == found.mask.shape == (size,)
    np.testing.assert_array_equal(found.mask, np.arange(size) < len(expected))
    np.testing.assert_array_equal(found.boxes[found.mask], boxes[expected])
    np.testing.assert_array_equal(found.scores[found.mask], scores[expected])
    np.testing.assert_array_equal(found.labels[found.mask], np.asarray(labels)[expected])
    assert not found.boxes[~found.mask].any()
    assert not found.scores[~found.mask].any()
    return expected


def random_boxes(rng, side=(5, 60), area=100, whole=True):
    corner, size = rng.uniform(0, area, (N, 2)), rng.uniform(*side, (N, 2))
    boxes = np.concatenate([corner, corner + size], 1)
    return np.round(boxes) if whole else boxes


@pytest.mark.parametrize("inference", [FEW, ALL], ids=["few", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_survivors_are_those_of_a_greedy_loop_over_each_class(seed, inference):
    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng, area=50, whole=seed % 2 == 0)
    scores = rng.random(N)
    scores[scores <= 0.05] = 0
    kept = check(boxes, scores, rng.integers(0, 1 + 3 * seed, N), inference)
    assert 2 < len(kept) < (scores > 0).sum()
    assert inference is ALL or len(kept) == FEW.max_per_image


def test_boxes_of_other_classes_are_not_suppressed():
    boxes = np.tile([10.0, 10.0, 50.0, 40.0], (N, 1))
    scores = np.linspace(0.1, 0.9, N)
    assert check(boxes, scores, np.arange(N), ALL) == list(range(N))[::-1]
    assert check(boxes, scores, np.zeros(N, int), ALL) == [N - 1]


def test_an_overlap_of_exactly_the_limit_survives():
    boxes = np.zeros((N, 4))
    boxes[:3] = [0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 7]  # IoU 1, 0.6, 0.7
    scores = np.where(np.arange(N) < 3, 0.9 - 0.1 * np.arange(N), 0)
    assert check(boxes, scores, np.zeros(N, int), ALL)[:2] == [0, 1]


def test_a_suppressed_box_suppresses_nothing():
    """The second overlaps both others, which do not overlap each other that much."""
    boxes = np.zeros((N, 4))
    boxes[:3] = [0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]  # neighbours: 8/12 > 0.6
    scores = np.where(np.arange(N) < 3, 0.9 - 0.1 * np.arange(N), 0)
    assert check(boxes, scores, np.zeros(N, int), ALL) == [0, 2]


def test_no_box_with_a_score_is_no_detection():
    rng = np.random.default_rng(0)
    labels = np.zeros(N, int)
    assert check(random_boxes(rng), np.zeros(N), labels, ALL) == []
    assert check(random_boxes(rng), np.full(N, -0.03), labels, ALL) == []


def test_every_score_above_zero_enters_whatever_the_threshold():
    """The threshold is on candidates: a quality branch makes scores smaller afterwards."""
    rng = np.random.default_rng(1)
    scores = np.zeros(N, np.float32)
    scores[5], scores[6] = np.finfo(np.float32).tiny, -0.5
    strict = Inference(score_threshold=0.9)
    assert check(random_boxes(rng, side=(5, 9)), scores, np.arange(N), strict) == [5]


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0), (-5, 10), (-5, -5)])
def test_boxes_without_area_do_not_enter(size):
    rng = np.random.default_rng(2)
    boxes, scores = random_boxes(rng), rng.uniform(0.1, 0.8, N)
    boxes[::2, 2:] = boxes[::2, :2] + size
    scores[::2] += 0.15
    assert all(i % 2 for i in check(boxes, scores, rng.integers(0, 3, N), ALL))


def test_of_equal_scores_the_first_wins():
    boxes = np.tile([10.0, 10.0, 50.0, 40.0], (N, 1))
    assert check(boxes, np.full(N, 0.5), np.arange(N) % 2, ALL) == [0, 1]


def test_many_classes_far_apart_keep_their_boxes():
    """Boxes are moved apart by class in float32; at 80 classes and 1333 pixels that is fine."""
    rng = np.random.default_rng(4)
    boxes = random_boxes(rng, side=(20, 300), area=1000)
    check(boxes, rng.random(N), rng.integers(70, 80, N), ALL)


def test_images_of_a_batch_do_not_meet():
    rng = np.random.default_rng(6)
    boxes = np.float32([random_boxes(rng), random_boxes(rng)])
    scores = np.float32(rng.random((2, N)))
    labels = rng.integers(0, 3, (2, N))
    found = jax.jit(jax.vmap(functools.partial(nms, inference=FEW)))(boxes, scores, labels)
    alone = [_nms(*image, inference=FEW) for image in zip(boxes, scores, labels, strict=True)]
    jax.tree.map(
        lambda whole, *parts: np.testing.assert_array_equal(whole, np.stack(parts)), found, *alone
    )
