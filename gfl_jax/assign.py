"""Which priors answer for which object: one of a detector's five choices."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gfl_jax.boxes import aligned_iou, boxes_to_distances, intersection, pairwise_iou
from gfl_jax.errors import InputError
from gfl_jax.priors import Priors
from gfl_jax.scores import Scores

BACKGROUND, IGNORED = -1, -2
"""What a prior is matched with that answers for no object; ignored ones are not trained on."""

Boxes = Float[Array, "gts 4"]
Pairs = Bool[Array, "gts priors"]
Ranges = tuple[tuple[float, float], ...]


class Objects(NamedTuple):
    """The objects of an image, padded with anything.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the canvas.
        mask: which of them exist.
        labels: class indices.
    """

    boxes: Float[Array, "*b gts 4"]
    mask: Bool[Array, "*b gts"]
    labels: Int[Array, "*b gts"]


class Predicted(NamedTuple):
    """What each prior predicts now: constants, as no gradient flows through an assignment.

    Attributes:
        scores: of each class.
        boxes: x1, y1, x2, y2 in pixels of the canvas.
    """

    scores: Scores
    boxes: Float[Array, "*b priors 4"]


class Assignment(NamedTuple):
    """What each prior answers for.

    Attributes:
        matched: index of its object, or BACKGROUND or IGNORED.
        metric: how well a positive suits its object, from 0 to 1.
    """

    matched: Int[Array, "*b priors"]
    metric: Float[Array, "*b priors"]


class _Geometric:
    """An assigner that looks at priors and objects alone: all positives suit their object (1)."""

    sees_predictions = False  # nothing is predicted for an assigner that does not look at it

    def __call__(
        self,
        priors: Priors,
        valid: Bool[Array, " priors"],
        objects: Objects,
        predicted: Predicted | None = None,
    ) -> Assignment:
        """Assigns the priors of an image; those not `valid`, in the padding, never match."""
        matched = self.match(priors, objects.boxes, valid & objects.mask[:, None])
        return Assignment(matched, jnp.ones(matched.shape))

    def match(self, priors: Priors, boxes: Boxes, exists: Pairs) -> Int[Array, " priors"]:
        """`Assignment.matched`, where `exists` says which pairs are not of padding."""
        raise NotImplementedError


def _nearest(priors: Priors, points: Float[Array, "gts 2"], exists: Pairs, k: int) -> Array:
    """Of each level the k priors whose centres are nearest to each point: indices [gts, nearest].

    The first among equals. Where fewer exist, others too. Centres of a level are a grid whose valid
    part must be a rectangle from the first cell on: the nearest are within k // 2 + 1 cells of the
    point, moved into that rectangle.
    """
    nearest, start = [], 0
    for (height, width), per_cell in zip(priors.grids, priors.per_cell, strict=True):
        end = start + height * width * per_cell
        valid = exists[:, start:end].any(0).reshape(height, width, per_cell)[..., 0]
        extent = jnp.stack([valid[0].sum(), valid[:, 0].sum()])  # columns, rows
        side = np.minimum(2 * (k // 2 + 1) + 1, [width, height])
        middle = jnp.round((points - priors.centers[start]) / priors.strides[start]).astype(int)
        first = jnp.clip(middle - side // 2, 0, jnp.maximum(extent - side, 0))
        columns, rows = first[:, :1] + np.arange(side[0]), first[:, 1:] + np.arange(side[1])
        cells = (rows[:, :, None] * width + columns[:, None, :])[..., None]
        index = start + (cells * per_cell + np.arange(per_cell)).reshape(len(points), -1)

        distance = jnp.linalg.norm(jnp.asarray(priors.centers)[index] - points[:, None], axis=-1)
        distance = jnp.where(jnp.take_along_axis(exists, index, axis=1), distance, jnp.inf)
        _, best = lax.top_k(-distance, min(k, distance.shape[1]))
        nearest.append(jnp.take_along_axis(index, best, axis=1))
        start = end
    return jnp.concatenate(nearest, axis=1)


@dataclasses.dataclass(frozen=True)
class ATSS(_Geometric):
    """Adaptive Training Sample Selection (Zhang et al., arXiv 1912.02424, algorithm 1).

    An object is matched by the candidates whose IoU reaches mean + std of all its candidates and
    whose centre is inside it (by 0.01 pixel); an anchor claimed by several objects goes to the one
    with the largest IoU.

    Attributes:
        topk: candidates per object and level, those with the nearest centres.
    """

    topk: int = 9

    def match(self, priors: Priors, boxes: Boxes, exists: Pairs) -> Int[Array, " priors"]:
        index = _nearest(priors, 0.5 * (boxes[:, :2] + boxes[:, 2:]), exists, self.topk)
        candidate = jnp.take_along_axis(exists, index, axis=1)
        iou = aligned_iou(boxes[:, None], jnp.asarray(priors.boxes)[index])  # gts candidates
        count = candidate.sum(1, keepdims=True)
        mean = jnp.where(candidate, iou, 0).sum(1, keepdims=True) / jnp.maximum(count, 1)
        squares = jnp.where(candidate, (iou - mean) ** 2, 0).sum(1, keepdims=True)
        # One candidate alone has no deviation, hence no threshold that it reaches.
        deviation = jnp.where(count > 1, jnp.sqrt(squares / jnp.maximum(count - 1, 1)), jnp.inf)

        distances = boxes_to_distances(jnp.asarray(priors.centers)[index], boxes[:, None])
        positive = candidate & (iou >= mean + deviation) & (distances.min(-1) > 0.01)
        claim = jnp.where(positive, iou, -1.0)
        largest = jnp.full(exists.shape[1], -1.0).at[index].max(claim)
        wins = positive & (claim == largest[index])
        owner = jnp.where(wins, jnp.arange(len(boxes))[:, None], len(boxes))
        first = jnp.full(exists.shape[1], len(boxes)).at[index].min(owner)
        return jnp.where(first < len(boxes), first, BACKGROUND)


@dataclasses.dataclass(frozen=True)
class MaxIoU(_Geometric):
    """Assignment by overlap, of RetinaNet (arXiv 1708.02002) and SSD (arXiv 1512.02325).

    A prior takes the object it overlaps most if their IoU reaches `positive`; it is background
    below `negative` and not trained on in between. Then each object, in their order, takes the
    priors of its own highest IoU, whatever it is.

    Attributes:
        positive: the IoU that makes a prior a positive.
        negative: the IoU below which it is background.
        force_first: whether an object takes only the first of the priors of its highest IoU.
    """

    positive: float = 0.5
    negative: float = 0.4
    force_first: bool = False

    def __post_init__(self):
        if not 0 <= self.negative <= self.positive <= 1:
            raise InputError(
                f"assigner.negative {self.negative} and assigner.positive {self.positive} must be "
                "0 <= negative <= positive <= 1"
            )

    def match(self, priors: Priors, boxes: Boxes, exists: Pairs) -> Int[Array, " priors"]:
        iou = jnp.where(exists, pairwise_iou(boxes, jnp.asarray(priors.boxes)), -1.0)
        best = iou.max(0)
        matched = jnp.where(best < self.negative, BACKGROUND, IGNORED)
        matched = jnp.where(best >= self.positive, jnp.argmax(iou, axis=0), matched)
        if self.force_first:
            closest = jnp.arange(iou.shape[1]) == jnp.argmax(iou, axis=1, keepdims=True)
        else:
            closest = iou == iou.max(1, keepdims=True)
        # The last object that claims a prior gets it.
        forced = jnp.where(closest & exists, jnp.arange(len(boxes))[:, None], -1).max(0)
        return jnp.where(forced >= 0, forced, matched)


@dataclasses.dataclass(frozen=True)
class FCOS(_Geometric):
    """Assignment by size and position (Tian et al., arXiv 1904.01355, section 3.2).

    A point answers for the smallest object that it lies inside of and whose farthest side is at a
    distance within the range of the point's level, both ends included.

    Attributes:
        ranges: of each level, in pixels.
        center_radius: the point must lie so near the object's centre, in strides, on both axes
            (center sampling); 0: anywhere inside.
    """

    ranges: Ranges = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))
    center_radius: float = 0.0

    def match(self, priors: Priors, boxes: Boxes, exists: Pairs) -> Int[Array, " priors"]:
        centers = jnp.asarray(priors.centers)
        distances = boxes_to_distances(centers, boxes[:, None])  # gts points 4
        inside = distances.min(-1) > 0
        if self.center_radius:
            center = 0.5 * (boxes[:, None, :2] + boxes[:, None, 2:])
            reach = self.center_radius * priors.strides[:, None]
            near = intersection(
                jnp.concatenate([center - reach, center + reach], -1), boxes[:, None]
            )
            inside = boxes_to_distances(centers, near).min(-1) > 0
        low, high = (priors.by_level(ends) for ends in zip(*self.ranges, strict=True))
        farthest = distances.max(-1)
        fits = inside & (low <= farthest) & (farthest <= high) & exists
        area = jnp.where(fits, jnp.prod(boxes[:, 2:] - boxes[:, :2], axis=1)[:, None], jnp.inf)
        return jnp.where(fits.any(0), jnp.argmin(area, axis=0), BACKGROUND)


@dataclasses.dataclass(frozen=True)
class FoveaBox(_Geometric):
    """Assignment of FoveaBox (Kong et al., arXiv 1904.03797, section 3.2), as in the reference.

    A level takes the objects whose sqrt(area) is within its range; each occupies the cells in the
    central `sigma` of its width and height, small objects before large ones.

    Attributes:
        ranges: of each level, in pixels, both ends included; they overlap.
        sigma: share of an object's width and height whose cells it occupies.
    """

    ranges: Ranges = ((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048))
    sigma: float = 0.4

    def match(self, priors: Priors, boxes: Boxes, exists: Pairs) -> Int[Array, " priors"]:
        side = jnp.sqrt(jnp.prod(boxes[:, 2:] - boxes[:, :2], axis=1))[:, None]
        low, high = (priors.by_level(ends) for ends in zip(*self.ranges, strict=True))
        last = np.repeat(np.array(priors.grids)[:, ::-1] - 1, priors.levels, axis=0)
        scaled = boxes[:, None] / priors.strides[:, None]  # gts points 4
        corner, half = scaled[..., :2], 0.5 * (scaled[..., 2:] - scaled[..., :2])
        # Cells from the first to the last whose middle is in the central part; both are moved into
        # the map, so that an object beyond its border occupies cells at the border.
        first_cell = jnp.clip(jnp.ceil(corner + (1 - self.sigma) * half - 0.5), 0, last)
        last_cell = jnp.clip(jnp.floor(corner + (1 + self.sigma) * half - 0.5), 0, last)
        inside = ((first_cell <= priors.cells) & (priors.cells <= last_cell)).all(-1)
        fits = inside & (low <= side) & (side <= high) & exists
        size = jnp.where(fits, side, jnp.inf)
        # Of equal sizes the last one: the reference lets objects overwrite those before.
        smallest = len(boxes) - 1 - jnp.argmin(size[::-1], axis=0)
        return jnp.where(fits.any(0), smallest, BACKGROUND)


Assigner = ATSS | MaxIoU | FCOS | FoveaBox
