"""From a head's outputs to a fixed number of detections: top-k and class-wise NMS, under jit."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gfl_jax.detectors.box import BoxRepresentation
from gfl_jax.detectors.classification import Classification
from gfl_jax.detectors.matching import frame_of
from gfl_jax.models.heads import Outputs
from gfl_jax.priors import Priors, flatten


@dataclasses.dataclass(frozen=True)
class Inference:
    """How detections are chosen.

    Attributes:
        score_threshold: (prior, class) pairs whose class score is at or below it are dropped.
        nms_pre: pairs kept of each level.
        nms_iou: IoU above which the lower-scoring box of a class is removed.
        max_per_image: detections kept.
        padding_predicts: whether cells in the padding count. Without them detections do not depend
            on the canvas; the reference has them where a batch mixes image sizes.
        clip_margin: boxes end this many pixels before the image's right and bottom border: 1 in
            FoveaBox, 0 elsewhere.
        drop_empty: whether boxes without area are dropped.
    """

    score_threshold: float = 0.05
    nms_pre: int = 1000
    nms_iou: float = 0.6
    max_per_image: int = 100
    padding_predicts: bool = False
    clip_margin: int = 0
    drop_empty: bool = True


class Candidates(NamedTuple):
    """What NMS chooses from.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the canvas.
        scores: 0 where below the threshold.
        labels: class indices.
        priors: index of the prior that predicts each.
    """

    boxes: Float[Array, "*b n 4"]
    scores: Float[Array, "*b n"]
    labels: Int[Array, "*b n"]
    priors: Int[Array, "*b n"]


class Detections(NamedTuple):
    """Detections by descending score, padded to `max_per_image`.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels.
        scores: 0 where padded.
        labels: class indices.
        mask: which of them exist.
    """

    boxes: Float[Array, "*b detections 4"]
    scores: Float[Array, "*b detections"]
    labels: Int[Array, "*b detections"]
    mask: Bool[Array, "*b detections"]


def candidates(
    outputs: Outputs,
    sizes: Int[Array, "b 2"],
    priors: Priors,
    box: BoxRepresentation,
    classification: Classification,
    inference: Inference,
) -> Candidates:
    """Boxes (clipped to the image, canvas pixels), scores and labels before NMS.

    Of each level the best `nms_pre` (prior, class) pairs. The threshold is on the class's score,
    which a quality branch multiplies afterwards; the score of those below is 0.
    """
    ends = np.cumsum(priors.levels).tolist()
    all_levels = frame_of(priors)

    def one_image(cls_logits, raw, quality_logits, valid, size):
        start, levels = 0, []
        for level, end in enumerate(ends):
            frame = jax.tree.map(lambda x, part=slice(start, end): x[part], all_levels)
            scores = classification.scores(cls_logits[level])
            if not inference.padding_predicts:
                scores *= valid[start:end, None]
            score, index, label = top_pairs(scores, inference.nms_pre)
            chosen = jax.tree.map(lambda x, index=index: x[index], frame)
            boxes = box.decode(raw[level][index], chosen) * chosen.strides[:, None]
            enters = score > inference.score_threshold
            if quality_logits:
                score *= jax.nn.sigmoid(quality_logits[level][index, 0])
            levels.append((boxes, jnp.where(enters, score, 0), label, start + index))
            start = end
        boxes, scores, labels, index = map(jnp.concatenate, zip(*levels, strict=True))
        limit = jnp.tile(size[::-1], 2).astype(boxes.dtype) - inference.clip_margin
        return Candidates(jnp.clip(boxes, 0.0, limit), scores, labels, index)

    parts = [
        [flatten([x], [n]) for x, n in zip(part, priors.per_cell, strict=bool(part))]
        for part in outputs
    ]
    over_images: Any = jax.vmap(one_image)
    return over_images(*parts, priors.valid(sizes), sizes)


def top_pairs(
    scores: Float[Array, "priors classes"], k: int
) -> tuple[Float[Array, " k"], Int[Array, " k"], Int[Array, " k"]]:
    """The k best (prior, class) pairs: scores, priors and classes; fewer if there are fewer pairs.

    A pair among the k best lies in one of the k priors with the best maximum, so that only their
    classes are ranked: a tenth of the work of ranking all pairs.
    """
    priors, classes = scores.shape
    _, best = lax.top_k(scores.max(1), min(k, priors))
    score, pair = lax.top_k(scores[best].reshape(-1), min(k, len(best) * classes))
    return score, best[pair // classes], pair % classes


def nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    labels: Int[Array, " n"],
    inference: Inference,
) -> Detections:
    """The detections of one image: the candidates that `kept_by_nms` keeps."""
    return pick(kept_by_nms(boxes, scores, labels, inference), boxes, scores, labels)


def pick(
    kept: Int[Array, " detections"],
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    labels: Int[Array, " n"],
) -> Detections:
    """The candidates with these indices; -1 is padding."""
    mask = kept >= 0
    return Detections(
        boxes=jnp.where(mask[:, None], boxes[kept], 0.0),
        scores=jnp.where(mask, scores[kept], 0.0),
        labels=jnp.where(mask, labels[kept], 0),
        mask=mask,
    )


def kept_by_nms(
    boxes: Float[Array, "n 4"],
    scores: Float[Array, " n"],
    labels: Int[Array, " n"],
    inference: Inference,
) -> Int[Array, " detections"]:
    """Greedy class-wise non-maximum suppression of one image.

    Takes the best remaining box and drops the boxes of its class that overlap it by more than
    `nms_iou`, `max_per_image` times. Scores of 0 and (`drop_empty`) boxes without area never enter.

    Returns:
        Indices of the boxes that are kept, by descending score; -1 where there are no more.
    """
    enters = scores > 0
    if inference.drop_empty:
        enters &= (boxes[:, 2:] > boxes[:, :2]).all(1)
    # Classes are moved apart so that boxes of different classes never overlap; in float32 as the
    # reference does it, since this rounds the boxes.
    extent = jnp.where(enters[:, None], boxes, 0.0).max() + 1
    x1, y1, x2, y2 = (boxes + (labels * extent)[:, None]).T
    area = (x2 - x1) * (y2 - y1)
    rank = jnp.arange(len(boxes))

    def take_best(i, carry):
        remaining, kept = carry
        best = jnp.argmax(remaining)
        width = jnp.minimum(x2, x2[best]) - jnp.maximum(x1, x1[best])
        height = jnp.minimum(y2, y2[best]) - jnp.maximum(y1, y1[best])
        overlap = jnp.maximum(width, 0) * jnp.maximum(height, 0)
        union = jnp.maximum(area + area[best] - overlap, 1e-12)
        kept = kept.at[i].set(jnp.where(remaining[best] > 0, best, -1))
        drop = (overlap / union > inference.nms_iou) | (rank == best)
        return jnp.where(drop, 0.0, remaining), kept

    start = jnp.where(enters, scores, 0.0), jnp.full(inference.max_per_image, -1)
    return lax.fori_loop(0, inference.max_per_image, take_best, start)[1]
