"""Each assigner against a loop over objects and priors, and its edge cases."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfl_jax.assign import ATSS, BACKGROUND, FCOS, IGNORED, FoveaBox, MaxIoU, Objects
from gfl_jax.priors import Points, RetinaAnchors, SquareAnchors

SLOTS = 12  # of objects; one shape, so that everything is compiled once
# Programs compiled for one run: quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0}

ANCHORS = {
    # Of a 64 x 96 canvas. The corners of squares are whole numbers: what lies inside of several has
    # exactly the same IoU with them. With others rounding decides.
    "squares": SquareAnchors(4.0, strides=(8, 16, 32))(((8, 12), (4, 6), (2, 3))),
    "retina": RetinaAnchors(strides=(8, 16, 32))(((8, 12), (4, 6), (2, 3))),
    # Of a 160 x 128 canvas.
    "canvas": SquareAnchors()(((20, 16), (10, 8), (5, 4), (3, 2), (2, 1))),
}
POINTS = Points()(((24, 32), (12, 16), (6, 8), (3, 4), (2, 2)))  # of a 192 x 256 canvas


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICKLY)
def _run(assigner, name, valid, boxes, mask):
    objects = Objects(boxes, mask, np.zeros(len(boxes), np.int32))
    return assigner(ANCHORS.get(name, POINTS), valid, objects)


def assign(assigner, boxes, mask=None, valid=None, *, anchors="", padding=0.0, slots=SLOTS):
    """What the priors of an image are matched with, its objects padded to `slots`."""
    padded = np.empty((slots, 4), np.float32)
    padded[:] = padding
    exists = np.zeros(slots, bool)
    boxes = np.reshape(boxes, (-1, 4))
    padded[: len(boxes)] = boxes
    exists[: len(boxes)] = True if mask is None else mask
    if valid is None:
        valid = np.ones(len(ANCHORS.get(anchors, POINTS).boxes), bool)
    matched, metric = _run(assigner, anchors, valid, padded, exists)
    assert (metric == 1).all()
    return np.asarray(matched)


def random_boxes(rng, count, canvas, smallest, largest):
    center = rng.uniform(0, canvas, (count, 2))
    half = np.exp(rng.uniform(np.log(smallest), np.log(largest), (count, 2))) / 2
    return np.concatenate([center - half, center + half], 1).astype(np.float32)


def whole_boxes(canvas):
    """Up to SLOTS boxes of whole numbers on and around a canvas: with ties of every kind."""
    width, height = canvas
    corner = st.tuples(st.integers(-20, width), st.integers(-20, height))
    size = st.tuples(st.integers(1, width), st.integers(1, height))
    box = st.tuples(corner, size).map(lambda b: (*b[0], b[0][0] + b[1][0], b[0][1] + b[1][1]))
    return st.lists(box, max_size=SLOTS).map(lambda b: np.array(b, np.float32).reshape(-1, 4))


GARBAGE = [-7.0, [90.0, 90.0, 10.0, 10.0], [16.0, 16.0, 48.0, 48.0], 1e30, np.inf, np.nan]


def check_masked_slots(assigner, boxes, by_hand, anchors=""):
    """Slots that don't exist hold anything and change nothing, at the end or in between."""
    expected = by_hand(boxes)
    assert (expected >= 0).any()
    for padding in GARBAGE:
        found = assign(assigner, boxes, anchors=anchors, padding=padding)
        np.testing.assert_array_equal(found, expected)
    mixed, mask = np.full((SLOTS, 4), np.nan, np.float32), np.arange(SLOTS) % 2 == 1
    mixed[0::4] = boxes[0]
    mixed[mask] = boxes[: mask.sum()]
    found = assign(assigner, mixed, mask, anchors=anchors)
    alone = by_hand(boxes[: mask.sum()])
    np.testing.assert_array_equal(found, np.where(alone >= 0, 2 * alone + 1, alone))


# ATSS.

SQUARES = ANCHORS["canvas"]
EVERYWHERE = np.ones(len(SQUARES.boxes), bool)
ATSS_SLOTS = 120

assign_atss = functools.partial(assign, ATSS(), anchors="canvas", slots=ATSS_SLOTS)


def overlap(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    areas = [max(c[2] - c[0], 0.0) * max(c[3] - c[1], 0.0) for c in (a, b)]
    return width * height / max(sum(areas) - width * height, 1e-6)


def atss_by_hand(boxes, mask=None, valid=EVERYWHERE, topk=9):
    """One object after another, one anchor after another, in float64."""
    best = {}  # anchor: (IoU, object)
    anchors = SQUARES.boxes.astype(np.float64)
    for g, box in enumerate(np.float32(boxes).astype(np.float64).reshape(-1, 4)):
        if mask is not None and not mask[g]:
            continue
        x1, y1, x2, y2 = box
        candidates, start = [], 0
        for height, width in SQUARES.grids:
            level = [a for a in range(start, start + height * width) if valid[a]]
            dx, dy = (SQUARES.centers[level].astype(np.float64) - [(x1 + x2) / 2, (y1 + y2) / 2]).T
            nearest = np.argsort(dx * dx + dy * dy, kind="stable")  # the first among equals
            candidates += [level[i] for i in nearest[:topk]]
            start += height * width
        if len(candidates) < 2:
            continue  # no deviation
        ious = [overlap(box, anchors[a]) for a in candidates]
        threshold = np.mean(ious) + np.std(ious, ddof=1)
        for a, iou in zip(candidates, ious, strict=True):
            x, y = map(float, SQUARES.centers[a])
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            if iou >= threshold and inside and iou > best.get(a, (-1.0,))[0]:
                best[a] = (iou, g)
    return np.array([best.get(a, (0, -1))[1] for a in range(len(SQUARES.boxes))])


def boxes_on_canvas(rng, count, smallest=10.0, largest=100.0):
    center = rng.uniform(0, (128, 160), (count, 2))
    half = rng.uniform(smallest, largest, (count, 2)) / 2
    return np.concatenate([center - half, center + half], 1).astype(np.float32)


def valid_cells(height, width):
    return np.asarray(SQUARES.valid(np.array([[height, width]])))[0]


def atss_cases():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        yield f"fractional-{seed}", boxes_on_canvas(rng, 7), EVERYWHERE
        yield f"partly-outside-{seed}", boxes_on_canvas(rng, 7) + rng.uniform(-60, 60), EVERYWHERE
        # Whole numbers: distances are exact, and many of them equal.
        yield f"ties-{seed}", np.round(boxes_on_canvas(rng, 20)), EVERYWHERE
        yield f"padding-{seed}", boxes_on_canvas(rng, 7), valid_cells(*rng.integers(1, (161, 129)))
        yield f"one-row-{seed}", boxes_on_canvas(rng, 7), valid_cells(rng.integers(1, 33), 128)
        yield f"one-column-{seed}", boxes_on_canvas(rng, 7), valid_cells(160, rng.integers(1, 33))
        yield (
            f"beyond-{seed}",
            boxes_on_canvas(rng, 7) + rng.uniform(-300, 300),
            valid_cells(90, 60),
        )
    rng = np.random.default_rng(9)
    yield "crowded", boxes_on_canvas(rng, ATSS_SLOTS), EVERYWHERE
    yield "tiny", boxes_on_canvas(rng, 60, 0.01, 4.0), EVERYWHERE
    yield "tiny-on-a-center", np.array([[62.7, 62.9, 65.2, 65.4]]), EVERYWHERE
    yield "huge", boxes_on_canvas(rng, 5, 300.0, 3000.0), EVERYWHERE
    yield "degenerate", np.array([[64, 64, 64, 90], [64, 64, 64, 64], [90, 90, 50, 50]]), EVERYWHERE
    yield "smallest-image", boxes_on_canvas(rng, 5), valid_cells(1, 1)


ATSS_CASES = {name: (boxes, valid) for name, boxes, valid in atss_cases()}


@pytest.mark.parametrize("name", ATSS_CASES)
def test_atss_is_that_of_a_loop_over_objects_and_anchors(name):
    boxes, valid = ATSS_CASES[name]
    found = assign_atss(boxes, valid=valid)
    np.testing.assert_array_equal(found, atss_by_hand(boxes, valid=valid))
    assert (found[~valid] == -1).all()


def test_the_cases_exercise_atss():
    """Positives on several levels, crowding, and objects without any."""
    fractional = atss_by_hand(ATSS_CASES["fractional-0"][0])
    assert (fractional >= 0).sum() > 20
    assert len(np.unique(SQUARES.strides[fractional >= 0])) >= 2
    assert len(np.unique(atss_by_hand(ATSS_CASES["crowded"][0]))) > 50
    assert (atss_by_hand(ATSS_CASES["tiny-on-a-center"][0]) == 0).sum() == 1


@pytest.mark.parametrize(
    "padding", [-7.0, 1e6, [90.0, 90.0, 10.0, 10.0], [32.0, 32.0, 96.0, 96.0], 1e30, np.nan]
)
def test_atss_ignores_the_content_of_slots_without_object(padding):
    boxes, valid = ATSS_CASES["padding-1"]
    expected = atss_by_hand(boxes, valid=valid)
    np.testing.assert_array_equal(assign_atss(boxes, valid=valid, padding=padding), expected)


def test_atss_never_assigns_masked_objects():
    rng = np.random.default_rng(3)
    boxes, mask = boxes_on_canvas(rng, 40), rng.random(40) < 0.5
    found = assign_atss(boxes, mask)
    np.testing.assert_array_equal(found, atss_by_hand(boxes, mask))
    assert mask[found[found >= 0]].all()
    # Nor do they take anchors from others: the same as without them.
    kept = np.flatnonzero(mask)
    alone = assign_atss(boxes[mask])
    np.testing.assert_array_equal(found, np.where(alone >= 0, kept[np.maximum(alone, 0)], -1))


def test_an_image_without_objects_is_background():
    assert (assign_atss(np.zeros((0, 4)), padding=[32, 32, 96, 96]) == -1).all()


def test_an_image_without_anchors_has_no_positive():
    assert (
        assign_atss(ATSS_CASES["fractional-0"][0], valid=np.zeros(len(SQUARES.boxes), bool)) == -1
    ).all()


@pytest.mark.parametrize("anchor", [0, 320])
def test_a_single_candidate_is_no_positive(anchor):
    box = SQUARES.boxes[anchor]
    valid = np.arange(len(SQUARES.boxes)) == anchor
    assert (assign_atss([box], valid=valid) == -1).all()
    assert assign_atss([box])[anchor] == 0  # among others it is


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_an_anchor_claimed_by_two_goes_to_the_larger_iou(order):
    anchor = 16 * 8 + 8  # of P3, centred on (64, 64)
    boxes = np.array([[32, 32, 96, 96], [34, 32, 98, 96]], np.float32)[order]
    assert assign_atss(boxes[:1])[anchor] == assign_atss(boxes[1:])[anchor] == 0  # both claim it
    assert order[assign_atss(boxes)[anchor]] == 0


def test_of_two_equal_objects_the_first_is_assigned():
    box = boxes_on_canvas(np.random.default_rng(5), 1)
    alone = assign_atss(box)
    assert (alone == 0).any()
    np.testing.assert_array_equal(assign_atss(np.repeat(box, 3, 0)), alone)


def test_of_equally_near_anchors_the_first_is_the_candidate():
    """With one candidate a level and the object midway between four cells of P3."""
    box = np.array([[36, 36, 100, 100]], np.float32)
    found = assign(ATSS(topk=1), box, anchors="canvas", slots=1)
    np.testing.assert_array_equal(found, atss_by_hand(box, topk=1))
    assert np.flatnonzero(found >= 0).tolist() == [16 * 8 + 8]


@pytest.mark.parametrize("seed", range(3))
def test_permuting_objects_permutes_the_assignment_of_atss(seed):
    rng = np.random.default_rng(seed)
    boxes, order = boxes_on_canvas(rng, 30), rng.permutation(30)
    found, permuted = assign_atss(boxes), assign_atss(boxes[order])
    np.testing.assert_array_equal(np.where(permuted >= 0, order[permuted], -1), found)


def test_the_inside_of_an_object_begins_a_hundredth_of_a_pixel_from_its_sides():
    """The centre (64, 64) of an anchor that overlaps well enough on either side of the limit."""
    anchor = 16 * 8 + 8
    boxes = np.array([[64 - inset, 63, 76, 76] for inset in (0.0, 0.009, 0.012)], np.float32)
    assert [assign_atss([box])[anchor] for box in boxes] == [
        atss_by_hand([box])[anchor] for box in boxes
    ]
    assert atss_by_hand(boxes[2:])[anchor] == 0
    assert atss_by_hand(boxes[1:2])[anchor] == -1


# MaxIoU.

RETINA, SSD = MaxIoU(), MaxIoU(0.5, 0.5, force_first=True)
LOOSE = MaxIoU(0.45, 0.2, force_first=True)


def max_iou_by_hand(assigner, boxes, valid=None, *, anchors):
    priors = np.float64(ANCHORS[anchors].boxes).tolist()
    found = [BACKGROUND] * len(priors)
    indices = range(len(priors)) if valid is None else np.flatnonzero(valid).tolist()
    if not len(boxes) or not len(indices):
        return np.array(found)
    ious = {p: [overlap(b, priors[p]) for b in np.float64(boxes).tolist()] for p in indices}
    for p in indices:
        best = max(ious[p])
        if best >= assigner.positive:
            found[p] = ious[p].index(best)
        elif best >= assigner.negative:
            found[p] = IGNORED
    for g in range(len(boxes)):
        best = max(ious[p][g] for p in indices)
        closest = [p for p in indices if ious[p][g] == best]
        for p in closest[:1] if assigner.force_first else closest:
            found[p] = g
    return np.array(found)


def anchor_cases():
    for seed in range(3):
        rng, anchors = np.random.default_rng(seed), len(ANCHORS["squares"].boxes)
        boxes = random_boxes(rng, 7, (96, 64), 15, 90)
        yield f"fractional-{seed}", "squares", boxes, None
        yield f"holes-{seed}", "squares", boxes, rng.random(anchors) < 0.3
        yield f"crowded-{seed}", "squares", random_boxes(rng, SLOTS, (40, 40), 20, 40), None
        yield f"retina-{seed}", "retina", random_boxes(rng, 9, (96, 64), 36, 90), None
    rng = np.random.default_rng(9)
    valid = np.asarray(ANCHORS["squares"].valid(np.array([[60, 30]])))[0]
    some = np.array([0, 900, 0, -900, 0])[:, None]
    for name, boxes, where in [
        ("tiny", random_boxes(rng, SLOTS, (96, 64), 0.01, 4.0), None),
        ("huge", random_boxes(rng, 5, (96, 64), 300.0, 3000.0), None),
        ("outside", random_boxes(rng, 3, (50, 50), 5, 60) + 500, None),
        ("some-outside", random_boxes(rng, 5, (50, 50), 5, 60) + some, None),
        ("no-object", np.zeros((0, 4)), None),
        ("padding", random_boxes(rng, 5, (96, 64), 20, 60), valid),
        ("no-prior", random_boxes(rng, 5, (96, 64), 20, 60), np.zeros(anchors, bool)),
        ("one-prior", random_boxes(rng, 5, (96, 64), 20, 60), np.arange(anchors) == 77),
        ("duplicates", random_boxes(rng, 2, (60, 40), 30, 50)[[0, 1, 0, 1, 1]], None),
    ]:
        yield name, "squares", boxes, where


ANCHOR_CASES = {name: case for name, *case in anchor_cases()}


@pytest.mark.parametrize("name", ANCHOR_CASES)
@pytest.mark.parametrize("assigner", [RETINA, SSD, LOOSE], ids=["all", "first", "band"])
def test_max_iou_is_that_of_a_loop_over_priors_and_objects(assigner, name):
    anchors, boxes, valid = ANCHOR_CASES[name]
    found = assign(assigner, boxes, valid=valid, anchors=anchors)
    np.testing.assert_array_equal(found, max_iou_by_hand(assigner, boxes, valid, anchors=anchors))
    if valid is not None:
        assert (found[~valid] == BACKGROUND).all()


@pytest.mark.parametrize("assigner", [RETINA, SSD], ids=["all", "first"])
@settings(max_examples=25)
@given(boxes=whole_boxes((96, 64)))
def test_max_iou_settles_ties_as_the_loop(assigner, boxes):
    found = assign(assigner, boxes, anchors="squares")
    np.testing.assert_array_equal(found, max_iou_by_hand(assigner, boxes, anchors="squares"))


def test_the_cases_exercise_max_iou():
    """Positives by overlap and by force, ignored priors, ties, and all three kinds together."""
    for name in ("fractional-0", "retina-0"):
        anchors, boxes, _ = ANCHOR_CASES[name]
        found = max_iou_by_hand(RETINA, boxes, anchors=anchors)
        assert min((found == kind).sum() for kind in (IGNORED, BACKGROUND, 0, 1)) > 0
    anchors, boxes, _ = ANCHOR_CASES["fractional-0"]
    best = [max(overlap(box, prior) for prior in ANCHORS[anchors].boxes) for box in boxes]
    assert min(best) < 0.4 < 0.5 < max(best)
    boxes = ANCHOR_CASES["tiny"][1]
    every, first = (max_iou_by_hand(a, boxes, anchors="squares") for a in (RETINA, SSD))
    assert (every >= 0).sum() > 2 * (first >= 0).sum() > len(boxes)


@pytest.mark.parametrize("assigner", [RETINA, SSD], ids=["all", "first"])
def test_max_iou_ignores_the_content_of_slots_without_object(assigner):
    by_hand = functools.partial(max_iou_by_hand, assigner, anchors="squares")
    check_masked_slots(assigner, ANCHOR_CASES["fractional-1"][1], by_hand, "squares")


@pytest.mark.parametrize(
    ("height", "others"), [(16, 0), (15, IGNORED), (12, IGNORED), (11, BACKGROUND)]
)
def test_thresholds_belong_to_the_better_side(height, others):
    """Three squares of side 32 contain an object of 32 x height: IoU height / 32 with each."""
    box, columns = [16, 16, 48, 16 + height], 12
    first, *rest = [row * columns + 4 for row in (2, 3, 4)]  # centres (32, 16), (32, 24), (32, 32)
    found = assign(MaxIoU(0.5, 0.375, force_first=True), [box], anchors="squares")
    assert found[first] == 0
    assert found[rest].tolist() == [others, others]
    found = assign(MaxIoU(0.5, 0.375), [box], anchors="squares")
    assert np.flatnonzero(found == 0).tolist() == [first, *rest]


def test_an_object_that_touches_no_prior_takes_all_or_the_first():
    """As in the reference: its best IoU is 0, and so is that of everything else."""
    boxes = [[16, 16, 48, 48], [500, 500, 520, 520]]
    valid = np.arange(len(ANCHORS["squares"].boxes)) % 3 == 1
    valid[2 * 12 + 5 :] = True
    touching = assign(RETINA, boxes[:1], valid=valid, anchors="squares")
    everything = assign(RETINA, boxes, valid=valid, anchors="squares")
    assert (everything[~valid] == BACKGROUND).all()
    assert (everything[valid] == 1).all()
    first = assign(SSD, boxes, valid=valid, anchors="squares")
    assert np.flatnonzero(first == 1).tolist() == [1]  # the first that is valid
    assert (touching == 0).any()
    assert (first == 0).any()


def test_of_equal_objects_the_first_has_the_overlap_and_the_last_the_force():
    box = [16, 16, 48, 48]
    best, good = 4 * 12 + 4, [4 * 12 + 3, 4 * 12 + 5]  # IoU 1, and 24 / 40
    found = assign(RETINA, [box, box, box], anchors="squares")
    assert found[best] == 2
    assert found[good].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("positive", "negative"), [(0.4, 0.5), (1.1, 0.5), (0.5, -0.1)], ids=["order", "above", "below"]
)
def test_impossible_thresholds_are_named(positive, negative):
    with pytest.raises(ValueError, match=f"assigner.negative {negative}"):
        MaxIoU(positive, negative)


# FCOS.

INSIDE, CENTER = FCOS(), FCOS(center_radius=1.5)


def fcos_by_hand(assigner, boxes, valid=None):
    found = []
    ranges = np.repeat(assigner.ranges, POINTS.levels, axis=0).tolist()
    radii = (assigner.center_radius * POINTS.strides).tolist()
    for p, (x, y) in enumerate(np.float64(POINTS.centers).tolist()):
        best = math.inf, BACKGROUND
        for g, (x1, y1, x2, y2) in enumerate(np.float64(boxes).reshape(-1, 4).tolist()):
            sides = x - x1, y - y1, x2 - x, y2 - y
            inside = min(sides) > 0
            if assigner.center_radius:
                off_center = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
                inside = inside and off_center < radii[p]
            low, high = ranges[p]
            if inside and low <= max(sides) <= high:
                best = min(best, ((x2 - x1) * (y2 - y1), g))
        found.append(best[1] if valid is None or valid[p] else BACKGROUND)
    return np.array(found)


def point_cases():
    points = len(POINTS.boxes)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        yield f"fractional-{seed}", random_boxes(rng, 7, (256, 192), 15, 250), None
        yield f"crowded-{seed}", random_boxes(rng, SLOTS, (128, 96), 20, 120), None
        yield f"holes-{seed}", random_boxes(rng, 7, (256, 192), 15, 250), rng.random(points) < 0.3
    rng = np.random.default_rng(9)
    valid = np.asarray(POINTS.valid(np.array([[100, 130]])))[0]
    yield "padding", random_boxes(rng, 7, (256, 192), 30, 200), valid
    yield "tiny", random_boxes(rng, SLOTS, (256, 192), 0.01, 9.0), None
    on_middles = np.round((random_boxes(rng, SLOTS, (256, 192), 1, 1) - 4) / 8) * 8 + 4.1
    yield "tiny-on-middles", on_middles + random_boxes(rng, SLOTS, (0, 0), 0.5, 9.0), None
    yield "huge", random_boxes(rng, SLOTS, (256, 192), 200.0, 3000.0), None
    yield "partly-outside", random_boxes(rng, SLOTS, (256, 192), 15, 250) + 100, None
    yield "outside", random_boxes(rng, 5, (256, 192), 5, 60) + 400, None
    yield "before-the-corner", random_boxes(rng, 5, (256, 192), 5, 60) - 400, None
    yield "no-object", np.zeros((0, 4)), None
    yield "no-point", random_boxes(rng, 5, (256, 192), 20, 60), np.zeros(points, bool)
    same = random_boxes(rng, 2, (60, 40), 60, 90)
    yield "duplicates", same[[0, 1, 0, 1, 1]], None
    nested = np.array([[60.3, 60.3, 60.3, 60.3]]) + np.outer([90, 50, 25, 12], [-1, -1, 1, 1])
    yield "nested", nested, None


POINT_CASES = {name: (np.float32(boxes), valid) for name, boxes, valid in point_cases()}


@pytest.mark.parametrize("name", POINT_CASES)
@pytest.mark.parametrize("assigner", [INSIDE, CENTER], ids=["inside", "center"])
def test_fcos_is_that_of_a_loop_over_points_and_objects(assigner, name):
    boxes, valid = POINT_CASES[name]
    found = assign(assigner, boxes, valid=valid)
    np.testing.assert_array_equal(found, fcos_by_hand(assigner, boxes, valid))


@pytest.mark.parametrize("assigner", [INSIDE, CENTER], ids=["inside", "center"])
@settings(max_examples=25)
@given(boxes=whole_boxes((256, 192)))
def test_fcos_settles_ties_as_the_loop(assigner, boxes):
    np.testing.assert_array_equal(assign(assigner, boxes), fcos_by_hand(assigner, boxes))


def test_the_cases_exercise_fcos():
    """Every level has positives; center sampling leaves some of them; objects share points."""
    boxes = np.concatenate([POINT_CASES[name][0] for name in ("fractional-0", "nested", "huge")])
    every, near = (fcos_by_hand(assigner, boxes) for assigner in (INSIDE, CENTER))
    assert set(POINTS.strides[every >= 0]) == {8, 16, 32, 64, 128}
    assert 0 < (near >= 0).sum() < 0.5 * (every >= 0).sum()
    assert len(np.unique(fcos_by_hand(INSIDE, POINT_CASES["nested"][0]))) == 5


@pytest.mark.parametrize("assigner", [INSIDE, CENTER], ids=["inside", "center"])
def test_fcos_ignores_the_content_of_slots_without_object(assigner):
    by_hand = functools.partial(fcos_by_hand, assigner)
    check_masked_slots(assigner, POINT_CASES["fractional-1"][0], by_hand)


def at(x, y, stride):
    """The point at this place of the level of this stride."""
    (found,) = np.flatnonzero((POINTS.centers == (x, y)).all(1) & (POINTS.strides == stride))
    return found


@pytest.mark.parametrize(
    ("far", "levels"), [(63, [8]), (64, [8, 16]), (65, [16]), (128, [16, 32]), (129, [32])]
)
def test_ranges_of_fcos_include_both_ends(far, levels):
    """The right side of the object is so far from a point of each of three levels."""
    points = {8: at(68, 68, 8), 16: at(72, 72, 16), 32: at(80, 80, 32)}
    taken = []
    for stride, point in points.items():
        x, y = POINTS.centers[point]
        if assign(INSIDE, [[x - 1, y - 1, x + far, y + 1]])[point] == 0:
            taken.append(stride)
    assert taken == levels


@pytest.mark.parametrize("assigner", [INSIDE, CENTER], ids=["inside", "center"])
def test_a_point_on_the_side_of_an_object_is_outside(assigner):
    point = at(68, 68, 8)
    beside = [[68, 60, 76, 76], [60, 68, 76, 76], [60, 60, 68, 76], [60, 60, 76, 68]]
    assert [assign(assigner, [box])[point] for box in beside] == [BACKGROUND] * 4
    nearly = np.array(beside) + np.eye(4) * [[-0.01], [-0.01], [0.01], [0.01]]
    assert [assign(assigner, [box])[point] for box in nearly] == [0] * 4


def test_center_sampling_ends_at_its_radius():
    """At one and a half strides of 8 the middle is 12 pixels away: just not near."""
    point = at(68, 68, 8)
    for distance, expected in ((12, BACKGROUND), (11.75, 0), (-11.75, 0), (-12, BACKGROUND)):
        box = [68 + distance - 30, 38, 68 + distance + 30, 98]
        assert assign(CENTER, [box])[point] == expected
        assert assign(INSIDE, [box])[point] == 0


def test_of_equal_areas_fcos_takes_the_first():
    boxes = [[40, 40, 100, 80], [50, 30, 90, 90], [40, 40, 100, 80]]
    assert assign(INSIDE, boxes)[at(68, 60, 8)] == 0
    assert assign(INSIDE, boxes[::-1])[at(68, 60, 8)] == 0
    assert assign(INSIDE, [*boxes, [41, 40, 100, 80]])[at(68, 60, 8)] == 3


# FoveaBox.

FOVEA = FoveaBox()


def fovea_by_hand(boxes, valid=None, assigner=FOVEA):
    """Level by level the objects are painted, large ones first, in float64."""
    found, boxes = [], np.float64(boxes).reshape(-1, 4)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    levels = zip(POINTS.grids, (8, 16, 32, 64, 128), assigner.ranges, strict=True)
    for (height, width), stride, (low, high) in levels:
        canvas = np.full((height, width), BACKGROUND)
        for g in sorted(range(len(boxes)), key=lambda g: -areas[g]):  # stable
            if not low <= math.sqrt(areas[g]) <= high:
                continue
            ends = []
            for axis, cells in ((0, width), (1, height)):
                first, last = boxes[g, axis] / stride, boxes[g, axis + 2] / stride
                margin = (1 - assigner.sigma) * (last - first) / 2
                begin, end = first + margin - 0.5, last - margin - 0.5
                # So near to a whole number that float32 may be on its other side.
                assert min(abs(v - round(v)) for v in (begin, end)) > 1e-5
                ends += [min(max(v, 0), cells - 1) for v in (math.ceil(begin), math.floor(end))]
            left, right, top, bottom = ends
            canvas[top : bottom + 1, left : right + 1] = g
        found.append(canvas.reshape(-1))
    found = np.concatenate(found)
    return found if valid is None else np.where(valid, found, BACKGROUND)


@pytest.mark.parametrize("name", POINT_CASES)
def test_foveabox_is_that_of_painting_objects_large_ones_first(name):
    boxes, valid = POINT_CASES[name]
    np.testing.assert_array_equal(assign(FOVEA, boxes, valid=valid), fovea_by_hand(boxes, valid))


def test_the_cases_exercise_foveabox():
    """All levels have positives, objects occupy cells of two, and some have none."""
    boxes = np.concatenate([POINT_CASES[name][0] for name in ("fractional-0", "nested", "huge")])
    found = fovea_by_hand(boxes)
    assert set(POINTS.strides[found >= 0]) == {8, 16, 32, 64, 128}
    levels = [len(np.unique(POINTS.strides[found == g])) for g in range(len(boxes))]
    assert {0, 1, 2} <= set(levels)
    found = fovea_by_hand(POINT_CASES["tiny-on-middles"][0])
    assert 2 < len(np.unique(found)) < SLOTS


def test_foveabox_ignores_the_content_of_slots_without_object():
    check_masked_slots(FOVEA, POINT_CASES["fractional-1"][0], fovea_by_hand)


def occupied(box, assigner=FOVEA):
    """Columns, and rows, of the cells of P3 that an object has alone."""
    found = assign(assigner, [box])[: POINTS.levels[0]].reshape(24, 32) == 0
    return np.flatnonzero(found.any(0)).tolist(), np.flatnonzero(found.any(1)).tolist()


def test_foveabox_takes_the_central_part():
    """40 of 40 pixels: the cells whose middles are within 8 pixels of the object's middle."""
    assert occupied([40.1, 48.1, 80.1, 88.1]) == ([7, 8], [8, 9])  # 52.1..68.1 and 60.1..76.1
    assert occupied([40, 40, 80, 80], FoveaBox(sigma=1.0)) == ([5, 6, 7, 8, 9],) * 2
    # Middles on the border of the central part are in it: 44 to 76 of 28 to 92.
    assert occupied([28, 28, 92, 92], FoveaBox(sigma=0.5)) == ([5, 6, 7, 8, 9],) * 2


def test_a_small_object_between_middles_of_cells_has_none():
    assert occupied([62, 62, 66, 66]) == ([], [])
    assert occupied([58, 58, 62, 62]) == ([7], [7])


def test_an_object_beyond_the_map_occupies_cells_at_its_border():
    """As in the reference, which moves both ends into the map."""
    assert occupied([300, 80.1, 340, 120.1]) == ([31], [12, 13])
    assert occupied([-100, -70, -60, -30]) == ([0], [0])


@pytest.mark.parametrize(
    ("side", "strides"),
    [
        (0.5, []),
        (1, [8]),
        (31, [8]),
        (32, [8, 16]),
        (64, [8, 16, 32]),
        (65, [16, 32]),
        (128, [16, 32, 64]),
        (512, [64, 128]),
        (513, [128]),
        (2048, [128]),
        (2049, []),
    ],
)
def test_ranges_of_foveabox_include_both_ends(side, strides):
    """A square around the middle of a cell of each level."""
    ranges_only = FoveaBox(sigma=1.0)
    found = set()
    for x in (4, 8, 16, 32, 64):  # middles of the first cells
        level = POINTS.strides == 2 * x
        half = side / 2
        if (assign(ranges_only, [[x - half, x - half, x + half, x + half]])[level] == 0).any():
            found.add(2 * x)
    assert sorted(found) == strides


def test_of_equal_sizes_foveabox_takes_the_last():
    boxes = np.array([[40, 40, 80, 80], [44, 44, 84, 84], [40, 40, 80, 80]]) + 0.5
    cell = at(60, 60, 8)
    assert [assign(FOVEA, boxes[:n])[cell] for n in (1, 2, 3)] == [0, 1, 2]
    smaller = np.array([[42, 42, 80, 80]]) + 0.5
    assert assign(FOVEA, np.concatenate([smaller, boxes]))[cell] == 0


# Those without ties.


@pytest.mark.parametrize("assigner", [INSIDE, CENTER, FOVEA], ids=["inside", "center", "fovea"])
def test_permuting_objects_permutes_the_assignment(assigner):
    """Unlike that of MaxIoU, where the last object with the same best prior gets it."""
    rng = np.random.default_rng(5)
    boxes, order = random_boxes(rng, SLOTS, (256, 192), 20, 200), rng.permutation(SLOTS)
    found, permuted = assign(assigner, boxes), assign(assigner, boxes[order])
    assert len(np.unique(found)) > SLOTS / 2
    np.testing.assert_array_equal(np.where(permuted >= 0, order[permuted], permuted), found)
