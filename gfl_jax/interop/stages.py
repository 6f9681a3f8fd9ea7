"""Everything that happens to a batch, stage by stage, under the names of the PyTorch reference.

Arrays are numpy, in torch's layout: [images, channels, height, width].
"""

import jax
import jax.numpy as jnp
import numpy as np

from gfl_jax.assign import IGNORED
from gfl_jax.data.batch import Batch
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.matching import frame_of
from gfl_jax.detectors.quality import centerness
from gfl_jax.interop.names import to_torch, torch_name
from gfl_jax.models.network import Arrays, Network, Variables

INVALID = -3
"""What a prior in the padding is assigned to."""

Stages = dict[str, np.ndarray]


def stages(network: Network, detector: Detector, variables: Variables, batch: Batch) -> Stages:
    """The stages from pixels to detections.

    Returns:
        `input`; `backbone.0`, ... (C2 to C5); `feature.P3` to `.P7` (SSD: S0 to S6);
        `head.cls.P3`, `head.box.P3`, ...: logits and the box representation's parameters (all
        logits of a distribution), and `head.quality.P3`, ... where there is a quality branch;
        `assign.gt` [images, priors]: the object of each prior, or -1 background, -2 ignored,
        -3 padding; `assign.labels` (the number of classes is background), `assign.weight`,
        `assign.box_targets` in pixels, `assign.parameters`: the same as parameters of the box
        representation, `assign.centerness`, `assign.num_pos`; for each loss term `loss.NAME`,
        `loss.NAME.parts` by level and `loss.NAME.images` by image; `raw.boxes.I`, `raw.scores.I`,
        `raw.labels.I`: candidates of image I above the threshold, and `det.*`: its
        detections.
    """

    @jax.jit
    def run(variables, batch):
        module = network.module(variables, train=False)
        x = network.normalize(batch.images, batch.sizes)
        backbone = module.backbone(x)
        pyramid = module.neck(backbone)
        outputs = module.bbox_head(pyramid)
        priors = detector.priors_of(outputs)
        trained, matched = detector.match(outputs, batch)[:2]
        frame = frame_of(priors)
        index = jnp.maximum(matched, 0)[..., None]
        target = jnp.take_along_axis(batch.boxes, index, axis=1)
        return {
            "input": x,
            "backbone": backbone,
            "pyramid": pyramid,
            "outputs": outputs,
            "trained": trained,
            "matched": matched,
            "target": target,
            "parameters": detector.box.encode(target / frame.strides[:, None], frame),
            "centerness": centerness(priors.centers, target),
            "losses": detector.losses_per_prior(outputs, batch),
            "candidates": detector.candidates(outputs, batch.sizes),
            "detections": detector.detections(outputs, batch.sizes, batch.scales),
        }

    found = jax.tree.map(np.asarray, run(variables, batch))
    outputs = found["outputs"]
    priors = detector.priors_of(outputs)
    box = [_shown(x, n, detector) for x, n in zip(outputs.box_logits, priors.per_cell, strict=True)]
    first = "P3" if len(found["backbone"]) == 4 else "S0"
    result = {"input": _nchw(found["input"])}
    result |= {f"backbone.{i}": _nchw(x) for i, x in enumerate(found["backbone"])}
    for name, maps in (
        ("feature", found["pyramid"]),
        ("head.cls", outputs.cls_logits),
        ("head.box", box),
        ("head.quality", outputs.quality_logits),
    ):
        levels = enumerate(maps, int(first[1]))
        result |= {f"{name}.{first[0]}{level}": _nchw(x) for level, x in levels}

    matched, trained = found["matched"], found["trained"]
    positive, index = matched >= 0, np.maximum(matched, 0)
    outputs_of_class = detector.classification.channels(0)  # 1 if there is a background
    num_classes = outputs.cls_logits[0].shape[-1] // priors.per_cell[0] - outputs_of_class
    rows = np.arange(len(matched))[:, None]
    invalid = ~trained & (matched != IGNORED)
    result["assign.gt"] = np.where(invalid, INVALID, matched)
    result["assign.labels"] = np.where(positive, batch.labels[rows, index], num_classes)
    result["assign.weight"] = trained.astype(np.float32)
    for name, values in (("box_targets", found["target"]), ("parameters", found["parameters"])):
        result[f"assign.{name}"] = np.where(positive[..., None], values, 0)
    result["assign.centerness"] = np.where(positive, found["centerness"], 0)
    result["assign.num_pos"] = positive.sum(1)

    ends = np.cumsum(priors.levels)[:-1]
    for name, share in found["losses"].items():
        parts = [level.sum(dtype=np.float64) for level in np.split(share, ends, axis=1)]
        result |= {f"loss.{name}.parts": np.array(parts), f"loss.{name}": np.sum(parts)}
        result[f"loss.{name}.images"] = share.sum(1, dtype=np.float64)
    result["loss.total"] = np.sum([result[f"loss.{name}"] for name in found["losses"]])

    detections = found["detections"]
    for i, (boxes, scores, labels) in enumerate(zip(*found["candidates"][:3], strict=True)):
        enters = scores > 0
        if detector.inference.drop_empty:
            enters &= (boxes[:, 2:] > boxes[:, :2]).all(1)
        result |= _parts("raw", i, boxes[enters], scores[enters], labels[enters])
        kept = detections.mask[i]
        result |= _parts("det", i, *(array[i][kept] for array in detections[:3]))
    return result


def gradients(network: Network, detector: Detector, variables: Variables, batch: Batch) -> Arrays:
    """The gradient of the sum of all loss terms with respect to every trained parameter."""

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
    """Arrays by our dotted names, renamed and laid out as in torch."""
    paths = {".".join(map(str, path)): path for path in network.paths}
    return {torch_name(paths[name]): to_torch(paths[name], a) for name, a in arrays.items()}


def _parts(kind: str, i: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Stages:
    return {f"{kind}.boxes.{i}": boxes, f"{kind}.scores.{i}": scores, f"{kind}.labels.{i}": labels}


def _shown(x: np.ndarray, per_cell: int, detector: Detector) -> np.ndarray:
    """The parameters of a level's boxes, or all channels if there are more than parameters."""
    raw = jnp.asarray(x).reshape(*x.shape[:-1], per_cell, -1)
    parameters = detector.box.parameters(raw)
    return np.asarray(parameters if parameters.shape == raw.shape else raw).reshape(x.shape)


def _nchw(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 3, 1, 2)
