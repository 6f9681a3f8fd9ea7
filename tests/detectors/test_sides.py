"""Distributions of sides: what they are for each box representation, and what is read from them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfl_jax.detectors.box import Gaussian, GeneralDistribution
from gfl_jax.detectors.dirac import Deltas, Distances, LogDistances
from gfl_jax.detectors.matching import Frame
from gfl_jax.detectors.sides import Sides, certain, interval, sharpened, spread

BOXES = [GeneralDistribution(n=6, delta=0.5), Gaussian(), Distances(), LogDistances(), Deltas()]


def frame_and_raw(box, seed=0, count=5):
    rng = np.random.default_rng(seed)
    centers = rng.uniform(3, 20, (count, 2))
    frame = Frame(
        jnp.array(centers),
        jnp.array(np.concatenate([centers - 2, centers + 2], 1)),
        jnp.full(count, 8.0),
    )
    return frame, jnp.array(rng.normal(0, 1, (count, box.channels)), jnp.float32)


def normal(mean, sigma, bins=41):
    """Sides that are all alike: a bell over equally wide bins."""
    positions = mean + sigma * np.linspace(-5, 5, bins)
    weights = np.exp(-0.5 * ((positions - mean) / sigma) ** 2)
    return Sides(*(np.tile(x, (1, 4, 1)) for x in (positions, weights / weights.sum())))


@pytest.mark.parametrize("box", BOXES, ids=lambda box: type(box).__name__)
def test_the_mean_of_a_side_is_the_side_of_the_box(box):
    frame, raw = frame_and_raw(box)
    sides = box.sides(raw, frame)
    np.testing.assert_allclose(sides.probabilities.sum(-1), 1, rtol=1e-5)
    mean = (sides.positions * sides.probabilities).sum(-1)
    np.testing.assert_allclose(mean, box.decode(raw, frame), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("box", BOXES[:2], ids=lambda box: type(box).__name__)
def test_the_spread_of_a_side_is_that_of_the_representation(box):
    frame, raw = frame_and_raw(box)
    expected = box.spread(raw)
    # A Gaussian ends at three standard deviations here.
    np.testing.assert_allclose(spread(box.sides(raw, frame)), expected, rtol=0.02)


def test_a_box_of_four_numbers_is_certain():
    boxes = np.array([[1.0, 2.0, 8.0, 9.0]])
    sides = certain(boxes)
    np.testing.assert_array_equal(spread(sides), np.zeros((1, 4)))
    np.testing.assert_array_equal(interval(sides, 0.9), [boxes, boxes])


@pytest.mark.parametrize("share, deviations", [(0.6827, 1.0), (0.9, 1.6449), (0.95, 1.96)])
def test_an_interval_of_a_bell_has_its_quantiles(share, deviations):
    low, high = interval(normal(50.0, 4.0), share)
    np.testing.assert_allclose(low, 50 - 4 * deviations, atol=0.1)
    np.testing.assert_allclose(high, 50 + 4 * deviations, atol=0.1)


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=17), st.floats(0.05, 0.99))
def test_an_interval_holds_its_share_and_grows_with_it(weights, share):
    probabilities = np.array(weights) + 1e-3
    probabilities /= probabilities.sum()
    positions = 10.0 - 2.0 * np.arange(len(weights))  # as of a left side: downwards
    sides = Sides(*(np.tile(x, (4, 1)) for x in (positions, probabilities)))
    low, high = interval(sides, share)
    wide_low, wide_high = interval(sides, (1 + share) / 2)
    assert (wide_low <= low + 1e-9).all() and (high <= wide_high + 1e-9).all()
    # The mass between both ends, counted bin by bin.
    edges = positions[:, None] + np.array([-1.0, 1.0])
    inside = np.clip(np.minimum(edges[:, 1], high[0]) - np.maximum(edges[:, 0], low[0]), 0, None)
    np.testing.assert_allclose((probabilities * inside / 2).sum(), share, atol=1e-6)


def test_a_temperature_above_one_flattens():
    sides = normal(0.0, 1.0)
    widths = [
        np.ptp(interval(sharpened(sides, temperature), 0.9), axis=0).mean()
        for temperature in (0.5, 1.0, 2.0)
    ]
    # The logits of a bell are -x^2 / 2 sigma^2: T multiplies its variance.
    np.testing.assert_allclose(widths, 2 * 1.6449 * np.sqrt([0.5, 1.0, 2.0]), rtol=0.03)


@pytest.mark.parametrize("share", [0.0, 1.0, 90, -1, float("nan")])
def test_a_share_is_between_nothing_and_all(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval(normal(0.0, 1.0), share)
