"""A dense detector as five choices, and what is done with its outputs: losses and detections.

GFL (Li et al., arXiv 2006.04388) = square anchors + ATSS + General distribution with DFL + joint
quality + QFL.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gfl_jax.assign import ATSS, assign_batch
from gfl_jax.boxes import aligned_iou, boxes_to_distances, distances_to_boxes
from gfl_jax.data.batch import Batch
from gfl_jax.detectors.postprocess import Detections, Inference, nms, top_pairs
from gfl_jax.losses import distribution_focal_loss, giou_loss, quality_focal_loss
from gfl_jax.models.heads import Outputs
from gfl_jax.priors import Priors, SquareAnchors


class Losses(NamedTuple):
    """Loss terms, already divided by the normalisers of the global batch: add up over devices.

    terms: name to scalar.  per_image: name to the share of each image.
    """

    terms: dict[str, Float[Array, ""]]
    per_image: dict[str, Float[Array, " b"]]


@dataclasses.dataclass(frozen=True)
class GeneralDistribution:
    """Box representation of GFL, section 3.2: each side is a distribution over n + 1 bins.

    n: last bin.  delta: bin width, in strides of the level.
    """

    n: int = 16
    delta: float = 1.0

    @property
    def channels(self) -> int:
        """Regression channels of the head."""
        return 4 * (self.n + 1)

    def logits(self, raw: Float[Array, "*batch channels"]) -> Float[Array, "*batch 4 bins"]:
        """The head's channels as one row of bin logits a side."""
        return raw.reshape(*raw.shape[:-1], 4, self.n + 1)

    def integral(self, logits: Float[Array, "*batch 4 bins"]) -> Float[Array, "*batch 4"]:
        """Expected distance of each side, in strides (equation 4): sum of S_i * y_i."""
        y = self.delta * jnp.arange(self.n + 1, dtype=jnp.float32)
        return (jax.nn.softmax(logits, axis=-1) * y).sum(-1)

    def bins(self, distances: Float[Array, "*batch 4"]) -> Float[Array, "*batch 4"]:
        """Distances in strides as DFL targets, in bins within [0, n - 0.1]."""
        return jnp.clip(distances / self.delta, 0.0, self.n - 0.1)


@dataclasses.dataclass(frozen=True)
class JointQuality:
    """Quality representation of GFL, section 3.1: the score of the true class *is* the IoU.

    weighting: what weighs the box and distribution losses of a positive: the highest class score it
        now predicts (the authors' code), its IoU, or nothing. The authors found no difference.
    """

    weighting: Literal["predicted", "iou", "none"] = "predicted"


@dataclasses.dataclass(frozen=True)
class QualityFocal:
    """Classification by QFL. beta: how fast well-estimated examples lose their weight."""

    beta: float = 2.0


@dataclasses.dataclass(frozen=True)
class Detector:
    """The five choices, the weights of the loss terms and the inference rule.

    box_weight, dfl_weight: lambda0 and lambda1 of equation 8.
    """

    priors: SquareAnchors = SquareAnchors()
    assigner: ATSS = ATSS()
    box: GeneralDistribution = GeneralDistribution()
    quality: JointQuality = JointQuality()
    classification: QualityFocal = QualityFocal()
    box_weight: float = 2.0
    dfl_weight: float = 0.25
    inference: Inference = Inference()

    def __post_init__(self):
        if self.box.n < 1 or self.box.delta <= 0:
            raise ValueError(f"detector.box needs n >= 1 and delta > 0, it is {self.box}")
        if self.classification.beta < 0:
            raise ValueError(
                f"detector.classification.beta is {self.classification.beta}; it must be >= 0"
            )

    def losses(
        self,
        outputs: Outputs,
        batch: Batch,
        global_sum: Callable[[Array], Array] = lambda x: x,
    ) -> Losses:
        """The terms of equation 8 for the images of one device.

        Args:
            outputs: of the head for `batch`.
            batch: images and objects.
            global_sum: sums a count over all devices, so that each device divides by the numbers of
                the global batch.

        Returns:
            loss_cls = sum QFL / N_pos; loss_bbox = box_weight * sum w_i GIoU_i / W; loss_dfl =
            dfl_weight * sum w_i mean_side DFL_i / W with W = max(sum w_i, 1). N_pos counts at least
            one positive an image, as the reference does.
        """
        shares = self.losses_per_prior(outputs, batch, global_sum)
        per_image = {name: share.sum(1) for name, share in shares.items()}
        return Losses({name: term.sum() for name, term in per_image.items()}, per_image)

    def losses_per_prior(
        self,
        outputs: Outputs,
        batch: Batch,
        global_sum: Callable[[Array], Array] = lambda x: x,
    ) -> dict[str, Float[Array, "b anchors"]]:
        """What each prior adds to each term of `losses`."""
        priors = _priors_of(self.priors, outputs)
        valid = priors.valid(batch.sizes) & batch.image_mask[:, None]
        matched = assign_batch(self.assigner, priors, valid, batch.boxes, batch.box_mask)
        positive = matched >= 0  # b anchors

        strides = priors.strides[:, None]
        points = priors.centers / strides
        object_index = jnp.maximum(matched, 0)
        target = jnp.take_along_axis(batch.boxes, object_index[..., None], axis=1) / strides
        # Negatives get a harmless box: their terms are finite before they are weighted by zero.
        target = jnp.where(
            positive[..., None], target, jnp.concatenate([points - 1, points + 1], -1)
        )
        label = jnp.take_along_axis(batch.labels, object_index, axis=1)

        cls_logits = _flatten(outputs.cls_logits)  # b anchors classes
        box_logits = self.box.logits(_flatten(outputs.box_logits))  # b anchors 4 bins
        predicted = distances_to_boxes(points, self.box.integral(box_logits))

        # Quality targets and weights are constants: training through them collapses.
        iou = lax.stop_gradient(aligned_iou(predicted, target))
        quality = jnp.where(positive, iou, 0.0)
        soft_labels = quality[..., None] * jax.nn.one_hot(label, cls_logits.shape[-1])
        weight = (
            positive
            * {
                "predicted": lax.stop_gradient(jax.nn.sigmoid(cls_logits).max(-1)),
                "iou": iou,
                "none": jnp.ones_like(iou),
            }[self.quality.weighting]
        )

        qfl = quality_focal_loss(cls_logits, soft_labels, self.classification.beta).sum(-1) * valid
        giou = giou_loss(predicted, target) * weight
        bins = self.box.bins(boxes_to_distances(points, target))
        dfl = distribution_focal_loss(box_logits, bins).mean(-1) * weight

        positives = jnp.maximum(positive.sum(1), 1) * batch.image_mask
        n_pos = jnp.maximum(global_sum(positives.sum()), 1)
        total_weight = jnp.maximum(global_sum(weight.sum()), 1)
        return {
            "loss_cls": qfl / n_pos,
            "loss_bbox": self.box_weight * giou / total_weight,
            "loss_dfl": self.dfl_weight * dfl / total_weight,
        }

    def detections(
        self, outputs: Outputs, sizes: Int[Array, "b 2"], scales: Float[Array, "b 2"]
    ) -> Detections:
        """Boxes in pixels of the original images, by descending score, a fixed number an image.

        The candidates, scaled back; then class-wise NMS over all levels together.
        """
        boxes, scores, labels = self.candidates(outputs, sizes)
        boxes /= jnp.tile(scales, 2)[:, None]
        return jax.vmap(functools.partial(nms, inference=self.inference))(boxes, scores, labels)

    def candidates(
        self, outputs: Outputs, sizes: Int[Array, "b 2"]
    ) -> tuple[Float[Array, "b n 4"], Float[Array, "b n"], Int[Array, "b n"]]:
        """Boxes (clipped to the image, canvas pixels), scores and labels before NMS.

        Of each level the best `nms_pre` (cell, class) pairs, whatever their score.
        """
        priors = _priors_of(self.priors, outputs)

        def one_image(cls_logits, box_logits, valid, size):
            start, levels = 0, []
            for cls_level, box_level in zip(cls_logits, box_logits, strict=True):
                cells = slice(start, start + len(cls_level))
                start = cells.stop
                scores = jax.nn.sigmoid(cls_level)
                if not self.inference.padding_predicts:
                    scores *= valid[cells, None]
                score, cell, label = top_pairs(scores, self.inference.nms_pre)
                distances = self.box.integral(self.box.logits(box_level[cell]))
                stride = priors.strides[cells][0]
                center = jnp.asarray(priors.centers[cells])[cell]
                levels.append((distances_to_boxes(center, distances * stride), score, label))
            boxes, scores, labels = (jnp.concatenate(part) for part in zip(*levels, strict=True))
            boxes = jnp.clip(boxes, 0.0, jnp.tile(size[::-1], 2).astype(boxes.dtype))
            return boxes, scores, labels

        cls_logits, box_logits = ([_flatten([x]) for x in part] for part in outputs)
        return jax.vmap(one_image)(cls_logits, box_logits, priors.valid(sizes), sizes)


def _priors_of(priors: SquareAnchors, outputs: Outputs) -> Priors:
    return priors([(x.shape[1], x.shape[2]) for x in outputs.cls_logits])


def _flatten(levels: list[Float[Array, "b _ _ c"]]) -> Float[Array, "b cells c"]:
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in levels], axis=1)
