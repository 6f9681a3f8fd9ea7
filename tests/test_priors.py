"""Anchors and points against loops over cells, hand-computed and published numbers."""

import math

import numpy as np
import pytest

from gfl_jax.priors import Points, RetinaAnchors, SquareAnchors, SSDBoxes, flatten

LEVELS = ((4, 6), (2, 3), (1, 2), (1, 1), (1, 1))  # of a 32 x 48 canvas
STRIDES = (8, 16, 32, 64, 128)
SQUARE_LEVELS = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of a 64 x 96 canvas
SSD_LEVELS = tuple((side, side) for side in (64, 32, 16, 8, 4, 2, 1))
GENERATORS = {
    "square": (SquareAnchors(), LEVELS),
    "retina": (RetinaAnchors(), LEVELS),
    "ssd": (SSDBoxes(), SSD_LEVELS),
    "points": (Points(), LEVELS),
}


def cells(levels, strides):
    """Stride, row and column of every cell, in order."""
    return [
        (stride, row, column)
        for (height, width), stride in zip(levels, strides, strict=True)
        for row in range(height)
        for column in range(width)
    ]


def around(center, width, height):
    x, y = center
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


# All of them.


@pytest.mark.parametrize("name", GENERATORS)
def test_priors_of_a_cell_lie_together_and_cells_row_by_row(name):
    generator, levels = GENERATORS[name]
    priors = generator(levels)
    expected = [
        (*cell, level)
        for level, count in enumerate(generator.per_cell)
        for cell in cells(levels[level : level + 1], generator.strides[level : level + 1])
        for _ in range(count)
    ]
    stride, row, column, level = np.transpose(expected)
    np.testing.assert_array_equal(priors.strides, stride)
    np.testing.assert_array_equal(priors.cells, np.stack([column, row], 1))
    np.testing.assert_array_equal(priors.by_level(10.0 * np.arange(len(levels))), 10 * level)
    assert priors.per_cell == generator.per_cell
    assert priors.grids == levels
    assert priors.levels == tuple(np.bincount(level))
    assert {priors.boxes.dtype, priors.centers.dtype, priors.strides.dtype} == {np.dtype("float32")}
    middle = 0.5 * (priors.boxes[:, :2] + priors.boxes[:, 2:])
    np.testing.assert_allclose(middle, priors.centers, atol=1e-4)


@pytest.mark.parametrize("name", GENERATORS)
def test_other_levels_than_strides_are_an_error(name):
    generator, levels = GENERATORS[name]
    for wrong in (levels[:-1], (*levels, (1, 1)), ()):
        with pytest.raises(ValueError, match=f"{len(wrong)} levels of features"):
            generator(wrong)


@pytest.mark.parametrize("name", GENERATORS)
def test_all_priors_of_a_cell_inside_the_image_rounded_up_to_32_are_valid(name):
    generator, levels = GENERATORS[name]
    sizes = np.array([(32, 48), (32, 32), (33, 1), (1, 33), (0, 0)], np.int32)
    valid = np.asarray(generator(levels).valid(sizes))
    for size, found in zip(sizes, valid, strict=True):
        height, width = (math.ceil(side / 32) * 32 for side in size)
        inside = [
            row < math.ceil(height / stride) and column < math.ceil(width / stride)
            for stride, row, column in cells(levels, generator.strides)
        ]
        grids = [height * width for height, width in levels]
        assert found.tolist() == np.repeat(inside, np.repeat(generator.per_cell, grids)).tolist()
    assert valid[1].any()
    assert not valid[1].all()
    assert not valid[4].any()


@pytest.mark.parametrize(
    ("generator", "trains"),
    [
        (SquareAnchors(), False),
        (RetinaAnchors(), False),
        (Points(), True),
        (Points(trains_padding=False), False),
    ],
)
def test_padding_is_trained_on_only_as_points_are(generator, trains):
    priors, sizes = generator(LEVELS), np.array([(32, 32), (0, 0)], np.int32)
    valid, trained = np.asarray(priors.valid(sizes)), np.asarray(priors.trained(sizes))
    assert not valid.all(1).any()
    np.testing.assert_array_equal(trained, np.ones_like(valid) if trains else valid)


def test_flatten_gives_one_row_per_prior_in_the_order_of_priors():
    """Maps that hold in each channel of a cell where it belongs: prior and channel."""
    grids, per_cell, channels = ((4, 6), (2, 3)), (2, 3), 5
    levels, start = [], 0
    for (height, width), n in zip(grids, per_cell, strict=True):
        count = height * width * n
        rows = start + np.arange(count).reshape(height, width, n, 1) + 0.1 * np.arange(channels)
        levels.append(np.stack([rows, -rows]).reshape(2, height, width, n * channels))
        start += count
    rows = np.asarray(flatten(levels, per_cell))
    expected = np.arange(start)[:, None] + 0.1 * np.arange(channels)
    np.testing.assert_allclose(rows, np.stack([expected, -expected]), rtol=1e-6)


# Squares.


def test_levels_follow_each_other_row_by_row():
    priors = SquareAnchors()(SQUARE_LEVELS)
    assert priors.levels == (96, 24, 6, 2, 1)
    assert priors.boxes.shape == (129, 4)
    expected = [
        (x * stride, y * stride, stride, x, y)
        for (height, width), stride in zip(SQUARE_LEVELS, STRIDES, strict=True)
        for y in range(height)
        for x in range(width)
    ]
    np.testing.assert_array_equal(priors.centers, [row[:2] for row in expected])
    np.testing.assert_array_equal(priors.strides, [row[2] for row in expected])
    np.testing.assert_array_equal(priors.cells, [row[3:] for row in expected])


@pytest.mark.parametrize(
    ("index", "box"),
    [
        (0, [-32, -32, 32, 32]),
        (1, [-24, -32, 40, 32]),
        (12, [-32, -24, 32, 40]),
        (95, [56, 24, 120, 88]),
        (96, [-64, -64, 64, 64]),
        (120, [-128, -128, 128, 128]),
        (127, [-192, -256, 320, 256]),
        (128, [-512, -512, 512, 512]),
    ],
)
def test_an_anchor_is_a_square_of_eight_strides_around_the_corner_of_its_cell(index, box):
    assert SquareAnchors()(SQUARE_LEVELS).boxes[index].tolist() == box


def test_center_offset_moves_anchors_by_a_part_of_their_stride():
    corner, middle = SquareAnchors()(SQUARE_LEVELS), SquareAnchors(center_offset=0.5)(SQUARE_LEVELS)
    assert middle.centers[[0, 1, 12, 96, 128]].tolist() == [
        [4, 4],
        [12, 4],
        [4, 12],
        [8, 8],
        [64, 64],
    ]
    np.testing.assert_array_equal(middle.boxes, corner.boxes + 0.5 * corner.strides[:, None])
    np.testing.assert_array_equal(middle.cells, corner.cells)


def test_scale_is_the_side_in_strides():
    boxes = SquareAnchors(scale=3.0)(SQUARE_LEVELS).boxes
    assert boxes[0].tolist() == [-12, -12, 12, 12]
    assert boxes[128].tolist() == [-192, -192, 192, 192]


@pytest.mark.parametrize("center_offset", [0.0, 0.5])
def test_cells_inside_the_image_rounded_up_to_32_are_valid(center_offset):
    sizes = np.array([(64, 96), (33, 60), (32, 32), (1, 96), (40, 65), (0, 0), (0, 50), (64, 0)])
    valid = np.asarray(SquareAnchors(center_offset=center_offset)(SQUARE_LEVELS).valid(sizes))
    for size, found in zip(sizes, valid, strict=True):
        height, width = (math.ceil(side / 32) * 32 for side in size)
        expected = [
            y < math.ceil(height / stride) and x < math.ceil(width / stride)
            for (rows, columns), stride in zip(SQUARE_LEVELS, STRIDES, strict=True)
            for y in range(rows)
            for x in range(columns)
        ]
        assert found.tolist() == expected
    # 33 x 60 counts as 64 x 64: 8 x 8 + 4 x 4 + 2 x 2 + 1 + 1 cells.
    assert valid.sum(1).tolist() == [129, 86, 23, 66, 129, 0, 0, 0]


def test_part_of_a_cell_makes_it_valid():
    """96 pixels are one and a half cells of stride 64: two cells."""
    valid = np.asarray(SquareAnchors()(SQUARE_LEVELS).valid(np.array([(64, 96), (64, 64)])))
    assert valid[:, 126:128].tolist() == [[True, True], [True, False]]


# RetinaNet.


def test_retina_anchors_are_ratios_of_octaves_the_octaves_fastest():
    expected = [
        around((column * s, row * s), s * scale / math.sqrt(ratio), s * scale * math.sqrt(ratio))
        for s, row, column in cells(LEVELS, STRIDES)
        for ratio in (0.5, 1.0, 2.0)
        for scale in (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
    ]
    np.testing.assert_allclose(RetinaAnchors()(LEVELS).boxes, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("index", "box"),
    [
        (3, [-16, -16, 16, 16]),  # the first cell's square of four strides
        (0, [-22.627417, -11.313708, 22.627417, 11.313708]),  # half as high as wide
        (6, [-11.313708, -22.627417, 11.313708, 22.627417]),
        (9 + 3, [-8, -16, 24, 16]),
        (6 * 9 + 4, [-20.158737, -12.158737, 20.158737, 28.158737]),
        (24 * 9 + 5, [-50.796834, -50.796834, 50.796834, 50.796834]),  # the first of P4
    ],
)
def test_a_retina_anchor_is_that_of_the_reference(index, box):
    np.testing.assert_allclose(RetinaAnchors()(LEVELS).boxes[index], box, rtol=1e-6)


def test_retina_anchors_follow_their_settings():
    generator = RetinaAnchors(2.0, 1, (1.0, 4.0), center_offset=0.5, strides=(16,))
    assert generator.per_cell == (2,)
    boxes = generator(((1, 2),)).boxes
    expected = [[-8, -8, 24, 24], [0, -24, 16, 40], [8, -8, 40, 24], [16, -24, 32, 40]]
    np.testing.assert_allclose(boxes, expected, rtol=1e-6)


# SSD.


def test_ssd512_has_the_published_boxes():
    generator = SSDBoxes()
    assert generator.sides == (20, 51, 133, 215, 296, 378, 460, 542)
    assert generator.per_cell == (4, 6, 6, 6, 6, 4, 4)
    priors = generator(SSD_LEVELS)
    assert len(priors.boxes) == 24564
    assert priors.levels == (16384, 6144, 1536, 384, 96, 16, 4)


def test_ssd300_has_the_published_sides():
    ratios = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    generator = SSDBoxes(300, 0.07, 0.15, 0.9, ratios, (8, 16, 32, 64, 100, 300))
    assert generator.sides == (21, 45, 99, 153, 207, 261, 315)
    levels = [(side, side) for side in (38, 19, 10, 5, 3, 1)]
    assert len(generator(levels).boxes) == 8732


def test_ssd_boxes_of_a_cell_are_two_squares_then_each_ratio_lying_and_standing():
    sides = (20, 51, 133, 215, 296, 378, 460, 542)
    ratios = ((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,))
    boxes, start = SSDBoxes()(SSD_LEVELS).boxes, 0
    for level, (grid, _) in enumerate(SSD_LEVELS):
        side, stride = sides[level], 8 * 2**level
        shapes = [(side, side), (math.sqrt(side * sides[level + 1]),) * 2]
        for r in ratios[level]:
            shapes += [(side * math.sqrt(r), side / math.sqrt(r))]
            shapes += [(side / math.sqrt(r), side * math.sqrt(r))]
        row, column = grid // 2, grid // 4
        center = (column + 0.5) * stride, (row + 0.5) * stride
        first = start + (row * grid + column) * len(shapes)
        expected = [around(center, *shape) for shape in shapes]
        np.testing.assert_allclose(boxes[first : first + len(shapes)], expected, rtol=1e-5)
        start += grid * grid * len(shapes)
    assert start == len(boxes)


def test_ssd_boxes_cross_the_border():
    np.testing.assert_allclose(SSDBoxes()(SSD_LEVELS).boxes[0], [-6, -6, 14, 14])


@pytest.mark.parametrize(
    "fields",
    [
        {"strides": (8, 16, 32)},
        {"ratios": ((2,),) * 6},
        {"ratios": ((2,),) * 2, "strides": (8, 16)},
    ],
)
def test_ssd_boxes_that_cannot_be_are_named(fields):
    with pytest.raises(ValueError, match=r"priors\.ratios has \d levels"):
        SSDBoxes(**fields)


# Points.


def test_points_are_the_middles_of_cells_without_size():
    priors = Points()(LEVELS)
    expected = [((column + 0.5) * s, (row + 0.5) * s) for s, row, column in cells(LEVELS, STRIDES)]
    np.testing.assert_array_equal(priors.centers, expected)
    np.testing.assert_array_equal(priors.boxes, np.tile(expected, 2))
    assert priors.centers[[0, 1, 6, 24, 33]].tolist() == [
        [4, 4],
        [12, 4],
        [4, 12],
        [8, 8],
        [64, 64],
    ]
