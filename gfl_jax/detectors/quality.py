"""Representations of localization quality, the rows of table 1a: one of a detector's five choices.

Quality says how well a positive is localized: by its centerness, the IoU of its predicted box or
the assigner's metric. Whatever it is used for, it is a constant: training through it collapses.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from gfl_jax.boxes import boxes_to_distances
from gfl_jax.losses import binary_cross_entropy
from gfl_jax.models.heads import Outputs
from gfl_jax.priors import Priors, flatten

Measure = Literal["centerness", "iou"]
Weighting = Literal["predicted", "iou", "centerness", "metric", "none"]


class Measures(NamedTuple):
    """Measures of how well each positive is localized; constants.

    Attributes:
        predicted: the highest class score that it currently predicts, of any class.
        iou: of its predicted box with its object.
        centerness: of the prior in its object.
        metric: of the assigner.
        none: 1, nothing.
    """

    predicted: Float[Array, "b priors"]
    iou: Float[Array, "b priors"]
    centerness: Float[Array, "b priors"]
    metric: Float[Array, "b priors"]
    none: Float[Array, "b priors"]


class _Quality:
    """The interface of a quality, with the behaviour of one that changes nothing."""

    soft = False
    """Whether labels lie between 0 and 1."""

    @property
    def branch(self) -> str:
        """Name of the branch that a head must have, one logit per prior; empty for none."""
        return ""

    @property
    def weighting(self) -> Weighting:
        """The measure that weights the box losses of a positive."""
        return "none"

    def label(self, measures: Measures) -> Float[Array, "b priors"]:
        """The target of a positive at its true class."""
        return measures.none

    def weight(self, measures: Measures) -> Float[Array, "b priors"]:
        """The weight of a positive's box losses."""
        return getattr(measures, self.weighting)

    def rescale(
        self,
        losses: Float[Array, "b priors outputs"],
        true_class: Bool[Array, "b priors outputs"],
        measures: Measures,
        global_sum: Callable[[Array], Array],
    ) -> Float[Array, "b priors outputs"]:
        """The classification losses with other weights.

        Args:
            losses: of each class.
            true_class: marks the class of each positive's object.
            measures: of the positives.
            global_sum: sums over all devices.
        """
        return losses

    def terms(
        self, outputs: Outputs, priors: Priors, measures: Measures
    ) -> dict[str, Float[Array, "b priors"]]:
        """Further loss terms of positives, by name."""
        return {}


@dataclasses.dataclass(frozen=True)
class NoQuality(_Quality):
    """The score is that of the class alone: 'w/o quality branch'.

    Attributes:
        weighting: the measure that weights the box losses of a positive.
    """

    weighting: Weighting = "none"


@dataclasses.dataclass(frozen=True)
class QualityBranch(_Quality):
    """One more output predicts the quality, which multiplies the score.

    'centerness-branch' (FCOS, ATSS) and 'IoU-branch'. The quality weights the box losses.

    Attributes:
        measure: the quality.
    """

    measure: Measure = "centerness"

    @property
    def branch(self) -> str:
        return self.measure

    @property
    def weighting(self) -> Weighting:
        return self.measure

    def terms(
        self, outputs: Outputs, priors: Priors, measures: Measures
    ) -> dict[str, Float[Array, "b priors"]]:
        """Cross entropy of the branch: loss_centerness or loss_iou."""
        logits = flatten(outputs.quality_logits, priors.per_cell)[..., 0]
        target = getattr(measures, self.measure)
        return {f"loss_{self.measure}": binary_cross_entropy(logits, target)}


@dataclasses.dataclass(frozen=True)
class GuidedQuality(_Quality):
    """The quality weights the classification loss of positives: '-guided' (arXiv 1908.05641).

    w_i = q_i^eta sum_j L_j / sum_j q_j^eta L_j, which leaves the sum of their losses L as it is.

    Attributes:
        measure: the quality q.
        eta: its power.
        weighting: the measure that weights the box losses of a positive.
    """

    measure: Measure = "iou"
    eta: float = 1.5
    weighting: Weighting = "none"

    def rescale(
        self,
        losses: Float[Array, "b priors outputs"],
        true_class: Bool[Array, "b priors outputs"],
        measures: Measures,
        global_sum: Callable[[Array], Array],
    ) -> Float[Array, "b priors outputs"]:
        """The losses at the true classes times w."""
        at_true = lax.stop_gradient(jnp.where(true_class, losses, 0).sum(-1))
        power = getattr(measures, self.measure) ** self.eta
        factor = power * global_sum(at_true.sum())
        factor /= jnp.maximum(global_sum((power * at_true).sum()), 1e-12)
        return jnp.where(true_class, factor[..., None] * losses, losses)


@dataclasses.dataclass(frozen=True)
class JointQuality(_Quality):
    """Quality representation of GFL, section 3.1: the score of the true class *is* the IoU.

    Attributes:
        weighting: the measure that weights box and distribution losses. 'predicted' is the authors'
            code; they found no difference between it and 'iou'.
        measure: the label: the IoU, or the metric of the assigner.
    """

    weighting: Weighting = "predicted"
    measure: Literal["iou", "metric"] = "iou"

    soft = True

    def label(self, measures: Measures) -> Float[Array, "b priors"]:
        """The quality itself."""
        return getattr(measures, self.measure)


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
