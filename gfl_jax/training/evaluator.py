"""Detections on a whole split, evaluated by pycocotools."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from gfl_jax.coco_eval import METRICS, ClassAP, Evaluation, evaluate, ground_truth
from gfl_jax.data.batch import Batch, HostBatch
from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import eval_plan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Detections
from gfl_jax.distributed import SHARDED, Pmap, ShardMap, prefetch
from gfl_jax.models.network import Network, Variables


def make_predict(network: Network, detector: Detector) -> Callable[[Variables, Batch], Detections]:
    """`predict(variables, batch)`: detections on one device's images, in original pixels."""

    def predict(variables: Variables, batch: Batch) -> Detections:
        outputs, _ = network.apply(variables, batch.images, batch.sizes, train=False)
        return detector.detections(outputs, batch.sizes, batch.scales)

    return predict


class Evaluator:
    """Evaluates variables on a split, repeatedly: compiled programs and workers are reused."""

    def __init__(
        self,
        network: Network,
        detector: Detector,
        data: Data,
        devices: Pmap | ShardMap,
        split: PreparedSplit,
        per_device: int = 8,
        limit: int = 0,
    ):
        """Neither compiles nor starts anything yet.

        Args:
            network: the network.
            detector: turns its outputs into detections.
            data: how images reach the network.
            devices: the device mapping.
            split: the images.
            per_device: images per device and batch.
            limit: number of images; 0: all.
        """
        self._data, self._devices, self._split = data, devices, split
        self.plan = eval_plan(data, split, per_device * devices.count, limit)
        self.predict = devices.map(make_predict(network, detector), outputs=SHARDED)
        self._forward = devices.map(
            lambda variables, batch: network.apply(
                variables, batch.images, batch.sizes, train=False
            )[0],
            outputs=SHARDED,
        )
        # One iterator over endless passes: its workers serve all evaluations.
        self._batches = batches(self.plan, split, range(2**62), data, devices.share)
        self._max_per_image = detector.inference.max_per_image
        self._truth = ground_truth(split) if devices.share[0] == 0 else None

    def __call__(
        self, variables: Any, before_each: Callable[[], None] = lambda: None
    ) -> tuple[Evaluation, list[dict[str, Any]]]:
        """Evaluates replicated variables.

        Args:
            variables: on the devices.
            before_each: called before each batch. If it raises, discard this evaluator.

        Returns:
            The evaluation, the same on every host, and the COCO results. With several processes,
            only the first evaluates.
        """
        steps = self.plan.steps_per_epoch
        results = predict_all(
            self.predict,
            variables,
            itertools.islice(self._batches, steps),
            self._devices,
            self._split,
            total=steps,
            before_each=before_each,
        )
        names, note = self._split.category_names, ""
        numbers = np.zeros(len(METRICS) + 2 * len(names))
        if self._truth is not None:
            image_ids = self._split.image_ids[self.plan.indices].tolist()
            evaluation = evaluate(results, self._truth, image_ids, self._max_per_image)
            pairs = [entry[1:] for entry in evaluation.per_class.values()]
            numbers[:] = [*evaluation.metrics.values(), *itertools.chain(*pairs)]
            note = evaluation.note
        numbers = self._devices.gather(numbers)[0]
        metrics, pairs = numbers[: len(METRICS)], numbers[len(METRICS) :].reshape(-1, 2)
        per_class = {
            i: ClassAP(name, *pair)
            for i, name, pair in zip(self._split.category_ids, names, pairs.tolist(), strict=True)
        }
        metrics = dict(zip(METRICS, metrics.tolist(), strict=True))
        return Evaluation(metrics, per_class, note), results

    def images_per_second(self, variables: Any, repeats: int = 5) -> tuple[float, float]:
        """Images/s on the first batch with and without post-processing: medians, run in turn."""
        here = dataclasses.replace(self._data, workers=0)
        host = next(batches(self.plan, self._split, range(1), here, self._devices.share))
        shard = self._devices.shard(host.batch)
        seconds: dict[str, list[float]] = {"all": [], "forward": []}
        for _ in range(repeats + 1):
            for name, run in (("all", self.predict), ("forward", self._forward)):
                start = time.perf_counter()
                jax.block_until_ready(run(variables, shard))
                seconds[name].append(time.perf_counter() - start)
        images = len(host.image_mask)
        # The first run of each compiles.
        with_post, without_post = (float(np.median(times[1:])) for times in seconds.values())
        return images / with_post, images / without_post

    def close(self) -> None:
        """Stops the worker processes."""
        self._batches.close()


def predict_all(
    predict: Callable,
    variables: Any,
    batches: Iterable[HostBatch],
    devices: Pmap | ShardMap,
    split: PreparedSplit,
    *,
    total: int,
    before_each: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Detections on all images, as COCO results.

    They are fetched one batch late, so that devices need not wait for the host.

    Args:
        predict: mapped over the devices: (variables, batch) to Detections.
        variables: replicated over the devices.
        batches: this host's part of each; every image is in one real slot.
        devices: the device mapping.
        split: gives category ids.
        total: number of batches, for the progress bar.
        before_each: called before each batch.

    Returns:
        One entry per detection: image_id, category_id, bbox (x, y, width, height in pixels of the
        original image) and score; sorted by image id. The same on every host.
    """
    progress = tqdm(
        prefetch(devices, batches, lambda host: host.batch),
        total=total,
        desc="evaluating",
        unit=" batches",
        leave=False,
        disable=devices.share[0] > 0,
    )
    rows, pending = [np.zeros((0, 7))], None
    for host, batch in progress:
        before_each()
        dispatched = host, predict(variables, batch)
        if pending:
            rows.append(_rows(*pending, devices))
        pending = dispatched
    if pending:
        rows.append(_rows(*pending, devices))
    gathered = devices.gather_rows(np.concatenate(rows))
    return [
        {
            "image_id": int(image_id),
            "category_id": split.category_ids[int(label)],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, label, x1, y1, x2, y2, score in gathered[
            np.argsort(gathered[:, 0], kind="stable")
        ].tolist()
    ]


def _rows(host: HostBatch, detections: Detections, devices: Pmap | ShardMap) -> np.ndarray:
    """This process's detections of a batch: (image id, label, x1, y1, x2, y2, score), float64."""
    local = devices.fetch_local(detections)
    index, slots = devices.share[0], len(local.mask)
    own = slice(index * slots, (index + 1) * slots)
    slot, place = np.nonzero(local.mask & host.image_mask[own, None])
    return np.column_stack(
        [
            host.image_ids[own][slot],
            local.labels[slot, place],
            local.boxes[slot, place],
            local.scores[slot, place],
        ]
    ).astype(np.float64)
