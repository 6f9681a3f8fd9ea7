"""ATSS against a loop over objects and anchors, and its properties."""

import jax
import numpy as np
import pytest

from gfl_jax.assign import ATSS, assign_batch
from gfl_jax.priors import SquareAnchors

LEVELS = ((20, 16), (10, 8), (5, 4), (3, 2), (2, 1))  # of a 160 x 128 canvas
PRIORS = SquareAnchors()(LEVELS)
ANCHORS = len(PRIORS.boxes)
EVERYWHERE = np.ones(ANCHORS, bool)
SLOTS = 120  # of objects; one shape, so that everything is compiled once

# Programs compiled for one run: quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0}

_assign = jax.jit(lambda *arrays: ATSS()(PRIORS, *arrays), compiler_options=QUICKLY)


def assign(boxes, mask=None, valid=EVERYWHERE, padding=0.0):
    """The assignment of some objects, padded to SLOTS."""
    padded = np.empty((SLOTS, 4), np.float32)
    padded[:] = padding
    exists = np.zeros(SLOTS, bool)
    padded[: len(boxes)] = np.reshape(boxes, (-1, 4))
    exists[: len(boxes)] = True if mask is None else mask
    return np.asarray(_assign(valid, padded, exists))


def overlap(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    areas = [max(c[2] - c[0], 0.0) * max(c[3] - c[1], 0.0) for c in (a, b)]
    return width * height / max(sum(areas) - width * height, 1e-6)


def assign_by_hand(boxes, mask=None, valid=EVERYWHERE, topk=9):
    """One object after another, one anchor after another, in float64."""
    best = {}  # anchor: (IoU, object)
    anchors = PRIORS.boxes.astype(np.float64)
    for g, box in enumerate(np.float32(boxes).astype(np.float64).reshape(-1, 4)):
        if mask is not None and not mask[g]:
            continue
        x1, y1, x2, y2 = box
        candidates, start = [], 0
        for height, width in LEVELS:
            level = [a for a in range(start, start + height * width) if valid[a]]
            dx, dy = (PRIORS.centers[level].astype(np.float64) - [(x1 + x2) / 2, (y1 + y2) / 2]).T
            nearest = np.argsort(dx * dx + dy * dy, kind="stable")  # the first among equals
            candidates += [level[i] for i in nearest[:topk]]
            start += height * width
        if len(candidates) < 2:
            continue  # no deviation
        ious = [overlap(box, anchors[a]) for a in candidates]
        threshold = np.mean(ious) + np.std(ious, ddof=1)
        for a, iou in zip(candidates, ious, strict=True):
            x, y = map(float, PRIORS.centers[a])
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            if iou >= threshold and inside and iou > best.get(a, (-1.0,))[0]:
                best[a] = (iou, g)
    return np.array([best.get(a, (0, -1))[1] for a in range(ANCHORS)])


def random_boxes(rng, count, smallest=10.0, largest=100.0):
    center = rng.uniform(0, (128, 160), (count, 2))
    half = rng.uniform(smallest, largest, (count, 2)) / 2
    return np.concatenate([center - half, center + half], 1).astype(np.float32)


def valid_cells(height, width):
    return np.asarray(PRIORS.valid(np.array([[height, width]])))[0]


def _cases():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        yield f"fractional-{seed}", random_boxes(rng, 7), EVERYWHERE
        yield f"partly-outside-{seed}", random_boxes(rng, 7) + rng.uniform(-60, 60), EVERYWHERE
        # Whole numbers: distances are exact, and many of them equal.
        yield f"ties-{seed}", np.round(random_boxes(rng, 20)), EVERYWHERE
        yield f"padding-{seed}", random_boxes(rng, 7), valid_cells(*rng.integers(1, (161, 129)))
        yield f"holes-{seed}", random_boxes(rng, 7), rng.random(ANCHORS) < 0.3
    rng = np.random.default_rng(9)
    yield "crowded", random_boxes(rng, SLOTS), EVERYWHERE
    yield "tiny", random_boxes(rng, 60, 0.01, 4.0), EVERYWHERE
    yield "tiny-on-a-center", np.array([[62.7, 62.9, 65.2, 65.4]]), EVERYWHERE
    yield "huge", random_boxes(rng, 5, 300.0, 3000.0), EVERYWHERE
    yield "degenerate", np.array([[64, 64, 64, 90], [64, 64, 64, 64], [90, 90, 50, 50]]), EVERYWHERE
    yield "smallest-image", random_boxes(rng, 5), valid_cells(1, 1)


CASES = {name: (boxes, valid) for name, boxes, valid in _cases()}


@pytest.mark.parametrize("name", CASES)
def test_assignment_is_that_of_a_loop_over_objects_and_anchors(name):
    boxes, valid = CASES[name]
    found = assign(boxes, valid=valid)
    np.testing.assert_array_equal(found, assign_by_hand(boxes, valid=valid))
    assert (found[~valid] == -1).all()


def test_the_cases_exercise_the_assignment():
    """Positives on several levels, crowding, and objects without any."""
    fractional = assign_by_hand(CASES["fractional-0"][0])
    assert (fractional >= 0).sum() > 20
    assert len(np.unique(PRIORS.strides[fractional >= 0])) >= 2
    assert len(np.unique(assign_by_hand(CASES["crowded"][0]))) > 50
    assert (assign_by_hand(CASES["tiny-on-a-center"][0]) == 0).sum() == 1


@pytest.mark.parametrize(
    "padding", [-7.0, 1e6, [90.0, 90.0, 10.0, 10.0], [32.0, 32.0, 96.0, 96.0], 1e30, np.nan]
)
def test_the_content_of_padding_does_not_matter(padding):
    boxes, valid = CASES["padding-1"]
    expected = assign_by_hand(boxes, valid=valid)
    np.testing.assert_array_equal(assign(boxes, valid=valid, padding=padding), expected)


def test_masked_objects_are_never_assigned():
    rng = np.random.default_rng(3)
    boxes, mask = random_boxes(rng, 40), rng.random(40) < 0.5
    found = assign(boxes, mask)
    np.testing.assert_array_equal(found, assign_by_hand(boxes, mask))
    assert mask[found[found >= 0]].all()
    # Nor do they take anchors from others: the same as without them.
    kept = np.flatnonzero(mask)
    alone = assign(boxes[mask])
    np.testing.assert_array_equal(found, np.where(alone >= 0, kept[np.maximum(alone, 0)], -1))


def test_an_image_without_objects_is_background():
    assert (assign(np.zeros((0, 4)), padding=[32, 32, 96, 96]) == -1).all()


def test_an_image_without_anchors_has_no_positive():
    assert (assign(CASES["fractional-0"][0], valid=np.zeros(ANCHORS, bool)) == -1).all()


@pytest.mark.parametrize("anchor", [16 * 8 + 8, 320 + 8 * 4 + 4])
def test_a_single_candidate_is_no_positive(anchor):
    box = PRIORS.boxes[anchor]
    valid = np.arange(ANCHORS) == anchor
    assert (assign([box], valid=valid) == -1).all()
    assert assign([box])[anchor] == 0  # among others it is


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_an_anchor_wanted_by_two_goes_to_the_larger_iou(order):
    anchor = 16 * 8 + 8  # of P3, centred on (64, 64)
    boxes = np.array([[32, 32, 96, 96], [34, 32, 98, 96]], np.float32)[order]
    assert assign(boxes[:1])[anchor] == assign(boxes[1:])[anchor] == 0  # both want it
    assert order[assign(boxes)[anchor]] == 0


def test_of_two_equal_objects_the_first_is_assigned():
    box = random_boxes(np.random.default_rng(5), 1)
    alone = assign(box)
    assert (alone == 0).any()
    np.testing.assert_array_equal(assign(np.repeat(box, 3, 0)), alone)


def test_of_equally_near_anchors_the_first_is_the_candidate():
    """With one candidate a level and the object midway between four cells of P3."""
    nearest = jax.jit(lambda *arrays: ATSS(topk=1)(PRIORS, *arrays), compiler_options=QUICKLY)
    box = np.array([[36, 36, 100, 100]], np.float32)
    found = np.asarray(nearest(EVERYWHERE, box, np.ones(1, bool)))
    np.testing.assert_array_equal(found, assign_by_hand(box, topk=1))
    assert np.flatnonzero(found >= 0).tolist() == [16 * 8 + 8]


@pytest.mark.parametrize("seed", range(3))
def test_permuting_objects_permutes_the_assignment(seed):
    rng = np.random.default_rng(seed)
    boxes, order = random_boxes(rng, 30), rng.permutation(30)
    found, permuted = assign(boxes), assign(boxes[order])
    np.testing.assert_array_equal(np.where(permuted >= 0, order[permuted], -1), found)


def test_the_inside_of_an_object_begins_a_hundredth_of_a_pixel_from_its_sides():
    """The centre (64, 64) of an anchor that overlaps well enough on either side of the limit."""
    anchor = 16 * 8 + 8
    boxes = np.array([[64 - inset, 63, 76, 76] for inset in (0.0, 0.009, 0.012)], np.float32)
    assert [assign([box])[anchor] for box in boxes] == [
        assign_by_hand([box])[anchor] for box in boxes
    ]
    assert assign_by_hand(boxes[2:])[anchor] == 0
    assert assign_by_hand(boxes[1:2])[anchor] == -1


def test_a_batch_is_its_images_one_by_one():
    rng = np.random.default_rng(8)
    boxes = np.stack([random_boxes(rng, SLOTS) for _ in range(2)])
    mask = rng.random((2, SLOTS)) < [[0.1], [0.3]]
    valid = np.stack([EVERYWHERE, valid_cells(100, 60)])
    run = jax.jit(lambda *arrays: assign_batch(ATSS(), PRIORS, *arrays), compiler_options=QUICKLY)
    found = run(valid, boxes, mask)
    for i in range(2):
        np.testing.assert_array_equal(found[i], assign(boxes[i], mask[i], valid[i]))
