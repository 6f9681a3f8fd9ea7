"""Detectors as programs that others run: from canvases of pixels to arrays with names."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.matching import frame_of
from gfl_jax.models.heads import Outputs
from gfl_jax.models.network import Network, Variables
from gfl_jax.priors import flatten

Output = Literal["raw", "boxes", "detections"]
"""What a program ends with: the head's outputs; a box and the scores of each prior; or what NMS
keeps of them."""

OUTPUTS: dict[Output, dict[str, str]] = {
    "raw": {
        "cls_logits": "[batch, priors, classes]: level by level, row by row",
        "box_logits": "[batch, priors, channels]",
        "quality_logits": "[batch, priors, 1]: only of detectors with a quality branch",
    },
    "boxes": {
        "boxes": "[batch, priors, 4]: x1, y1, x2, y2 in pixels of the original image",
        "scores": "[batch, priors, classes]: 0 where the class is not above the threshold",
    },
    "detections": {
        "boxes": "[batch, detections, 4]: x1, y1, x2, y2 in pixels of the original image",
        "scores": "[batch, detections]: descending",
        "labels": "[batch, detections]: index of the class",
        "mask": "[batch, detections]: which of them exist",
    },
}

INPUTS = {
    "images": "uint8 [batch, height, width, 3]: RGB, the resized image in the upper left corner of "
    "the canvas, 0 elsewhere",
    "sizes": "int32 [batch, 2]: height and width of the resized image",
    "scales": "float32 [batch, 2]: pixels of the resized image per pixel of the original, x and y",
}


def program(network: Network, detector: Detector, output: Output) -> Callable[..., dict[str, Any]]:
    """A detector as a function of arrays: weights by dotted path, images, sizes, scales.

    Normalization is inside. See `INPUTS` and `OUTPUTS`.
    """
    parts = jax.eval_shape(lambda: network.init(0))
    finish = {"raw": _raw, "boxes": _boxes, "detections": _detections}[output]

    def run(
        weights: dict[str, Array],
        images: UInt8[Array, "b h w 3"],
        sizes: Int[Array, "b 2"],
        scales: Float[Array, "b 2"],
    ) -> dict[str, Any]:
        variables = Variables(*({name: weights[name] for name in part} for part in parts))
        outputs, _ = network.apply(variables, images, sizes, train=False)
        return finish(detector, outputs, sizes, scales)

    return run


def weights_of(variables: Variables) -> dict[str, np.ndarray]:
    """All arrays by dotted path."""
    return {name: np.asarray(array) for part in variables for name, array in part.items()}


def arguments(canvas: Sequence[int]) -> list[jax.ShapeDtypeStruct]:
    """Images, sizes and scales of any number of images on a canvas (height, width)."""
    (batch,) = jax.export.symbolic_shape("batch")
    return [
        jax.ShapeDtypeStruct((batch, *canvas, 3), jnp.uint8),
        jax.ShapeDtypeStruct((batch, 2), jnp.int32),
        jax.ShapeDtypeStruct((batch, 2), jnp.float32),
    ]


def _raw(detector: Detector, outputs: Outputs, sizes: Array, scales: Array) -> dict[str, Array]:
    per_cell = detector.priors.per_cell
    named = outputs._asdict().items()
    return {name: flatten(levels, per_cell) for name, levels in named if levels}


def _boxes(detector: Detector, outputs: Outputs, sizes: Array, scales: Array) -> dict[str, Array]:
    """The candidates of `gfl_jax.detectors.inference`, of all priors instead of the best ones."""
    priors, inference = detector.priors_of(outputs), detector.inference
    flat = _raw(detector, outputs, sizes, scales)
    frame = frame_of(priors)
    boxes = detector.box.decode(flat["box_logits"], frame) * frame.strides[:, None]
    limit = jnp.tile(sizes[:, ::-1], 2).astype(boxes.dtype) - inference.clip_margin
    boxes = jnp.clip(boxes, 0.0, limit[:, None]) / jnp.tile(scales, 2)[:, None]
    classes = detector.classification.scores(flat["cls_logits"])
    if not inference.padding_predicts:
        classes *= priors.valid(sizes)[..., None]
    scores = classes
    if "quality_logits" in flat:
        scores = classes * jax.nn.sigmoid(flat["quality_logits"])
    return {"boxes": boxes, "scores": jnp.where(classes > inference.score_threshold, scores, 0)}


def _detections(
    detector: Detector, outputs: Outputs, sizes: Array, scales: Array
) -> dict[str, Array]:
    return detector.detections(outputs, sizes, scales)._asdict()
