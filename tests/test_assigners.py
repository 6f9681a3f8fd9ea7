"""MaxIoU, FCOS and FoveaBox against loops over objects and priors, and their edge cases."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfl_jax.assign import BACKGROUND, FCOS, IGNORED, FoveaBox, MaxIoU, assign_batch
from gfl_jax.priors import Points, RetinaAnchors, SquareAnchors

SLOTS = 12  # of objects; one shape, so that everything is compiled once
# Programs compiled for one run: quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0}

ANCHORS = {
    # Of a 64 x 96 canvas. The corners of squares are whole numbers: what lies inside of several has
    # exactly the same IoU with them. With others rounding decides.
    "squares": SquareAnchors(4.0, strides=(8, 16, 32))(((8, 12), (4, 6), (2, 3))),
    "retina": RetinaAnchors(strides=(8, 16, 32))(((8, 12), (4, 6), (2, 3))),
}
POINTS = Points()(((24, 32), (12, 16), (6, 8), (3, 4), (2, 2)))  # of a 192 x 256 canvas

_run = jax.jit(
    lambda assigner, name, *arrays: assigner(ANCHORS.get(name, POINTS), *arrays),
    static_argnums=(0, 1),
    compiler_options=QUICKLY,
)


def assign(assigner, boxes, mask=None, valid=None, *, anchors="", padding=0.0):
    """The assignment of some objects, padded to SLOTS."""
    padded = np.empty((SLOTS, 4), np.float32)
    padded[:] = padding
    exists = np.zeros(SLOTS, bool)
    boxes = np.reshape(boxes, (-1, 4))
    padded[: len(boxes)] = boxes
    exists[: len(boxes)] = True if mask is None else mask
    if valid is None:
        valid = np.ones(len(ANCHORS.get(anchors, POINTS).boxes), bool)
    return np.asarray(_run(assigner, anchors, valid, padded, exists))


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


# MaxIoU.

RETINA, SSD = MaxIoU(), MaxIoU(0.5, 0.5, force_first=True)
LOOSE = MaxIoU(0.45, 0.2, force_first=True)


def overlap(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    areas = [max(c[2] - c[0], 0.0) * max(c[3] - c[1], 0.0) for c in (a, b)]
    return width * height / max(sum(areas) - width * height, 1e-6)


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
        own = [p for p in indices if ious[p][g] == best]
        for p in own[:1] if assigner.force_first else own:
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


# All of them.

EVERY = {"retina": RETINA, "ssd": SSD, "fcos": INSIDE, "fcos-center": CENTER, "fovea": FOVEA}


@pytest.mark.parametrize("name", ["fcos", "fcos-center", "fovea"])
def test_permuting_objects_permutes_the_assignment(name):
    """Unlike that of MaxIoU, where the last object with the same best prior gets it."""
    rng = np.random.default_rng(5)
    boxes, order = random_boxes(rng, SLOTS, (256, 192), 20, 200), rng.permutation(SLOTS)
    found, permuted = assign(EVERY[name], boxes), assign(EVERY[name], boxes[order])
    assert len(np.unique(found)) > SLOTS / 2
    np.testing.assert_array_equal(np.where(permuted >= 0, order[permuted], permuted), found)


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_is_its_images_one_by_one(name):
    assigner = EVERY[name]
    anchors = "retina" if isinstance(assigner, MaxIoU) else ""
    priors = ANCHORS.get(anchors, POINTS)
    rng = np.random.default_rng(8)
    boxes = np.stack([random_boxes(rng, SLOTS, (96, 64), 12, 90) for _ in range(3)])
    mask = rng.random((3, SLOTS)) < [[0.7], [0.3], [0.0]]
    valid = rng.random((3, len(priors.boxes))) < 0.8
    run = jax.jit(functools.partial(assign_batch, assigner, priors), compiler_options=QUICKLY)
    found = np.asarray(run(valid, boxes, mask))
    for i in range(3):
        alone = assign(assigner, boxes[i], mask[i], valid[i], anchors=anchors)
        np.testing.assert_array_equal(found[i], alone)
    assert (found[:2] >= 0).any(1).all()
    assert (found[2] == BACKGROUND).all()
