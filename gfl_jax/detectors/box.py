"""Box representations, and what pulls boxes towards objects: two of a detector's five choices.

A representation turns the regression output of a prior into a box and back. Boxes, points and
anchors are in strides of the prior's level: objects of all levels have similar sizes in them.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gfl_jax import losses
from gfl_jax.boxes import boxes_to_distances, distances_to_boxes
from gfl_jax.detectors.custom import BuiltIn, Custom
from gfl_jax.detectors.dirac import Deltas, Distances, LogDistances
from gfl_jax.detectors.matching import Frame
from gfl_jax.detectors.sides import Sides
from gfl_jax.errors import InputError


class Regression(NamedTuple):
    """A box and the numbers that the representation describes it by.

    Attributes:
        boxes: x1, y1, x2, y2 in strides.
        parameters: see `encode` of the representation.
    """

    boxes: Float[Array, "*priors 4"]
    parameters: Float[Array, "*priors 4"]


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Each side as a normal distribution over distances: its mean and the log of its variance.

    Trained by the negative log-likelihood (He et al., arXiv 1809.08545; table 5 of the paper); the
    mean is the box. In strides.

    Attributes:
        limit: the log-variance stays within -limit and limit.
    """

    limit: float = 7.0

    channels = 8
    needs_anchors = False

    def parameters(self, raw: Float[Array, "*priors 8"]) -> Float[Array, "*priors 4"]:
        """The means."""
        return raw[..., :4]

    def decode(self, raw: Float[Array, "*priors 8"], frame: Frame) -> Float[Array, "*priors 4"]:
        """Boxes in strides."""
        return distances_to_boxes(frame.centers, self.parameters(raw))

    def encode(self, boxes: Float[Array, "*priors 4"], frame: Frame) -> Float[Array, "*priors 4"]:
        """The distances of these boxes' sides in strides."""
        return boxes_to_distances(frame.centers, boxes)

    def spread(self, raw: Float[Array, "*priors 8"]) -> Float[Array, "*priors 4"]:
        """Standard deviation of each side, in strides."""
        return jnp.exp(0.5 * jnp.clip(raw[..., 4:], -self.limit, self.limit))

    def sides(self, raw: Float[Array, "*priors 8"], frame: Frame) -> Sides:
        """The distribution of each side at 25 positions within three standard deviations."""
        steps = jnp.linspace(-3.0, 3.0, 25)
        positions = self.decode(raw, frame)[..., None] + self.spread(raw)[..., None] * steps
        return Sides(positions, jnp.broadcast_to(jax.nn.softmax(-0.5 * steps**2), positions.shape))

    def extra_losses(
        self, raw: Float[Array, "*priors 8"], boxes: Float[Array, "*priors 4"], frame: Frame
    ) -> dict[str, Float[Array, " *priors"]]:
        """loss_nll: mean over the sides of (x - y)^2 / (2 sigma^2) + log(sigma^2) / 2."""
        log_variance = jnp.clip(raw[..., 4:], -self.limit, self.limit)
        target = jax.lax.stop_gradient(self.encode(boxes, frame))
        loss = losses.gaussian_nll_loss(self.parameters(raw), log_variance, target)
        return {"loss_nll": loss.mean(-1)}


@dataclasses.dataclass(frozen=True)
class GeneralDistribution:
    """Box representation of GFL, section 3.2: each side is a distribution over n + 1 bins.

    Attributes:
        n: last bin.
        delta: bin width, in strides of the level.
    """

    n: int = 16
    delta: float = 1.0

    needs_anchors = False

    def __post_init__(self):
        if self.n < 1 or self.delta <= 0:
            raise InputError(f"detector.box needs n >= 1 and delta > 0, it is {self}")

    @property
    def channels(self) -> int:
        """Regression channels of a prior."""
        return 4 * (self.n + 1)

    def logits(self, raw: Float[Array, "*priors channels"]) -> Float[Array, "*priors 4 bins"]:
        """The head's channels as one row of bin logits per side."""
        return raw.reshape(*raw.shape[:-1], 4, self.n + 1)

    def integral(self, logits: Float[Array, "*priors 4 bins"]) -> Float[Array, "*priors 4"]:
        """Expected distance of each side, in strides (equation 4): sum of S_i * y_i."""
        y = self.delta * jnp.arange(self.n + 1, dtype=jnp.float32)
        return (jax.nn.softmax(logits, axis=-1) * y).sum(-1)

    def parameters(self, raw: Float[Array, "*priors channels"]) -> Float[Array, "*priors 4"]:
        """Expected distances (left, top, right, bottom), in strides."""
        return self.integral(self.logits(raw))

    def decode(
        self, raw: Float[Array, "*priors channels"], frame: Frame
    ) -> Float[Array, "*priors 4"]:
        """Boxes in strides."""
        return distances_to_boxes(frame.centers, self.parameters(raw))

    def encode(self, boxes: Float[Array, "*priors 4"], frame: Frame) -> Float[Array, "*priors 4"]:
        """The distances of these boxes' sides in strides."""
        return boxes_to_distances(frame.centers, boxes)

    def spread(self, raw: Float[Array, "*priors channels"]) -> Float[Array, "*priors 4"]:
        """Standard deviation of each side's distribution, in strides."""
        logits = self.logits(raw)
        y = self.delta * jnp.arange(self.n + 1, dtype=jnp.float32)
        deviation = y - self.integral(logits)[..., None]
        return jnp.sqrt((jax.nn.softmax(logits, axis=-1) * deviation**2).sum(-1))

    def sides(self, raw: Float[Array, "*priors channels"], frame: Frame) -> Sides:
        """The distribution of each side over the positions of its bins, in strides."""
        y = self.delta * jnp.arange(self.n + 1, dtype=jnp.float32)
        bins = jnp.tile(y[:, None], 4)
        positions = distances_to_boxes(frame.centers[..., None, :], bins)
        return Sides(positions.swapaxes(-1, -2), jax.nn.softmax(self.logits(raw), axis=-1))

    def bins(self, distances: Float[Array, "*priors 4"]) -> Float[Array, "*priors 4"]:
        """Distances in strides as DFL targets, in bins within [0, n - 0.1]."""
        return jnp.clip(distances / self.delta, 0.0, self.n - 0.1)

    def extra_losses(
        self, raw: Float[Array, "*priors channels"], boxes: Float[Array, "*priors 4"], frame: Frame
    ) -> dict[str, Float[Array, " *priors"]]:
        """loss_dfl: mean over the sides of DFL."""
        bins = self.bins(self.encode(boxes, frame))
        return {"loss_dfl": losses.distribution_focal_loss(self.logits(raw), bins).mean(-1)}


BoxRepresentation = GeneralDistribution | Distances | LogDistances | Deltas | Gaussian


@dataclasses.dataclass(frozen=True)
class Overlap(BuiltIn):
    """A loss of the overlap between box and object; see `gfl_jax.losses`.

    Attributes:
        loss: which one.
    """

    loss: Literal["giou", "iou", "diou", "ciou"] = "giou"

    def __call__(self, predicted: Regression, target: Regression) -> Float[Array, " *priors"]:
        function = {
            "giou": losses.giou_loss,
            "iou": losses.iou_loss,
            "diou": losses.diou_loss,
            "ciou": losses.ciou_loss,
        }[self.loss]
        return function(predicted.boxes, target.boxes)


@dataclasses.dataclass(frozen=True)
class SmoothL1(BuiltIn):
    """Smooth L1 loss of the parameters, summed over the four.

    Attributes:
        beta: difference at which the parabola ends, in units of the parameters; 0 is L1.
    """

    beta: float = 0.0

    def __call__(self, predicted: Regression, target: Regression) -> Float[Array, " *priors"]:
        pred, labels = predicted.parameters, jax.lax.stop_gradient(target.parameters)
        if self.beta == 0:
            return losses.l1_loss(pred, labels).sum(-1)
        return losses.smooth_l1_loss(pred, labels, self.beta).sum(-1)


@dataclasses.dataclass(frozen=True)
class CustomBoxLoss(Custom):
    """A custom loss: `function(predicted, target)`, boxes [..., 4] in strides to losses [...].

    Negatives are passed too, with finite boxes, and their losses are multiplied by zero: values and
    gradients must be finite.

    Attributes:
        function: 'path/to/file.py:name' or 'package.module:name'.
    """

    function: str = ""

    field = "detector.box_loss.function"

    def __call__(self, predicted: Regression, target: Regression) -> Float[Array, " *priors"]:
        return self.call(predicted.boxes, target.boxes, shape=predicted.boxes.shape[:-1])


BoxLoss = Overlap | SmoothL1 | CustomBoxLoss
