"""Where each side of a box may lie: positions and their probabilities, however a box is described.

Section 3.2 of the paper: a Dirac delta has one position, a Gaussian is a bell around its mean, and
a General distribution has n + 1 bins with any probabilities.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gfl_jax.errors import InputError


class Sides(NamedTuple):
    """The distribution of each side: left, top, right, bottom.

    Attributes:
        positions: x of left and right, y of top and bottom, in the unit of the box.
        probabilities: of these positions; they add up to 1.
    """

    positions: Float[Array, "*boxes 4 bins"]
    probabilities: Float[Array, "*boxes 4 bins"]


def certain(boxes: Float[Array, "*boxes 4"]) -> Sides:
    """The sides of boxes that are described by four numbers: one position each."""
    return Sides(boxes[..., None], jnp.ones_like(boxes)[..., None])


def spread(sides: Sides) -> np.ndarray:
    """Standard deviation of each side, [..., 4]."""
    positions, probabilities = map(np.asarray, sides)
    mean = (positions * probabilities).sum(-1, keepdims=True)
    return np.sqrt((probabilities * (positions - mean) ** 2).sum(-1))


def sharpened(sides: Sides, temperature: float) -> Sides:
    """The same positions with probabilities of logits divided by a temperature: above 1 flatter."""
    if temperature == 1:
        return sides
    weights = np.asarray(sides.probabilities, np.float64) ** (1 / temperature)
    probabilities: Any = weights / weights.sum(-1, keepdims=True)
    return Sides(sides.positions, probabilities)


def interval(sides: Sides, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The central interval that holds a share of each side's probability.

    The probability of a bin lies evenly over its width, half of which is on either side of it.

    Args:
        sides: the distributions.
        share: of the probability, such as 0.9.

    Raises:
        InputError: the share is not between 0 and 1.

    Returns:
        Lower and upper end, [..., 4] each. Both are the position itself if there is only one.
    """
    if not 0 < share < 1:
        raise InputError(f"the share is {share}; it must be between 0 and 1, such as 0.9")
    positions, probabilities = map(np.asarray, sides)
    if positions.shape[-1] == 1:
        return positions[..., 0], positions[..., 0]
    order = np.argsort(positions, -1)
    positions = np.take_along_axis(positions, order, -1)
    mass = np.take_along_axis(probabilities, order, -1)
    width = positions[..., 1:2] - positions[..., :1]
    edges = np.concatenate([positions - width / 2, positions[..., -1:] + width / 2], -1)
    below = np.concatenate([np.zeros_like(mass[..., :1]), np.cumsum(mass, -1)], -1)
    tail = (1 - share) / 2
    return _quantile(edges, below, tail), _quantile(edges, below, 1 - tail)


def _quantile(edges: np.ndarray, below: np.ndarray, share: float) -> np.ndarray:
    """Where a cumulative distribution that is linear between its edges reaches a share."""
    last = np.clip((below < share).sum(-1, keepdims=True), 1, below.shape[-1] - 1)
    low, high = (np.take_along_axis(below, last - i, -1)[..., 0] for i in (1, 0))
    start, end = (np.take_along_axis(edges, last - i, -1)[..., 0] for i in (1, 0))
    return start + (end - start) * np.clip((share - low) / np.maximum(high - low, 1e-12), 0, 1)
