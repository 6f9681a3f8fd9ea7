"""Matching: from priors and the objects of a batch to the target of each prior.

Boxes, points and anchors are in strides of the prior's level: in these units objects of all levels
have similar sizes.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gfl_jax.assign import IGNORED, Assigner, Objects, Predicted
from gfl_jax.data.batch import Batch
from gfl_jax.priors import Priors


class Frame(NamedTuple):
    """Priors in strides of their level.

    Attributes:
        centers: x, y.
        boxes: x1, y1, x2, y2; points are boxes without size.
        strides: the stride itself, in pixels.
    """

    centers: Float[Array, "*priors 2"]
    boxes: Float[Array, "*priors 4"]
    strides: Float[Array, " *priors"]


def frame_of(priors: Priors) -> Frame:
    """The priors of a canvas as box representations see them."""
    strides = priors.strides[:, None]
    arrays = priors.centers / strides, priors.boxes / strides, priors.strides
    return Frame(*map(jnp.asarray, arrays))


class Matches(NamedTuple):
    """The target of each prior.

    Attributes:
        trained: whether its classification is trained at all: it is neither in the padding nor
            ignored by the assigner.
        matched: index of the object that it answers for, or BACKGROUND or IGNORED.
        positive: whether it answers for an object.
        label: class of that object; any class where there is none.
        target: box of that object, in strides; where there is none a box around the prior, with
            which all terms are finite before they are multiplied by zero.
        metric: how well it suits that object, see `gfl_jax.assign.Assignment`.
    """

    trained: Bool[Array, "b priors"]
    matched: Int[Array, "b priors"]
    positive: Bool[Array, "b priors"]
    label: Int[Array, "b priors"]
    target: Float[Array, "b priors 4"]
    metric: Float[Array, "b priors"]


@jax.named_scope("assign")
def match(
    assigner: Assigner, priors: Priors, batch: Batch, predicted: Predicted | None = None
) -> Matches:
    """Matches the priors of a canvas with the objects of each image; no gradient flows through.

    Args:
        assigner: which priors answer for which object.
        priors: of the canvas.
        batch: images and objects.
        predicted: current predictions of the priors, if the assigner sees them.
    """
    trained = priors.trained(batch.sizes) & batch.image_mask[:, None]
    objects = Objects(batch.boxes, batch.box_mask, batch.labels)
    assign = jax.vmap(lambda *image: assigner(priors, *image))
    matched, metric = lax.stop_gradient(assign(trained, objects, predicted))

    positive = matched >= 0
    index = jnp.maximum(matched, 0)
    label = jnp.take_along_axis(batch.labels, index, axis=1)
    target = jnp.take_along_axis(batch.boxes, index[..., None], axis=1)
    frame = frame_of(priors)
    target = target / frame.strides[:, None]
    around = jnp.concatenate([frame.centers - 1, frame.centers + 1], -1)
    target = jnp.where(positive[..., None], target, around)
    return Matches(trained & (matched != IGNORED), matched, positive, label, target, metric)


Counting = Literal["image", "batch", "extra", "targets"]

_COUNTS: dict[str, Callable] = {
    "image": lambda positives, targets: (jnp.maximum(positives, 1), jnp.maximum(positives, 1)),
    "batch": lambda positives, targets: (positives, positives),
    "extra": lambda positives, targets: (positives + 1, positives),
    "targets": lambda positives, targets: (targets, positives),
}
"""What each image adds to the normalisers, by its number of positives and its sum of targets."""


def normalizers(
    counting: Counting,
    positive: Bool[Array, "b priors"],
    targets: Float[Array, "b priors classes"],
    image_mask: Bool[Array, " b"],
    global_sum: Callable[[Array], Array],
) -> tuple[Array, Array]:
    """What the sums of the global batch are divided by: N_pos, at least 1.

    Args:
        counting: what is counted. 'image': positives, at least one in each image; 'batch':
            positives; 'extra': positives, and for the classification one more in each image;
            'targets': for the classification the sum of its targets, elsewhere positives.
        positive: priors that answer for an object.
        targets: of the classification.
        image_mask: which images exist.
        global_sum: sums over all devices.

    Returns:
        N_pos of the classification loss and N_pos of the other terms.
    """
    shares = _COUNTS[counting](positive.sum(1), targets.sum((1, 2)))
    cls, box = (jnp.maximum(global_sum((share * image_mask).sum()), 1) for share in shares)
    return cls, box
