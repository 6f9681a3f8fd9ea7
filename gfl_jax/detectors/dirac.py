"""Boxes as Dirac deltas: four numbers per prior and nothing about how certain they are.

The representations of FCOS, FoveaBox, ATSS, RetinaNet and SSD. Boxes, points and anchors are in
strides of the prior's level.
"""

import abc
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gfl_jax.boxes import boxes_to_distances, distances_to_boxes
from gfl_jax.detectors.matching import Frame
from gfl_jax.detectors.sides import Sides, certain


class _Dirac(abc.ABC):
    """Four numbers; there is nothing to train besides the box."""

    channels = 4
    needs_anchors = False

    def extra_losses(
        self, raw: Float[Array, "*priors 4"], boxes: Float[Array, "*priors 4"], frame: Frame
    ) -> dict[str, Float[Array, " *priors"]]:
        """None."""
        return {}

    @abc.abstractmethod
    def decode(self, raw: Float[Array, "*priors 4"], frame: Frame) -> Float[Array, "*priors 4"]:
        """Boxes in strides."""

    def sides(self, raw: Float[Array, "*priors 4"], frame: Frame) -> Sides:
        """Each side of the box, with certainty."""
        return certain(self.decode(raw, frame))


@dataclasses.dataclass(frozen=True)
class Distances(_Dirac):
    """A number for each side, its distance from the prior's centre (FCOS).

    Attributes:
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

    Attributes:
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
    """Shift and growth of an anchor (R-CNN, arXiv 1311.2524, appendix C).

    (dx, dy) = shift of the centre / size of the anchor, (dw, dh) = log(size / size of the anchor).

    Attributes:
        stds: what these four are divided by.
    """

    stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)

    needs_anchors = True

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


def _exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """e^x, x no larger than 40: areas of such boxes are finite in float32, and so are losses."""
    return jnp.exp(jnp.minimum(x, 40.0))


def _center_and_size(
    boxes: Float[Array, "*n 4"],
) -> tuple[Float[Array, "*n 2"], Float[Array, "*n 2"]]:
    return 0.5 * (boxes[..., :2] + boxes[..., 2:]), boxes[..., 2:] - boxes[..., :2]
