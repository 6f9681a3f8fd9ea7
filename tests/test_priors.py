"""Anchors against numbers worked out by hand."""

import math

import numpy as np
import pytest

from gfl_jax.priors import SquareAnchors

LEVELS = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of a 64 x 96 canvas
STRIDES = (8, 16, 32, 64, 128)


def test_levels_follow_each_other_row_by_row():
    priors = SquareAnchors()(LEVELS)
    assert priors.levels == (96, 24, 6, 2, 1)
    assert priors.boxes.shape == (129, 4)
    expected = [
        (x * stride, y * stride, stride, x, y)
        for (height, width), stride in zip(LEVELS, STRIDES, strict=True)
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
    assert SquareAnchors()(LEVELS).boxes[index].tolist() == box


def test_center_offset_moves_anchors_by_a_part_of_their_stride():
    corner, middle = SquareAnchors()(LEVELS), SquareAnchors(center_offset=0.5)(LEVELS)
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
    boxes = SquareAnchors(scale=3.0)(LEVELS).boxes
    assert boxes[0].tolist() == [-12, -12, 12, 12]
    assert boxes[128].tolist() == [-192, -192, 192, 192]


def test_everything_is_float32():
    priors = SquareAnchors()(LEVELS)
    assert {priors.boxes.dtype, priors.centers.dtype, priors.strides.dtype} == {np.dtype("float32")}


def test_a_missing_level_is_an_error():
    with pytest.raises(ValueError):
        SquareAnchors()(LEVELS[:4])


@pytest.mark.parametrize("center_offset", [0.0, 0.5])
def test_cells_inside_the_image_rounded_up_to_32_are_valid(center_offset):
    sizes = np.array([(64, 96), (33, 60), (32, 32), (1, 96), (40, 65), (0, 0), (0, 50), (64, 0)])
    valid = np.asarray(SquareAnchors(center_offset=center_offset)(LEVELS).valid(sizes))
    for size, found in zip(sizes, valid, strict=True):
        height, width = (math.ceil(side / 32) * 32 for side in size)
        expected = [
            y < math.ceil(height / stride) and x < math.ceil(width / stride)
            for (rows, columns), stride in zip(LEVELS, STRIDES, strict=True)
            for y in range(rows)
            for x in range(columns)
        ]
        assert found.tolist() == expected
    # 33 x 60 counts as 64 x 64: 8 x 8 + 4 x 4 + 2 x 2 + 1 + 1 cells.
    assert valid.sum(1).tolist() == [129, 86, 23, 66, 129, 0, 0, 0]


def test_part_of_a_cell_makes_it_valid():
    """96 pixels are one and a half cells of stride 64: two cells."""
    valid = np.asarray(SquareAnchors()(LEVELS).valid(np.array([(64, 96), (64, 64)])))
    assert valid[:, 126:128].tolist() == [[True, True], [True, False]]
