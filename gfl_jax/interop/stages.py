"""Everything that happens to a batch, stage by stage, under the names of the PyTorch reference.

Arrays are numpy, in torch's layout: [images, channels, height, width].
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gfl_jax.assign import assign_batch
from gfl_jax.data.batch import Batch
from gfl_jax.detectors.dense import Detector
from gfl_jax.interop.names import to_torch, torch_name
from gfl_jax.models.network import Arrays, Network, Variables

LEVELS = ("P3", "P4", "P5", "P6", "P7")
BACKGROUND, INVALID = -1, -3

Stages = dict[str, np.ndarray]


def make_batch(
    images: Sequence[np.ndarray], boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray]
) -> Batch:
    """A batch of images at network scale, on the smallest canvas whose sides are multiples of 32.

    Args:
        images: uint8 RGB [height, width, 3].
        boxes: objects of each image, [n, 4], x1 y1 x2 y2 in its pixels.
        labels: their class indices, [n].
    """
    count, slots = len(images), max([len(b) for b in boxes] + [1])
    height, width = (-(-max(i.shape[axis] for i in images) // 32) * 32 for axis in (0, 1))
    arrays: dict[str, Any] = {
        "images": np.zeros((count, height, width, 3), np.uint8),
        "sizes": np.array([image.shape[:2] for image in images], np.int32),
        "scales": np.ones((count, 2), np.float32),
        "boxes": np.zeros((count, slots, 4), np.float32),
        "labels": np.zeros((count, slots), np.int32),
        "box_mask": np.arange(slots) < np.array([len(b) for b in boxes])[:, None],
        "image_mask": np.ones(count, bool),
    }
    for i, image in enumerate(images):
        arrays["images"][i, : image.shape[0], : image.shape[1]] = image
        arrays["boxes"][i, : len(boxes[i])] = boxes[i]
        arrays["labels"][i, : len(boxes[i])] = labels[i]
    return Batch(**arrays)


def stages(network: Network, detector: Detector, variables: Variables, batch: Batch) -> Stages:
    """The stages from pixels to detections.

    Returns:
        `input`; `backbone.0` to `.3` (C2 to C5); `feature.P3` to `.P7`; `head.cls.P3`,
        `head.box.P3`, ...: logits;
        `assign.gt` [images, priors]: the object of each prior, -1 background, -3 padding;
        `assign.labels` (the number of classes is background), `assign.weight`, `assign.box_targets`
        in pixels, `assign.num_pos`; for each loss term `loss.NAME` and `loss.NAME.parts` by level;
        `raw.boxes.I`, `raw.scores.I`, `raw.labels.I`: candidates of image I above the threshold
        and of some area, and `det.*` alike: its detections.
    """

    @jax.jit
    def run(variables, batch):
        module = network.module(variables, train=False)
        x = network.normalize(batch.images, batch.sizes)
        backbone = module.backbone(x)
        pyramid = module.neck(backbone[1:])
        outputs = module.bbox_head(pyramid)
        priors = detector.priors([level.shape[1:3] for level in outputs.cls_logits])
        valid = priors.valid(batch.sizes)
        matched = assign_batch(detector.assigner, priors, valid, batch.boxes, batch.box_mask)
        return {
            "input": x,
            "backbone": backbone,
            "pyramid": pyramid,
            "outputs": outputs,
            "valid": valid,
            "matched": matched,
            "losses": detector.losses_per_prior(outputs, batch),
            "candidates": detector.candidates(outputs, batch.sizes),
            "detections": detector.detections(outputs, batch.sizes, batch.scales),
        }

    found = jax.tree.map(np.asarray, run(variables, batch))
    cls_logits, box_logits = found["outputs"]
    result = {"input": _nchw(found["input"])}
    result |= {f"backbone.{i}": _nchw(x) for i, x in enumerate(found["backbone"])}
    for name, maps in (
        ("feature", found["pyramid"]),
        ("head.cls", cls_logits),
        ("head.box", box_logits),
    ):
        result |= {f"{name}.{level}": _nchw(x) for level, x in zip(LEVELS, maps, strict=True)}

    matched, valid = found["matched"], found["valid"]
    positive, index = matched >= 0, np.maximum(matched, 0)
    num_classes = cls_logits[0].shape[-1]
    rows = np.arange(len(matched))[:, None]
    result["assign.gt"] = np.where(valid, matched, INVALID)
    result["assign.labels"] = np.where(positive, batch.labels[rows, index], num_classes)
    result["assign.weight"] = valid.astype(np.float32)
    result["assign.box_targets"] = np.where(positive[..., None], batch.boxes[rows, index], 0)
    result["assign.num_pos"] = positive.sum(1)

    ends = np.cumsum([x.shape[1] * x.shape[2] for x in cls_logits])[:-1]
    for name, share in found["losses"].items():
        parts = [level.sum(dtype=np.float64) for level in np.split(share, ends, axis=1)]
        result |= {f"loss.{name}.parts": np.array(parts), f"loss.{name}": np.sum(parts)}
    result["loss.total"] = np.sum([result[f"loss.{name}"] for name in found["losses"]])

    threshold, detections = detector.inference.score_threshold, found["detections"]
    for i, (boxes, scores, labels) in enumerate(zip(*found["candidates"], strict=True)):
        enters = (scores > threshold) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        result |= _parts("raw", i, boxes[enters], scores[enters], labels[enters])
        kept = detections.mask[i]
        result |= _parts("det", i, *(array[i][kept] for array in detections[:3]))
    return result


def gradients(network: Network, detector: Detector, variables: Variables, batch: Batch) -> Arrays:
    """The gradient of the sum of all loss terms in every trained parameter."""

    @jax.jit
    def gradient(variables, batch):
        def objective(params: Arrays):
            arrays = variables._replace(params=params)
            outputs, _ = network.apply(arrays, batch.images, batch.sizes, train=True)
            terms = detector.losses(outputs, batch).terms
            return jnp.sum(jnp.stack(list(terms.values())))

        return jax.grad(objective)(variables.params)

    return gradient(variables, batch)


def torch_arrays(network: Network, arrays: Arrays) -> Stages:
    """Arrays by our dotted names as torch names and lays them out."""
    paths = {".".join(map(str, path)): path for path in network.paths}
    return {torch_name(paths[name]): to_torch(paths[name], a) for name, a in arrays.items()}


def _parts(kind: str, i: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Stages:
    return {f"{kind}.boxes.{i}": boxes, f"{kind}.scores.{i}": scores, f"{kind}.labels.{i}": labels}


def _nchw(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 3, 1, 2)
