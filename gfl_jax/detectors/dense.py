"""A dense detector as five choices, and what is done with its outputs: losses and detections.

GFL (Li et al., arXiv 2006.04388) = square anchors + ATSS + General distribution with DFL + joint
quality + QFL. `gfl_jax.systems` has the others.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gfl_jax.assign import ATSS, Assigner, Predicted
from gfl_jax.boxes import aligned_iou
from gfl_jax.data.batch import Batch
from gfl_jax.detectors.box import (
    BoxLoss,
    BoxRepresentation,
    GeneralDistribution,
    Overlap,
    Regression,
)
from gfl_jax.detectors.classification import Classification, QualityFocal
from gfl_jax.detectors.inference import Candidates, Detections, Inference, candidates, nms
from gfl_jax.detectors.matching import Counting, Matches, frame_of, match, normalizers
from gfl_jax.detectors.quality import JointQuality, Measures, Quality, centerness
from gfl_jax.errors import InputError
from gfl_jax.models.heads import Outputs, OutputSpec
from gfl_jax.priors import PriorGenerator, Priors, SquareAnchors, flatten


class Losses(NamedTuple):
    """Loss terms, already divided by the normalisers of the global batch: add up over devices.

    Attributes:
        terms: name to scalar.
        per_image: name to the share of each image.
    """

    terms: dict[str, Float[Array, ""]]
    per_image: dict[str, Float[Array, " b"]]


@dataclasses.dataclass(frozen=True)
class Detector:
    """The five choices, the weights of the loss terms and the inference rule.

    Attributes:
        priors: where predictions live.
        assigner: which priors answer for which object.
        box: how a regression output becomes a box.
        quality: how localization quality is represented.
        classification: the loss of classes.
        box_loss: the box regression loss, in addition to what the representation itself adds (DFL).
        box_weight: lambda0 of equation 8; 0 leaves the term out.
        dfl_weight: lambda1 of equation 8, also for the Gaussian's likelihood; 0 leaves it out.
        counting: what N_pos counts. 'batch': positives of the batch, at least one (FCOS); 'image':
            at least one of each image (ATSS, GFL, RetinaNet, SSD); 'extra': positives of the batch,
            and for the classification one more of each image (FoveaBox); 'targets': positives,
            and for the classification the sum of its targets, at least 1.
        min_weight: the least sum of weights that box losses are divided by.
        inference: how detections are chosen.
    """

    priors: PriorGenerator = SquareAnchors()
    assigner: Assigner = ATSS()
    box: BoxRepresentation = GeneralDistribution()
    quality: Quality = JointQuality()
    classification: Classification = QualityFocal()
    box_loss: BoxLoss = Overlap()
    box_weight: float = 2.0
    dfl_weight: float = 0.25
    counting: Counting = "image"
    min_weight: float = 1.0
    inference: Inference = Inference()

    def __post_init__(self):
        if self.quality.soft and not self.classification.soft:
            raise InputError(
                f"detector.classification {self.classification} is of labels 0 and 1, but "
                f"detector.quality {self.quality} makes labels between them: use QualityFocal, or "
                "another quality"
            )
        if self.box.needs_anchors and not self.priors.sized:
            raise InputError(
                f"detector.box {self.box} needs anchors; detector.priors are {self.priors}"
            )

    def resolve(self) -> None:
        """Looks custom losses up, which are otherwise looked up when they are first called.

        Raises:
            MissingFileError: there is no such file.
            InputError: there is no such module or function.
        """
        self.classification.resolve()
        self.box_loss.resolve()

    def predicts(self, num_classes: int) -> OutputSpec:
        """What a head must predict for this detector."""
        return OutputSpec(
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
            the same with dfl_weight and DFL averaged over the sides; loss_centerness or loss_iou
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
        # Match: the target of each prior.
        priors = self.priors_of(outputs)
        frame = frame_of(priors)
        trained, _, positive, label, target, metric = self.match(outputs, batch)
        logits = flatten(outputs.cls_logits, priors.per_cell)
        raw = flatten(outputs.box_logits, priors.per_cell)
        raw = jnp.where(positive[..., None], raw, 0.0)  # harmless boxes for negatives
        boxes = self.box.decode(raw, frame)

        # Label and weight by the quality, a constant: training through it collapses.
        scores = self.classification.scores(logits)
        measures = Measures(
            predicted=scores.max(-1),
            iou=aligned_iou(boxes, target),
            centerness=centerness(frame.centers, target),
            metric=metric,
            none=jnp.ones(positive.shape),
        )
        measures = lax.stop_gradient(measures)
        weight = positive * self.quality.weight(measures)
        # A background comes last and has no target of its own.
        true_class = positive[..., None] & (label[..., None] == jnp.arange(logits.shape[-1]))
        labels = positive * self.quality.label(measures)
        targets = true_class[..., : scores.shape[-1]] * labels[..., None]

        # Normalise by the global batch.
        n_pos, n_box = normalizers(self.counting, positive, targets, batch.image_mask, global_sum)
        total_weight = n_box
        if self.quality.weighting != "none":
            total_weight = jnp.maximum(global_sum(weight.sum()), self.min_weight)

        # Add up.
        cls = self.classification(logits, targets)
        cls = self.quality.rescale(cls, true_class, measures, global_sum).sum(-1)
        counted = self.classification.counted(cls, positive, trained)
        terms = {"loss_cls": jnp.where(counted, cls, 0.0) / n_pos}
        if self.box_weight:
            box_loss = self.box_loss(
                Regression(boxes, self.box.parameters(raw)),
                Regression(target, self.box.encode(target, frame)),
            )
            terms["loss_bbox"] = self.box_weight * box_loss * weight / total_weight
        if self.dfl_weight:
            for name, loss in self.box.extra_losses(raw, target, frame).items():
                terms[name] = self.dfl_weight * loss * weight / total_weight
        for name, loss in self.quality.terms(outputs, priors, measures).items():
            terms[name] = positive * loss / n_box
        return terms

    def priors_of(self, outputs: Outputs) -> Priors:
        """The priors of the canvas that these outputs belong to."""
        return self.priors([(x.shape[1], x.shape[2]) for x in outputs.cls_logits])

    def match(self, outputs: Outputs, batch: Batch) -> Matches:
        """The target of each prior, see `gfl_jax.detectors.matching`."""
        priors = self.priors_of(outputs)
        predicted = None
        if self.assigner.sees_predictions:
            frame = frame_of(priors)
            boxes = self.box.decode(flatten(outputs.box_logits, priors.per_cell), frame)
            logits = flatten(outputs.cls_logits, priors.per_cell)
            predicted = Predicted(
                self.classification.log_scores(logits), boxes * frame.strides[:, None]
            )
        return match(self.assigner, priors, batch, lax.stop_gradient(predicted))

    @jax.named_scope("detections")
    def detections(
        self, outputs: Outputs, sizes: Int[Array, "b 2"], scales: Float[Array, "b 2"]
    ) -> Detections:
        """Boxes in pixels of the original images, by descending score, a fixed number per image.

        The candidates, scaled back; then class-wise NMS over all levels together.
        """
        boxes, scores, labels, _ = self.candidates(outputs, sizes)
        boxes /= jnp.tile(scales, 2)[:, None]
        return jax.vmap(functools.partial(nms, inference=self.inference))(boxes, scores, labels)

    def candidates(self, outputs: Outputs, sizes: Int[Array, "b 2"]) -> Candidates:
        """What NMS chooses from, see `gfl_jax.detectors.inference.candidates`."""
        priors = self.priors_of(outputs)
        return candidates(outputs, sizes, priors, self.box, self.classification, self.inference)
