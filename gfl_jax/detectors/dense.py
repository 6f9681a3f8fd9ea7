"""A dense detector as five choices, and what is done with its outputs: losses and detections.

GFL (Li et al., arXiv 2006.04388) = square anchors + ATSS + General distribution with DFL + joint
quality + QFL. `gfl_jax.systems` has the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gfl_jax.assign import ATSS, IGNORED, Assigner, assign_batch
from gfl_jax.boxes import aligned_iou
from gfl_jax.data.batch import Batch
from gfl_jax.detectors.box import (
    BoxLoss,
    BoxRepresentation,
    Deltas,
    GeneralDistribution,
    Overlap,
    Regression,
    frame_of,
)
from gfl_jax.detectors.classification import Classification, QualityFocal
from gfl_jax.detectors.inference import Detections, Inference, nms, top_pairs
from gfl_jax.detectors.quality import (
    GuidedQuality,
    JointQuality,
    Quality,
    QualityBranch,
    centerness,
)
from gfl_jax.losses import binary_cross_entropy
from gfl_jax.models.heads import Outputs, Predicts
from gfl_jax.priors import Points, PriorGenerator, Priors, SquareAnchors


def flatten(
    levels: Sequence[Float[Array, "b _ _ _"]], per_cell: Sequence[int]
) -> Float[Array, "b priors c"]:
    """One row a prior; the channels of a cell hold its priors one after another."""
    parts = [
        x.reshape(x.shape[0], x.shape[1] * x.shape[2] * n, x.shape[3] // n)
        for x, n in zip(levels, per_cell, strict=True)
    ]
    return jnp.concatenate(parts, axis=1)


class Losses(NamedTuple):
    """Loss terms, already divided by the normalisers of the global batch: add up over devices.

    terms: name to scalar.  per_image: name to the share of each image.
    """

    terms: dict[str, Float[Array, ""]]
    per_image: dict[str, Float[Array, " b"]]


class Candidates(NamedTuple):
    """What NMS chooses from.

    boxes: pixels of the canvas.  scores: 0 where below the threshold.  labels: classes.
    priors: which prior predicts each.
    """

    boxes: Float[Array, "*b n 4"]
    scores: Float[Array, "*b n"]
    labels: Int[Array, "*b n"]
    priors: Int[Array, "*b n"]


@dataclasses.dataclass(frozen=True)
class Detector:
    """The five choices, the weights of the loss terms and the inference rule.

    box_loss: pulls boxes towards objects, beside what the representation itself adds (DFL).
    box_weight, dfl_weight: lambda0 and lambda1 of equation 8; 0 leaves the term out. dfl_weight is
        also that of the Gaussian's likelihood.
    counting: N_pos counts the positives of the batch, at least one ('batch': FCOS); at least one
        of each image ('image': ATSS, GFL, RetinaNet, SSD); or, for the classification loss, as many
        as there are plus one for each image ('extra': FoveaBox).
    min_weight: the least sum of weights that box losses are divided by.
    """

    priors: PriorGenerator = SquareAnchors()
    assigner: Assigner = ATSS()
    box: BoxRepresentation = GeneralDistribution()
    quality: Quality = JointQuality()
    classification: Classification = QualityFocal()
    box_loss: BoxLoss = Overlap()
    box_weight: float = 2.0
    dfl_weight: float = 0.25
    counting: Literal["image", "batch", "extra"] = "image"
    min_weight: float = 1.0
    inference: Inference = Inference()

    def __post_init__(self):
        if isinstance(self.quality, JointQuality) and not self.classification.soft:
            raise ValueError(
                f"detector.classification {self.classification} is of labels 0 and 1, but "
                "detector.quality JointQuality makes the IoU the label: use QualityFocal, or "
                "another quality"
            )
        if isinstance(self.box, Deltas) and isinstance(self.priors, Points):
            raise ValueError("detector.box Deltas need anchors; detector.priors are points")

    def predicts(self, num_classes: int) -> Predicts:
        """What a head must predict for this detector."""
        return Predicts(
            cls=self.classification.channels(num_classes),
            box=self.box.channels,
            quality=self.quality.branch,
            per_cell=self.priors.per_cell,
            cls_bias=self.classification.initial_bias,
        )

    @jax.named_scope("losses")
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
            loss_cls = sum of the classification loss / N_pos, for GFL that of QFL; loss_bbox =
            box_weight * sum w_i L_i / W, for GFL L is GIoU; loss_dfl (loss_nll for a Gaussian)
            likewise with dfl_weight and the mean over the sides of DFL; loss_centerness or loss_iou
            = cross entropy of a quality branch / N_pos. W = max(sum w_i, min_weight), or N_pos
            without weights.
        """
        shares = self.losses_per_prior(outputs, batch, global_sum)
        per_image = {name: share.sum(1) for name, share in shares.items()}
        return Losses({name: term.sum() for name, term in per_image.items()}, per_image)

    def losses_per_prior(
        self,
        outputs: Outputs,
        batch: Batch,
        global_sum: Callable[[Array], Array] = lambda x: x,
    ) -> dict[str, Float[Array, "b priors"]]:
        """What each prior adds to each term of `losses`."""
        priors = self.priors_of(outputs)
        trained, matched = self.assign(priors, batch)
        positive = matched >= 0  # b priors
        frame = frame_of(priors)
        cls_logits = flatten(outputs.cls_logits, priors.per_cell)  # b priors classes
        raw = flatten(outputs.box_logits, priors.per_cell)  # b priors channels

        object_index = jnp.maximum(matched, 0)
        label = jnp.take_along_axis(batch.labels, object_index, axis=1)
        target = jnp.take_along_axis(batch.boxes, object_index[..., None], axis=1)
        target = target / frame.strides[:, None]
        # Negatives get harmless boxes: their terms are finite before they are weighted by zero.
        harmless = jnp.concatenate([frame.centers - 1, frame.centers + 1], -1)
        target = jnp.where(positive[..., None], target, harmless)
        raw = jnp.where(positive[..., None], raw, 0.0)
        predicted = self.box.decode(raw, frame)

        # Quality targets and weights are constants: training through them collapses.
        scores = lax.stop_gradient(self.classification.scores(cls_logits))
        qualities = {
            "predicted": scores.max(-1),
            "iou": lax.stop_gradient(aligned_iou(predicted, target)),
            "centerness": centerness(frame.centers, target),
            "none": jnp.ones(positive.shape),
        }
        weight = positive * qualities[self.quality.weighting]

        per_image = positive.sum(1) * batch.image_mask
        found, images = global_sum(per_image.sum()), global_sum(batch.image_mask.sum())
        if self.counting == "image":
            n_pos = n_box = global_sum((jnp.maximum(per_image, 1) * batch.image_mask).sum())
        else:
            n_pos, n_box = found + images * (self.counting == "extra"), found
        n_pos, n_box = jnp.maximum(n_pos, 1), jnp.maximum(n_box, 1)
        total_weight = n_box
        if self.quality.weighting != "none":
            total_weight = jnp.maximum(global_sum(weight.sum()), self.min_weight)

        y = qualities["iou"] if isinstance(self.quality, JointQuality) else 1.0
        outputs_of_class = jnp.arange(cls_logits.shape[-1])  # a background comes last
        true_class = positive[..., None] & (label[..., None] == outputs_of_class)
        targets = true_class[..., : scores.shape[-1]] * (positive * y)[..., None]
        cls = self.classification(cls_logits, targets)
        if isinstance(self.quality, GuidedQuality):
            own = lax.stop_gradient(jnp.where(true_class, cls, 0).sum(-1))
            power = positive * qualities[self.quality.measure] ** self.quality.eta
            factor = power * global_sum(own.sum())
            factor /= jnp.maximum(global_sum((power * own).sum()), 1e-12)
            cls = jnp.where(true_class, factor[..., None] * cls, cls)
        cls = cls.sum(-1)
        cls = jnp.where(self.classification.counted(cls, positive, trained), cls, 0.0)

        terms = {"loss_cls": cls / n_pos}
        if self.box_weight:
            box_loss = self.box_loss(
                Regression(predicted, self.box.parameters(raw)),
                Regression(target, self.box.encode(target, frame)),
            )
            terms["loss_bbox"] = self.box_weight * box_loss * weight / total_weight
        if self.dfl_weight:
            for name, extra in self.box.extra_losses(raw, target, frame).items():
                terms[name] = self.dfl_weight * extra * weight / total_weight
        if isinstance(self.quality, QualityBranch):
            logits = flatten(outputs.quality_logits, priors.per_cell)[..., 0]
            cross_entropy = binary_cross_entropy(logits, qualities[self.quality.measure])
            terms[f"loss_{self.quality.measure}"] = positive * cross_entropy / n_box
        return terms

    def priors_of(self, outputs: Outputs) -> Priors:
        """The priors of the canvas that these outputs are of."""
        return self.priors([(x.shape[1], x.shape[2]) for x in outputs.cls_logits])

    @jax.named_scope("assign")
    def assign(
        self, priors: Priors, batch: Batch
    ) -> tuple[Bool[Array, "b priors"], Int[Array, "b priors"]]:
        """Which priors are trained on, and the object each answers for (see `gfl_jax.assign`)."""
        trained = priors.trained(batch.sizes) & batch.image_mask[:, None]
        matched = assign_batch(self.assigner, priors, trained, batch.boxes, batch.box_mask)
        return trained & (matched != IGNORED), matched

    @jax.named_scope("detections")
    def detections(
        self, outputs: Outputs, sizes: Int[Array, "b 2"], scales: Float[Array, "b 2"]
    ) -> Detections:
        """Boxes in pixels of the original images, by descending score, a fixed number an image.

        The candidates, scaled back; then class-wise NMS over all levels together.
        """
        boxes, scores, labels, _ = self.candidates(outputs, sizes)
        boxes /= jnp.tile(scales, 2)[:, None]
        return jax.vmap(functools.partial(nms, inference=self.inference))(boxes, scores, labels)

    def candidates(self, outputs: Outputs, sizes: Int[Array, "b 2"]) -> Candidates:
        """Boxes (clipped to the image, canvas pixels), scores and labels before NMS.

        Of each level the best `nms_pre` (prior, class) pairs. The threshold is on the class's
        score, which a quality branch multiplies afterwards; the score of those below is 0.
        """
        priors = self.priors_of(outputs)
        ends = np.cumsum(priors.levels).tolist()
        all_levels = frame_of(priors)

        def one_image(cls_logits, raw, quality_logits, valid, size):
            start, levels = 0, []
            for level, end in enumerate(ends):
                frame = jax.tree.map(lambda x, part=slice(start, end): x[part], all_levels)
                scores = self.classification.scores(cls_logits[level])
                if not self.inference.padding_predicts:
                    scores *= valid[start:end, None]
                score, index, label = top_pairs(scores, self.inference.nms_pre)
                chosen = jax.tree.map(lambda x, index=index: jnp.asarray(x)[index], frame)
                boxes = self.box.decode(raw[level][index], chosen) * chosen.strides[:, None]
                enters = score > self.inference.score_threshold
                if quality_logits:
                    score *= jax.nn.sigmoid(quality_logits[level][index, 0])
                levels.append((boxes, jnp.where(enters, score, 0), label, start + index))
                start = end
            boxes, scores, labels, index = map(jnp.concatenate, zip(*levels, strict=True))
            limit = jnp.tile(size[::-1], 2).astype(boxes.dtype) - self.inference.clip_margin
            return Candidates(jnp.clip(boxes, 0.0, limit), scores, labels, index)

        parts = [
            [flatten([x], [n]) for x, n in zip(part, priors.per_cell, strict=bool(part))]
            for part in outputs
        ]
        over_images: Any = jax.vmap(one_image)
        return over_images(*parts, priors.valid(sizes), sizes)
