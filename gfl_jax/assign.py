"""Which priors answer for which object."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gfl_jax.boxes import boxes_to_distances, intersection, pairwise_iou
from gfl_jax.priors import Priors

BACKGROUND, IGNORED = -1, -2
"""What a prior is matched with that answers for no object; ignored ones are not trained on."""


def _nearest(distance: Float[Array, "gts anchors"], k: int) -> Bool[Array, "gts anchors"]:
    """Marks each row's k smallest finite entries; the lowest index first among equals.

    Extracts one minimum after another: no sort, gather or scatter, which are slow on TPUs.
    """
    index = jnp.arange(distance.shape[1])

    def take_minimum(_, carry):
        distance, taken = carry
        nearest = index == jnp.argmin(distance, axis=1, keepdims=True)
        taken |= nearest & (distance < jnp.inf)
        return jnp.where(nearest, jnp.inf, distance), taken

    none = jnp.zeros(distance.shape, bool)
    return lax.fori_loop(0, min(k, distance.shape[1]), take_minimum, (distance, none))[1]


@dataclasses.dataclass(frozen=True)
class ATSS:
    """Adaptive Training Sample Selection (Zhang et al., arXiv 1912.02424, algorithm 1).

    topk: candidates per object and level, those with the nearest centres.
    """

    topk: int = 9

    def __call__(
        self,
        priors: Priors,
        valid: Bool[Array, " anchors"],
        boxes: Float[Array, "gts 4"],
        mask: Bool[Array, " gts"],
    ) -> Int[Array, " anchors"]:
        """Assign the anchors of one image.

        Args:
            priors: the anchors of the canvas.
            valid: anchors that are not in the padding; the others are never candidates.
            boxes: objects, x1 y1 x2 y2 in pixels, padded with anything.
            mask: which of the objects exist.

        Returns:
            The object's index for each anchor, or BACKGROUND. An object is matched by the
            candidates whose IoU reaches mean + std of all its candidates and whose centre is inside
            it (by 0.01 pixel); an anchor wanted by several goes to the one with the largest IoU.
        """
        iou = pairwise_iou(boxes, jnp.asarray(priors.boxes))  # gts anchors
        offset = priors.centers - 0.5 * (boxes[:, None, :2] + boxes[:, None, 2:])
        distance = jnp.sqrt((offset**2).sum(-1))
        distance = jnp.where(valid & mask[:, None], distance, jnp.inf)

        start, candidates = 0, []
        for size in priors.levels:
            candidates.append(_nearest(distance[:, start : start + size], self.topk))
            start += size
        candidate = jnp.concatenate(candidates, axis=1)

        count = candidate.sum(1, keepdims=True)
        mean = jnp.where(candidate, iou, 0).sum(1, keepdims=True) / jnp.maximum(count, 1)
        squares = jnp.where(candidate, (iou - mean) ** 2, 0).sum(1, keepdims=True)
        # One candidate alone has no deviation, hence no threshold that it reaches.
        deviation = jnp.where(count > 1, jnp.sqrt(squares / jnp.maximum(count - 1, 1)), jnp.inf)

        x, y = priors.centers.T
        x1, y1, x2, y2 = (side[:, None] for side in boxes.T)
        inside = jnp.minimum(jnp.minimum(x - x1, y - y1), jnp.minimum(x2 - x, y2 - y)) > 0.01

        positive = candidate & (iou >= mean + deviation) & inside
        claim = jnp.where(positive, iou, -1.0)
        return jnp.where(positive.any(0), jnp.argmax(claim, axis=0), BACKGROUND)


@dataclasses.dataclass(frozen=True)
class MaxIoU:
    """Assignment by overlap, of RetinaNet (arXiv 1708.02002) and SSD (arXiv 1512.02325).

    A prior takes the object it overlaps most if their IoU reaches `positive`; it is background
    below `negative` and not trained on in between. Then each object, in their order, takes the
    priors of its own highest IoU, whatever it is: all of them, or (`force_first`) the first one.
    """

    positive: float = 0.5
    negative: float = 0.4
    force_first: bool = False

    def __post_init__(self):
        if not 0 <= self.negative <= self.positive <= 1:
            raise ValueError(
                f"assigner.negative {self.negative} and assigner.positive {self.positive} must be "
                "0 <= negative <= positive <= 1"
            )

    def __call__(
        self,
        priors: Priors,
        valid: Bool[Array, " priors"],
        boxes: Float[Array, "gts 4"],
        mask: Bool[Array, " gts"],
    ) -> Int[Array, " priors"]:
        """Assign the priors of one image; arguments and result as for `ATSS`."""
        exists = valid & mask[:, None]
        iou = jnp.where(exists, pairwise_iou(boxes, jnp.asarray(priors.boxes)), -1.0)
        best = iou.max(0)
        matched = jnp.where(best < self.negative, BACKGROUND, IGNORED)
        matched = jnp.where(best >= self.positive, jnp.argmax(iou, axis=0), matched)
        if self.force_first:
            own = jnp.arange(iou.shape[1]) == jnp.argmax(iou, axis=1, keepdims=True)
        else:
            own = iou == iou.max(1, keepdims=True)
        # The last object that claims a prior gets it.
        forced = jnp.where(own & exists, jnp.arange(len(boxes))[:, None], -1).max(0)
        return jnp.where(forced >= 0, forced, matched)


@dataclasses.dataclass(frozen=True)
class FCOS:
    """Assignment by size and position (Tian et al., arXiv 1904.01355, section 3.2).

    A point answers for the smallest object that it lies inside of and whose farthest side is at a
    distance within the range of the point's level, both ends included.
    ranges: of each level, in pixels.
    center_radius: the point must lie so near the object's centre, in strides, on both axes (center
        sampling); 0: anywhere inside.
    """

    ranges: tuple[tuple[float, float], ...] = (
        (-1, 64),
        (64, 128),
        (128, 256),
        (256, 512),
        (512, 1e8),
    )
    center_radius: float = 0.0

    def __call__(
        self,
        priors: Priors,
        valid: Bool[Array, " points"],
        boxes: Float[Array, "gts 4"],
        mask: Bool[Array, " gts"],
    ) -> Int[Array, " points"]:
        """Assign the points of one image; arguments and result as for `ATSS`."""
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
        fits = inside & (low <= farthest) & (farthest <= high) & valid & mask[:, None]
        area = jnp.where(fits, jnp.prod(boxes[:, 2:] - boxes[:, :2], axis=1)[:, None], jnp.inf)
        return jnp.where(fits.any(0), jnp.argmin(area, axis=0), BACKGROUND)


@dataclasses.dataclass(frozen=True)
class FoveaBox:
    """Assignment of FoveaBox (Kong et al., arXiv 1904.03797, section 3.2), as in the reference.

    A level takes the objects whose sqrt(area) is within its range; each occupies the cells in the
    central `sigma` of its width and height, small objects before large ones.
    ranges: in pixels, both ends included; they overlap.
    """

    ranges: tuple[tuple[float, float], ...] = (
        (1, 64),
        (32, 128),
        (64, 256),
        (128, 512),
        (256, 2048),
    )
    sigma: float = 0.4

    def __call__(
        self,
        priors: Priors,
        valid: Bool[Array, " points"],
        boxes: Float[Array, "gts 4"],
        mask: Bool[Array, " gts"],
    ) -> Int[Array, " points"]:
        """Assign the points of one image; arguments and result as for `ATSS`."""
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
        fits = inside & (low <= side) & (side <= high) & valid & mask[:, None]
        size = jnp.where(fits, side, jnp.inf)
        # Of equal sizes the last one: the reference lets objects overwrite those before.
        smallest = len(boxes) - 1 - jnp.argmin(size[::-1], axis=0)
        return jnp.where(fits.any(0), smallest, BACKGROUND)


Assigner = ATSS | MaxIoU | FCOS | FoveaBox


def assign_batch(
    assigner: Assigner,
    priors: Priors,
    valid: Bool[Array, "b priors"],
    boxes: Float[Array, "b gts 4"],
    mask: Bool[Array, "b gts"],
) -> Int[Array, "b priors"]:
    """`assigner` over a batch; no gradient."""
    matched = jax.vmap(lambda valid, boxes, mask: assigner(priors, valid, boxes, mask))
    return lax.stop_gradient(matched(valid, boxes, mask))
