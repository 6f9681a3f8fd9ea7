"""Representations of localization quality, the rows of table 1a: one of a detector's five choices.

Quality says how well a positive is placed, by its centerness or by the IoU of its predicted box.
Whatever it is used for, it is a constant: training through it collapses.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gfl_jax.boxes import boxes_to_distances

Measure = Literal["centerness", "iou"]
Weighting = Literal["predicted", "iou", "centerness", "none"]
"""What weighs the box losses of a positive: the highest class score it now predicts (the authors'
code), its IoU, its centerness, or nothing."""


@dataclasses.dataclass(frozen=True)
class NoQuality:
    """The score is that of the class alone: 'w/o quality branch'."""

    weighting: Weighting = "none"

    branch = ""


@dataclasses.dataclass(frozen=True)
class QualityBranch:
    """One more output predicts the quality, which multiplies the score.

    'centerness-branch' (FCOS, ATSS) and 'IoU-branch'. The quality weighs the box losses.
    """

    measure: Measure = "centerness"

    @property
    def branch(self) -> str:
        """Name of the branch."""
        return self.measure

    @property
    def weighting(self) -> Weighting:
        """See `Weighting`."""
        return self.measure


@dataclasses.dataclass(frozen=True)
class GuidedQuality:
    """The quality weighs the classification loss of positives: '-guided' (arXiv 1908.05641).

    w_i = q_i^eta sum_j L_j / sum_j q_j^eta L_j, which leaves the sum of their losses L as it is.
    """

    measure: Measure = "iou"
    eta: float = 1.5
    weighting: Weighting = "none"

    branch = ""


@dataclasses.dataclass(frozen=True)
class JointQuality:
    """Quality representation of GFL, section 3.1: the score of the true class *is* the IoU.

    weighting: of box and distribution losses. The authors found no difference between the scores
    now predicted and the IoU.
    """

    weighting: Weighting = "predicted"

    branch = ""


Quality = JointQuality | NoQuality | QualityBranch | GuidedQuality


def centerness(points: Float[Array, "*n 2"], boxes: Float[Array, "*n 4"]) -> Float[Array, " *n"]:
    """How central points lie in boxes: 1 in the middle, 0 at the sides and outside.

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), arXiv 1904.01355, equation 3.
    """
    distances = boxes_to_distances(points, boxes)
    near = jnp.minimum(distances[..., :2], distances[..., 2:])
    far = jnp.maximum(distances[..., :2], distances[..., 2:])
    ratio = jnp.maximum(near, 0) / jnp.maximum(far, 1e-6)
    return lax.stop_gradient(jnp.sqrt(ratio.prod(-1)))
