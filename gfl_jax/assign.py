"""Which anchors answer for which object."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gfl_jax.boxes import pairwise_iou
from gfl_jax.priors import Priors


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
            The object's index for each anchor, -1 for background. An object is matched by the
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
        return jnp.where(positive.any(0), jnp.argmax(claim, axis=0), -1)


def assign_batch(
    assigner: ATSS,
    priors: Priors,
    valid: Bool[Array, "b anchors"],
    boxes: Float[Array, "b gts 4"],
    mask: Bool[Array, "b gts"],
) -> Int[Array, "b anchors"]:
    """`assigner` over a batch; no gradient."""
    matched = jax.vmap(lambda valid, boxes, mask: assigner(priors, valid, boxes, mask))
    return lax.stop_gradient(matched(valid, boxes, mask))
