"""Boxes (x1, y1, x2, y2) in pixels and the overlap between them.

Everything is computed in float32. An inverted box (x2 < x1 or y2 < y1) counts as empty.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-6  # floor of every area that divides


def sizes(boxes: Float[Array, "*batch 4"]) -> Float[Array, "*batch 2"]:
    """Width and height of each box, never negative."""
    boxes = jnp.asarray(boxes, jnp.float32)
    extent = boxes[..., 2:] - boxes[..., :2]
    return jnp.where(extent >= 0, extent, 0)  # unlike maximum, an empty box keeps its gradient


def area(boxes: Float[Array, "*batch 4"]) -> Float[Array, "*batch"]:
    """Area of each box."""
    extent = sizes(boxes)
    return extent[..., 0] * extent[..., 1]


def intersection(
    a: Float[Array, "*#batch 4"], b: Float[Array, "*#batch 4"]
) -> Float[Array, "*batch 4"]:
    """The box common to a and b; inverted, thus empty, where they are disjoint."""
    top_left = jnp.maximum(a[..., :2], b[..., :2])
    bottom_right = jnp.minimum(a[..., 2:], b[..., 2:])
    return jnp.concatenate([top_left, bottom_right], axis=-1)


def enclosure(
    a: Float[Array, "*#batch 4"], b: Float[Array, "*#batch 4"]
) -> Float[Array, "*batch 4"]:
    """The smallest box that contains a and b."""
    top_left = jnp.minimum(a[..., :2], b[..., :2])
    bottom_right = jnp.maximum(a[..., 2:], b[..., 2:])
    return jnp.concatenate([top_left, bottom_right], axis=-1)


def aligned_union(
    a: Float[Array, "*#batch 4"], b: Float[Array, "*#batch 4"]
) -> Float[Array, "*batch"]:
    """Area of the union of a and b, at least 1e-6."""
    return jnp.maximum(area(a) + area(b) - area(intersection(a, b)), EPS)


def aligned_iou(
    a: Float[Array, "*#batch 4"], b: Float[Array, "*#batch 4"]
) -> Float[Array, "*batch"]:
    """Intersection over union of a and b, box by box: inter / max(union, 1e-6).

    Leading dimensions broadcast. Two empty boxes have IoU 0, even when they are identical.
    """
    return area(intersection(a, b)) / aligned_union(a, b)


def pairwise_iou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Intersection over union of every box of a with every box of b."""
    return aligned_iou(a[:, None], b[None])


def distances_to_boxes(
    points: Float[Array, "*#batch 2"], distances: Float[Array, "*batch 4"]
) -> Float[Array, "*batch 4"]:
    """Boxes whose sides lie at distances (left, top, right, bottom) from points (x, y)."""
    return jnp.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def boxes_to_distances(
    points: Float[Array, "*#batch 2"], boxes: Float[Array, "*batch 4"]
) -> Float[Array, "*batch 4"]:
    """Distances (left, top, right, bottom) from points (x, y) to the sides of boxes."""
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)
