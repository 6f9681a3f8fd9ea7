"""Box representations, and what pulls boxes towards objects: two of a detector's five choices.

A representation turns the regression output of a prior into a box and back. Boxes, points and
anchors are in strides of the prior's level here, where objects of all levels look alike.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gfl_jax import losses
from gfl_jax.boxes import boxes_to_distances, distances_to_boxes
from gfl_jax.detectors.custom import custom_function
from gfl_jax.priors import Priors


class Frame(NamedTuple):
    """Priors in strides of their level: centres, boxes, and the stride itself in pixels."""

    centers: Float[Array, "*priors 2"]
    boxes: Float[Array, "*priors 4"]
    strides: Float[Array, " *priors"]


def frame_of(priors: Priors) -> Frame:
    """The priors of a canvas as representations see them."""
    strides = priors.strides[:, None]
    arrays = priors.centers / strides, priors.boxes / strides, priors.strides
    return Frame(*map(jnp.asarray, arrays))


class Regression(NamedTuple):
    """A box and the numbers that the representation describes it by."""

    boxes: Float[Array, "*priors 4"]
    parameters: Float[Array, "*priors 4"]


class _Dirac:
    """Four numbers and nothing about their certainty."""

    channels = 4

    def extra_losses(
        self, raw: Float[Array, "*priors 4"], boxes: Float[Array, "*priors 4"], frame: Frame
    ) -> dict[str, Float[Array, " *priors"]]:
        """None."""
        return {}


@dataclasses.dataclass(frozen=True)
class Distances(_Dirac):
    """A number for each side, its distance from the prior's centre: a Dirac delta (FCOS).

    activation: makes the output a distance: exp (FCOS), or relu (its improved form).
    unit: of that distance.
    """

    activation: Literal["exp", "relu"] = "relu"
    unit: Literal["strides", "pixels"] = "strides"

    def parameters(self, raw: Float[Array, "*priors 4"]) -> Float[Array, "*priors 4"]:
        """Distances (left, top, right, bottom) in `unit`."""
        return _exp(raw) if self.activation == "exp" else jax.nn.relu(raw)

    def decode(self, raw: Float[Array, "*priors 4"], frame: Frame) -> Float[Array, "*priors 4"]:
        """Boxes in strides."""
        return distances_to_boxes(frame.centers, self.parameters(raw) / self._unit(frame))

    def encode(self, boxes: Float[Array, "*priors 4"], frame: Frame) -> Float[Array, "*priors 4"]:
        """The parameters of these boxes."""
        return boxes_to_distances(frame.centers, boxes) * self._unit(frame)

    def _unit(self, frame: Frame) -> Float[Array, "*priors 1"] | float:
        return frame.strides[..., None] if self.unit == "pixels" else 1.0


@dataclasses.dataclass(frozen=True)
class LogDistances(_Dirac):
    """The logarithm of each side's distance (FoveaBox, arXiv 1904.03797, equation 3).

    base: distance of the parameter 0, in strides.
    limit: targets lie within base / limit and base * limit.
    """

    base: float = 2.0
    limit: float = 16.0

    def parameters(self, raw: Float[Array, "*priors 4"]) -> Float[Array, "*priors 4"]:
        """The output itself."""
        return raw

    def decode(self, raw: Float[Array, "*priors 4"], frame: Frame) -> Float[Array, "*priors 4"]:
        """Boxes in strides."""
        return distances_to_boxes(frame.centers, self.base * _exp(raw))

    def encode(self, boxes: Float[Array, "*priors 4"], frame: Frame) -> Float[Array, "*priors 4"]:
        """The parameters of these boxes."""
        distances = boxes_to_distances(frame.centers, boxes) / self.base
        return jnp.log(jnp.clip(distances, 1 / self.limit, self.limit))


@dataclasses.dataclass(frozen=True)
class Deltas(_Dirac):
    """Shift and growth of an anchor (R-CNN, arXiv 1311.2524, appendix C): another Dirac delta.

    (dx, dy) = shift of the centre / size of the anchor, (dw, dh) = log(size / size of the anchor).
    stds: what these four are divided by.
    """

    stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)

    def parameters(self, raw: Float[Array, "*priors 4"]) -> Float[Array, "*priors 4"]:
        """The output itself: (dx, dy, dw, dh) / stds."""
        return raw

    def decode(self, raw: Float[Array, "*priors 4"], frame: Frame) -> Float[Array, "*priors 4"]:
        """Boxes in strides, between 16/1000 and 1000/16 times as wide and high as the anchor."""
        deltas = raw * np.array(self.stds, np.float32)
        center, size = _center_and_size(frame.boxes)
        limit = math.log(1000 / 16)
        center = center + deltas[..., :2] * size
        half = 0.5 * size * jnp.exp(jnp.clip(deltas[..., 2:], -limit, limit))
        return jnp.concatenate([center - half, center + half], axis=-1)

    def encode(self, boxes: Float[Array, "*priors 4"], frame: Frame) -> Float[Array, "*priors 4"]:
        """The parameters of these boxes, which have a size."""
        center, size = _center_and_size(frame.boxes)
        box_center, box_size = _center_and_size(boxes)
        growth = jnp.log(jnp.maximum(box_size, 1e-6) / size)
        deltas = jnp.concatenate([(box_center - center) / size, growth], axis=-1)
        return deltas / np.array(self.stds, np.float32)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Each side as a normal distribution over distances: its mean and the log of its variance.

    Trained by the negative log-likelihood (He et al., arXiv 1809.08545; table 5 of the paper); the
    mean is the box. In strides.
    limit: the log-variance stays within -limit and limit.
    """

    limit: float = 7.0

    channels = 8

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

    n: last bin.  delta: bin width, in strides of the level.
    """

    n: int = 16
    delta: float = 1.0

    def __post_init__(self):
        if self.n < 1 or self.delta <= 0:
            raise ValueError(f"detector.box needs n >= 1 and delta > 0, it is {self}")

    @property
    def channels(self) -> int:
        """Regression channels of a prior."""
        return 4 * (self.n + 1)

    def logits(self, raw: Float[Array, "*priors channels"]) -> Float[Array, "*priors 4 bins"]:
        """The head's channels as one row of bin logits a side."""
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
class Overlap:
    """A loss of the overlap between box and object; see `gfl_jax.losses`."""

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
class SmoothL1:
    """Smooth L1 loss of the parameters, summed over the four; beta 0 is L1."""

    beta: float = 0.0

    def __call__(self, predicted: Regression, target: Regression) -> Float[Array, " *priors"]:
        found, wanted = predicted.parameters, jax.lax.stop_gradient(target.parameters)
        if self.beta == 0:
            return losses.l1_loss(found, wanted).sum(-1)
        return losses.smooth_l1_loss(found, wanted, self.beta).sum(-1)


@dataclasses.dataclass(frozen=True)
class CustomBoxLoss:
    """A loss of your own: `function(predicted, target)`, boxes [..., 4] in strides to losses [...].

    function: 'path/to/file.py:name' or 'package.module:name'. Negatives come too, with finite
    boxes, and their losses are multiplied by zero: values and gradients must be finite.
    """

    function: str = ""

    def __post_init__(self):
        custom_function(self.function, "detector.box_loss.function")

    def __call__(self, predicted: Regression, target: Regression) -> Float[Array, " *priors"]:
        function = custom_function(self.function, "detector.box_loss.function")
        loss = jnp.asarray(function(predicted.boxes, target.boxes), jnp.float32)
        if loss.shape != predicted.boxes.shape[:-1]:
            raise ValueError(
                f"{self.function} returned shape {loss.shape} for boxes of shape "
                f"{predicted.boxes.shape}; it must be {predicted.boxes.shape[:-1]}"
            )
        return loss


BoxLoss = Overlap | SmoothL1 | CustomBoxLoss


def _exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """e^x, x no larger than 40: areas of such boxes are finite in float32, and so are losses."""
    return jnp.exp(jnp.minimum(x, 40.0))


def _center_and_size(
    boxes: Float[Array, "*n 4"],
) -> tuple[Float[Array, "*n 2"], Float[Array, "*n 2"]]:
    return 0.5 * (boxes[..., :2] + boxes[..., 2:]), boxes[..., 2:] - boxes[..., :2]
