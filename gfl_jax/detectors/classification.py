"""Classification losses: one of a detector's five choices.

Each says how many outputs a prior has, how outputs become scores, what each output costs, and which
priors are counted.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from gfl_jax import losses
from gfl_jax.detectors.custom import BuiltIn, Custom
from gfl_jax.errors import InputError
from gfl_jax.models.heads import PRIOR_BIAS
from gfl_jax.scores import Logits, Scores, as_logits, as_scores, probability


class _Sigmoid:
    """A score for each class by itself, and all trained priors counted."""

    soft = True
    """Whether targets may be anything between 0 and 1, as joint quality makes them."""
    initial_bias = PRIOR_BIAS

    def channels(self, num_classes: int) -> int:
        """Outputs of a prior."""
        return num_classes

    def scores(self, logits: Logits) -> Float[Array, "*b classes"]:
        """The score of each class."""
        return probability(logits)

    def log_scores(self, logits: Logits) -> Scores:
        """The score of each class as the pair (log s, log(1 - s))."""
        return as_scores(logits)

    def counted(
        self,
        loss: Float[Array, "b priors"],
        positive: Bool[Array, "b priors"],
        trained: Bool[Array, "b priors"],
    ) -> Bool[Array, "b priors"]:
        """Which priors' losses are summed."""
        return trained


@dataclasses.dataclass(frozen=True)
class QualityFocal(_Sigmoid, BuiltIn):
    """Classification by QFL, see `gfl_jax.losses.quality_focal_loss`.

    Attributes:
        beta: how fast well-estimated examples lose their weight, >= 0.
    """

    beta: float = 2.0

    def __post_init__(self):
        if self.beta < 0:
            raise InputError(f"detector.classification.beta is {self.beta}; it must be >= 0")

    def __call__(
        self, logits: Logits, targets: Float[Array, "*b classes"]
    ) -> Float[Array, "*b classes"]:
        return losses.quality_focal_loss(logits, targets, self.beta)


@dataclasses.dataclass(frozen=True)
class Focal(_Sigmoid, BuiltIn):
    """Classification by RetinaNet's focal loss, see `gfl_jax.losses.sigmoid_focal_loss`.

    Attributes:
        alpha: weight of the labels 1.
        gamma: focusing parameter, >= 0.
    """

    alpha: float = 0.25
    gamma: float = 2.0

    soft = False

    def __call__(
        self, logits: Logits, targets: Float[Array, "*b classes"]
    ) -> Float[Array, "*b classes"]:
        return losses.sigmoid_focal_loss(logits, targets, self.alpha, self.gamma)


@dataclasses.dataclass(frozen=True)
class Varifocal(_Sigmoid, BuiltIn):
    """Classification by the varifocal loss, see `gfl_jax.losses.varifocal_loss`.

    Attributes:
        alpha: weight of the negatives.
        gamma: focusing parameter of the negatives, >= 0.
    """

    alpha: float = 0.75
    gamma: float = 2.0

    def __call__(
        self, logits: Logits, targets: Float[Array, "*b classes"]
    ) -> Float[Array, "*b classes"]:
        return losses.varifocal_loss(logits, targets, self.alpha, self.gamma)


@dataclasses.dataclass(frozen=True)
class SoftmaxMining(BuiltIn):
    """Softmax over classes and background, of positives and the hardest negatives (SSD).

    Section 2.2 of arXiv 1512.02325. An image without positives is not trained on. The background
    comes last.

    Attributes:
        negatives: as many for each positive of the image, those of the largest loss.
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

    def log_scores(self, logits: Float[Array, "*b outputs"]) -> Scores:
        """The score of each class as the pair (log s, log(1 - s)), without the background."""
        log_score = jax.nn.log_softmax(logits)[..., :-1]
        return Scores(log_score, jnp.log(-jnp.expm1(log_score)))

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
        """Which priors' losses are summed; of equally hard negatives the first ones."""
        negative = trained & ~positive
        hardness = lax.stop_gradient(jnp.where(negative, loss, -jnp.inf))
        count = jnp.ceil(self.negatives * positive.sum(1, keepdims=True)).astype(int)
        last = jnp.clip(count, 1, loss.shape[1]) - 1
        threshold = jnp.take_along_axis(-jnp.sort(-hardness, axis=1), last, axis=1)
        harder, equal = hardness > threshold, hardness == threshold
        among_first = jnp.cumsum(equal, axis=1) <= count - harder.sum(1, keepdims=True)
        return positive | (negative & (harder | (equal & among_first)) & (count > 0))


@dataclasses.dataclass(frozen=True)
class CustomClassification(_Sigmoid, Custom):
    """A custom loss: `function(logits, targets)`, [..., classes] each, to losses of that shape.

    Targets are in [0, 1]: with joint quality the IoU at the class of a positive, otherwise 1; 0
    elsewhere.

    Attributes:
        function: 'path/to/file.py:name' or 'package.module:name'.
    """

    function: str = ""

    field = "detector.classification.function"

    def __call__(
        self, logits: Logits, targets: Float[Array, "*b classes"]
    ) -> Float[Array, "*b classes"]:
        return self.call(as_logits(logits), lax.stop_gradient(targets), shape=targets.shape)


Classification = QualityFocal | Focal | Varifocal | SoftmaxMining | CustomClassification
