"""Augmentation of SSD: pixels and boxes move together, within the limits of the article."""

import colorsys
import itertools

import numpy as np
import pytest

from gfl_jax.data.ssd_augment import MEAN_COLOUR, expand, min_iou_crop, photometric, ssd_augment

NO_BOXES, NO_LABELS = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
SEEDS = range(300)


class Recorder:
    """A generator that tells what was drawn; without coins, none comes down on its side."""

    def __init__(self, seed, coins=True):
        self._rng, self._coins = np.random.default_rng(seed), coins
        self.uniforms, self.choices, self.order = [], [], None

    def random(self):
        return self._rng.random() if self._coins else 0.5

    def uniform(self, low, high):
        value = self._rng.uniform(low, high)
        self.uniforms.append((low, high, value))
        return value

    def choice(self, values):
        self.choices.append(self._rng.choice(values))
        return self.choices[-1]

    def permutation(self, count):
        self.order = self._rng.permutation(count)
        return self.order


def coordinates(height=90, width=120):
    """An image that tells where each of its pixels came from, in its first two channels."""
    image = np.full((height, width, 3), 255, np.uint8)
    image[..., 0], image[..., 1] = np.arange(width), np.arange(height)[:, None]
    return image


def random_objects(seed, height=90, width=120):
    rng = np.random.default_rng((seed, 99))
    count = rng.integers(1, 5)
    low = rng.uniform(0, (width - 20, height - 20), (count, 2))
    boxes = np.concatenate(
        [low, np.minimum(low + rng.uniform(8, 60, (count, 2)), (width, height))], 1
    )
    return boxes.astype(np.float32), np.arange(count, dtype=np.int32)


def test_a_zoomed_out_image_is_unchanged_in_its_place():
    image, boxes = coordinates(), np.array([[10.5, 20, 40, 60.25], [0, 0, 120, 90]], np.float32)
    ratios, places = [], []
    for seed in SEEDS:
        canvas, moved = expand(image, boxes, np.random.default_rng(seed))
        if canvas is image:
            assert moved is boxes
            continue
        left, top, right, bottom = moved[1].astype(int)
        np.testing.assert_array_equal(canvas[top:bottom, left:right], image)
        np.testing.assert_array_equal(moved - boxes, [[left, top, left, top]] * 2)
        assert moved.dtype == np.float32
        canvas[top:bottom, left:right] = MEAN_COLOUR
        assert (canvas == MEAN_COLOUR).all()
        height, width = canvas.shape[:2]
        assert abs(height / 90 - width / 120) < 1 / 90
        ratios.append(width / 120)
        places.append((left / (width - 119), top / (height - 89)))
    assert 0.4 < len(ratios) / len(SEEDS) < 0.6
    assert 1 <= min(ratios) < 1.1
    assert 3.9 < max(ratios) <= 4
    assert abs(np.mean(ratios) - 2.5) < 0.25
    assert abs(np.mean(places, 0) - 0.5).max() < 0.1


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return overlap / (sum(areas) - overlap)


def test_crops_reach_their_bound_and_keep_the_objects_centred_inside():
    image, accepted = coordinates(), {}
    for seed in SEEDS:
        boxes, labels = random_objects(seed)
        rng = Recorder(seed)
        patch, kept, kept_labels = min_iou_crop(image, boxes, labels, rng)
        mode = rng.choices[-1]
        accepted.setdefault(mode, []).append(patch.shape[:2])
        if mode == 1:
            assert patch is image
            assert (kept is boxes) and (kept_labels is labels)
            continue
        height, width = patch.shape[:2]
        left, top = map(int, patch[0, 0, :2])
        np.testing.assert_array_equal(patch, image[top : top + height, left : left + width])
        # Whole pixels of a patch of the stated limits.
        assert 0.3 * 120 - 1 < width <= 120 and 0.3 * 90 - 1 < height <= 90
        assert (height + 1) / (width - 1) > 0.5 and (height - 1) / (width + 1) < 2
        assert (
            min(iou((left, top, left + width, top + height), box) for box in boxes) >= mode - 1e-6
        )
        expected, expected_labels = [], []
        for label, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            if 0 < (x1 + x2) / 2 - left < width and 0 < (y1 + y2) / 2 - top < height:
                x1, x2 = (min(max(x - left, 0), width) for x in (x1, x2))
                y1, y2 = (min(max(y - top, 0), height) for y in (y1, y2))
                expected.append((x1, y1, x2, y2))
                expected_labels.append(label)
        assert expected
        np.testing.assert_allclose(kept, expected, atol=1e-4)
        assert kept_labels.tolist() == expected_labels
        assert kept.dtype == np.float32
    assert set(accepted) >= {0.0, 0.1, 0.3, 1.0}
    free = np.array(accepted[0.0])
    assert free.min(0)[1] < 0.5 * 120 and free.max(0)[1] > 0.8 * 120
    # Every bound is drawn as often as another: the whole image is kept at least as often as that.
    assert len(accepted[1.0]) > len(SEEDS) / 7


def test_an_image_without_objects_is_cropped_freely():
    image, cropped = coordinates(), 0
    for seed in range(100):
        patch, boxes, labels = min_iou_crop(image, NO_BOXES, NO_LABELS, np.random.default_rng(seed))
        assert boxes.shape == (0, 4) and labels.shape == (0,)
        cropped += patch.size < image.size
    assert 75 < cropped < 95  # 6 of 7


@pytest.mark.parametrize("shape", [(1, 1), (10, 1000), (1000, 10), (3, 2)])
def test_no_image_makes_it_loop_forever(shape):
    """Of a long one no patch has a ratio from 0.5 to 2; the box is no more than a point."""
    image, point = np.zeros((*shape, 3), np.uint8), np.zeros((1, 4), np.float32)

    class NeverAll(Recorder):
        def choice(self, values):
            return 0.9

    for boxes, labels in ((point, np.zeros(1, np.int32)), (NO_BOXES, NO_LABELS)):
        patch, kept, _ = min_iou_crop(image, boxes, labels, NeverAll(0))
        assert min(patch.shape) > 0
        assert len(kept) == len(boxes)


def oracle(colour, brightness, contrast, saturation, hue):
    """What becomes of one pixel (contrast commutes with a change of saturation and hue)."""
    h, s, v = colorsys.rgb_to_hsv(*((x + brightness) * contrast for x in colour))
    return colorsys.hsv_to_rgb((h + hue / 360) % 1, s * saturation, v)


def test_colours_change_as_colorsys_says():
    image = np.random.default_rng(0).integers(40, 256, (4, 5, 3), np.uint8)
    drawn = {-32: 0, 0.5: 0, -18: 0, "order": 0}
    for seed in SEEDS:
        rng = Recorder(seed)
        found = photometric(image, rng)
        assert found.dtype == np.uint8
        values = {
            low: [v for start, _, v in rng.uniforms if start == low] for low in (-32, -18, 0.5)
        }
        assert {(low, high) for low, high, _ in rng.uniforms} <= {(-32, 32), (-18, 18), (0.5, 1.5)}
        for low, found_values in values.items():
            drawn[low] += len(found_values)
        drawn["order"] += rng.order is not None
        (brightness,), (hue,) = (values[low] or [0] for low in (-32, -18))
        # Contrast and saturation have one range: any of the two may have been drawn.
        errors = []
        for contrast, saturation in itertools.permutations((values[0.5] + [1, 1])[:2]):
            pixels = image.reshape(-1, 3).tolist()
            expected = [oracle(p, brightness, contrast, saturation, hue) for p in pixels]
            expected = np.clip(expected, 0, 255)[:, [0, 1, 2] if rng.order is None else rng.order]
            errors.append(np.abs(found.reshape(-1, 3) - expected).max())
        assert min(errors) < 0.51, seed
    counts = np.array(list(drawn.values())) / len(SEEDS) / (1, 2, 1, 1)
    assert (abs(counts - 0.5) < 0.1).all()


def test_colours_stay_as_they_are_when_no_coin_falls():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    np.testing.assert_array_equal(photometric(image, Recorder(0, coins=False)), image)


def test_extreme_colours_are_clipped_and_not_wrapped():
    image = np.zeros((6, 6, 3), np.uint8)
    image[3:] = 255
    results = [photometric(image, np.random.default_rng(seed)) for seed in SEEDS]
    # Greys stay grey: black at most 1.5 * 32, white at least 0.5 * (255 - 32).
    assert max(result[:3].max() for result in results) <= 48
    assert min(result[3:].min() for result in results) >= 111
    assert {int(result[4, 4, 0]) for result in results} > {255}
    assert {int(result[0, 0, 0]) for result in results} > {0}


def test_all_together_find_their_object_again():
    """A rectangle is of one colour, whatever the colour; its surroundings are of another."""
    sides, same_colour = [], 0
    for seed in SEEDS:
        image = np.full((90, 120, 3), (60, 70, 80), np.uint8)
        image[30:70, 20:90] = 250, 30, 20
        before = image.copy()
        boxes, labels = np.array([[20, 30, 90, 70]], np.float32), np.array([7], np.int32)
        rng = np.random.default_rng(seed)
        found, moved, kept, scale = ssd_augment(image, boxes, labels, (96, 128), rng)
        np.testing.assert_array_equal(image, before)
        assert found.shape == (96, 128, 3) and found.dtype == np.uint8
        assert moved.dtype == np.float32 and kept.tolist() == [7]
        x1, y1, x2, y2 = moved[0]
        assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 96
        object_colour = found[int((y1 + y2) / 2), int((x1 + x2) / 2)].astype(int)
        alike = (abs(found - object_colour) < 3).all(-1)
        rows, columns = np.flatnonzero(alike.any(1)), np.flatnonzero(alike.any(0))
        seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        # Bilinear interpolation mixes half a pixel of the original at each side.
        assert (abs(seen - moved[0]) <= 1 + np.tile(scale, 2) / 2).all(), seed
        sides.append((x2 - x1, y2 - y1))
        same_colour += (object_colour == (250, 30, 20)).all()
    assert np.min(sides) < 20 and np.max(sides) > 90
    assert same_colour < 0.2 * len(SEEDS)


def test_all_together_without_objects_and_twice_the_same():
    image = coordinates()
    for seed in range(30):
        first, again = (
            ssd_augment(image, NO_BOXES, NO_LABELS, (64, 96), np.random.default_rng(seed))
            for _ in range(2)
        )
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
        assert first[0].shape == (64, 96, 3)
        assert first[1].shape == (0, 4) and first[1].dtype == np.float32
