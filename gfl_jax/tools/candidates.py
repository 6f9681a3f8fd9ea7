"""What a trained detector predicts before NMS, and the objects that are really there.

Shared by `consistency` and `ambiguity`.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from tqdm import tqdm

from gfl_jax.coco_eval import ground_truth
from gfl_jax.data.batch import Batch
from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import eval_plan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.detectors.dense import Detector
from gfl_jax.models.network import Network, Variables
from gfl_jax.priors import flatten
from gfl_jax.run import Run


class Candidates(NamedTuple):
    """The best candidates of an image before NMS, by descending score.

    Arrays on devices or the host, those of a batch with a leading axis for its images; pixels are
    those of the original image.

    Attributes:
        boxes: [n, 4], in pixels.
        scores: [n].
        labels: [n].
        raw: [n, channels], regression outputs of their priors.
        strides: [n, 4], of their levels along (x, y, x, y), in pixels.
        centers: [n, 4], of their priors, (x, y, x, y), in pixels.
    """

    boxes: Any
    scores: Any
    labels: Any
    raw: Any
    strides: Any
    centers: Any


def best_candidates(
    run: Run, split: PreparedSplit, count: int, limit: int = 0
) -> Iterator[tuple[int, Candidates]]:
    """The best candidates of every image, whatever their score.

    Args:
        run: the detector.
        split: the images.
        count: candidates per image.
        limit: only the first images; 0 for all.

    Yields:
        Image id and candidates on the host.
    """
    detector = dataclasses.replace(
        run.experiment.detector,
        inference=dataclasses.replace(
            run.experiment.detector.inference, score_threshold=0.0, nms_pre=count
        ),
    )
    predict = jax.jit(functools.partial(_predict, run.network, detector, count))
    batch_size = run.experiment.train.batch_size
    plan = eval_plan(run.experiment.data, split, batch_size, limit)
    loaded = batches(plan, split, range(plan.steps_per_epoch), run.experiment.data)
    for host in tqdm(loaded, total=plan.steps_per_epoch, unit=" batches", leave=False):
        predicted = jax.tree.map(np.asarray, predict(run.variables, host.batch))
        for slot in np.flatnonzero(host.batch.image_mask):
            image = jax.tree.map(lambda x, slot=slot: x[slot], predicted)
            yield int(host.image_ids[slot]), image


def _predict(
    network: Network, detector: Detector, count: int, variables: Variables, batch: Batch
) -> Candidates:
    outputs, _ = network.apply(variables, batch.images, batch.sizes, train=False)
    priors = detector.priors_of(outputs)
    raw = flatten(outputs.box_logits, priors.per_cell)
    boxes, scores, labels, index = detector.candidates(outputs, batch.sizes)
    scores, best = jax.lax.top_k(scores, min(count, scores.shape[1]))
    scale = jnp.tile(batch.scales, 2)[:, None]

    def chosen(x):
        return jnp.take_along_axis(x, best.reshape(*best.shape, *(1,) * (x.ndim - 2)), axis=1)

    index = chosen(index)
    return Candidates(
        boxes=chosen(boxes) / scale,
        scores=scores,
        labels=chosen(labels),
        raw=jnp.take_along_axis(raw, index[..., None], axis=1),
        strides=jnp.asarray(priors.strides)[index][..., None] / scale,
        centers=jnp.tile(jnp.asarray(priors.centers)[index], 2) / scale,
    )


class Objects(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: [n, 4], in pixels.
        labels: [n].
        ambiguity: [n, 4], the standard deviation of each side's label around `nominal`, in pixels.
            NaN if the data set does not state it, or if another object hides a part: that also
            makes a side unclear, by an unknown amount.
        nominal: [n, 4], in pixels.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ambiguity: np.ndarray
    nominal: np.ndarray


def objects_of(split: PreparedSplit) -> dict[int, Objects]:
    """The objects of every image by image id, without crowds."""
    label_of = {category_id: label for label, category_id in enumerate(split.category_ids)}
    rows: dict[int, list[Any]] = {image_id: [] for image_id in split.image_ids.tolist()}
    for annotation in ground_truth(split).dataset["annotations"]:
        if not annotation["iscrowd"]:
            x, y, w, h = annotation["bbox"]
            visible = annotation.get("visible", 1) == 1
            ambiguity = annotation.get("ambiguity", [np.nan] * 4) if visible else [np.nan] * 4
            left, top, width, height = annotation.get("nominal_bbox", [np.nan] * 4)
            nominal = [left, top, left + width, top + height]
            label = label_of[annotation["category_id"]]
            row = [x, y, x + w, y + h, label, *ambiguity, *nominal]
            rows[annotation["image_id"]].append(row)
    arrays = {image_id: np.array(values).reshape(-1, 13) for image_id, values in rows.items()}
    return {
        image_id: Objects(a[:, :4], a[:, 4].astype(int), a[:, 5:9], a[:, 9:])
        for image_id, a in arrays.items()
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; equal values share their mean rank.

    NaN for fewer than two values, or if all values of a or of b are equal.
    """
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(scipy.stats.spearmanr(a, b).statistic)
