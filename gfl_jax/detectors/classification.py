"""Classification losses: one of a detector's five choices.

Each says how many outputs a prior has, how outputs become scores, what each output costs, and which
priors are counted.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from gfl_jax import losses
from gfl_jax.detectors.custom import custom_function
from gfl_jax.models.heads import PRIOR_BIAS


class _Sigmoid:
    """A score for each class by itself, and all trained priors counted."""

    soft = True
    """Whether targets may be anything between 0 and 1, as joint quality makes them."""
    initial_bias = PRIOR_BIAS

    def channels(self, num_classes: int) -> int:
        """Outputs of a prior."""
        return num_classes

    def scores(self, logits: Float[Array, "*b classes"]) -> Float[Array, "*b classes"]:
        """The score of each class."""
        return jax.nn.sigmoid(logits)

    def counted(
        self,
        loss: Float[Array, "b priors"],
        positive: Bool[Array, "b priors"],
        trained: Bool[Array, "b priors"],
    ) -> Bool[Array, "b priors"]:
        """Which priors' losses are summed."""
        return trained


@dataclasses.dataclass(frozen=True)
class QualityFocal(_Sigmoid):
    """Classification by QFL. beta: how fast well-estimated examples lose their weight."""

    beta: float = 2.0

    def __post_init__(self):
        if self.beta < 0:
            raise ValueError(f"detector.classification.beta is {self.beta}; it must be >= 0")

    def __call__(
        self, logits: Float[Array, "*b classes"], targets: Float[Array, "*b classes"]
    ) -> Float[Array, "*b classes"]:
        return losses.quality_focal_loss(logits, targets, self.beta)


@dataclasses.dataclass(frozen=True)
class Focal(_Sigmoid):
    """Classification by the focal loss of RetinaNet, of hard labels; see `sigmoid_focal_loss`."""

    alpha: float = 0.25
    gamma: float = 2.0

    soft = False

    def __call__(
        self, logits: Float[Array, "*b classes"], targets: Float[Array, "*b classes"]
    ) -> Float[Array, "*b classes"]:
        return losses.sigmoid_focal_loss(logits, targets, self.alpha, self.gamma)


@dataclasses.dataclass(frozen=True)
class Varifocal(_Sigmoid):
    """Classification by the varifocal loss; see `varifocal_loss`."""

    alpha: float = 0.75
    gamma: float = 2.0

    def __call__(
        self, logits: Float[Array, "*b classes"], targets: Float[Array, "*b classes"]
    ) -> Float[Array, "*b classes"]:
        return losses.varifocal_loss(logits, targets, self.alpha, self.gamma)


@dataclasses.dataclass(frozen=True)
class SoftmaxMining:
    """Softmax over classes and background, of positives and the hardest negatives (SSD).

    negatives: as many for each positive of the image, those of the largest loss (section 2.2 of
    arXiv 1512.02325). An image without positives is not trained on. The background comes last.
    """

    negatives: float = 3.0

    soft = False
    initial_bias = 0.0

    def channels(self, num_classes: int) -> int:
        """Outputs of a prior."""
        return num_classes + 1

    def scores(self, logits: Float[Array, "*b outputs"]) -> Float[Array, "*b classes"]:
        """The score of each class, without the background."""
        return jax.nn.softmax(logits)[..., :-1]

    def __call__(
        self, logits: Float[Array, "*b outputs"], targets: Float[Array, "*b classes"]
    ) -> Float[Array, "*b outputs"]:
        background = 1 - targets.sum(-1, keepdims=True)
        targets = jnp.concatenate([targets, background], -1)
        return -targets * jax.nn.log_softmax(logits)

    def counted(
        self,
        loss: Float[Array, "b priors"],
        positive: Bool[Array, "b priors"],
        trained: Bool[Array, "b priors"],
    ) -> Bool[Array, "b priors"]:
        """Which priors' losses are summed."""
        negative = trained & ~positive
        hardness = lax.stop_gradient(jnp.where(negative, loss, -jnp.inf))
        rank = jnp.argsort(jnp.argsort(-hardness, axis=1), axis=1)
        wanted = self.negatives * positive.sum(1, keepdims=True)
        return positive | (negative & (rank < wanted))


@dataclasses.dataclass(frozen=True)
class CustomClassification(_Sigmoid):
    """A loss of your own: `function(logits, targets)`, [..., classes] each, to losses alike.

    function: 'path/to/file.py:name' or 'package.module:name'.  Targets are in [0, 1]: with joint
    quality the IoU at the class of a positive, otherwise 1; 0 elsewhere.
    """

    function: str = ""

    def __post_init__(self):
        self._function()

    def _function(self) -> Callable:
        return custom_function(self.function, "detector.classification.function")

    def __call__(
        self, logits: Float[Array, "*b classes"], targets: Float[Array, "*b classes"]
    ) -> Float[Array, "*b classes"]:
        loss = jnp.asarray(self._function()(logits, lax.stop_gradient(targets)), jnp.float32)
        if loss.shape != logits.shape:
            raise ValueError(
                f"{self.function} returned shape {loss.shape} for logits of shape {logits.shape}; "
                "it must be the same: the caller reduces"
            )
        return loss


Classification = QualityFocal | Focal | Varifocal | SoftmaxMining | CustomClassification
