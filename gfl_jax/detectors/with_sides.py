"""Detections together with the distributions of their sides."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Detections, kept_by_nms, pick
from gfl_jax.detectors.matching import frame_of
from gfl_jax.detectors.sides import Sides
from gfl_jax.models.heads import Outputs
from gfl_jax.priors import flatten


def detections_with_sides(
    detector: Detector,
    outputs: Outputs,
    sizes: Int[Array, "b 2"],
    scales: Float[Array, "b 2"],
) -> tuple[Detections, Sides]:
    """`detector.detections`, and their sides in pixels of the images; padding has any sides."""
    priors, scales = detector.priors_of(outputs), jnp.tile(scales, 2)
    boxes, scores, labels, index = detector.candidates(outputs, sizes)
    boxes /= scales[:, None]
    raw = flatten(outputs.box_logits, priors.per_cell)

    def one_image(boxes, scores, labels, index, raw, scale):
        kept = kept_by_nms(boxes, scores, labels, detector.inference)
        frame = jax.tree.map(lambda x: x[index[kept]], frame_of(priors))
        found = detector.box.sides(raw[index[kept]], frame)
        positions = found.positions * (frame.strides[:, None] / scale)[..., None]
        return pick(kept, boxes, scores, labels), Sides(positions, found.probabilities)

    return jax.vmap(one_image)(boxes, scores, labels, index, raw, scales)
