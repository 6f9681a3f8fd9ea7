"""Predictions on a whole split, judged by pycocotools."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from gfl_jax.coco_eval import Evaluation, evaluate, ground_truth
from gfl_jax.data.batch import HostBatch
from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import eval_plan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.detectors.dense import Detector
from gfl_jax.distributed import Pmap, ShardMap, ahead
from gfl_jax.models.network import Network
from gfl_jax.training.step import make_forward, make_predict


@dataclasses.dataclass
class Evaluator:
    """Evaluates variables on a split; everything compiled once."""

    network: Network
    detector: Detector
    data: Data
    devices: Pmap | ShardMap
    split: PreparedSplit
    per_device: int = 8
    limit: int = 0

    def __post_init__(self):
        self.predict = self.devices.map(make_predict(self.network, self.detector), [True])
        batch_size = self.per_device * self.devices.count
        self.plan = eval_plan(self.data, self.split, batch_size, self.limit)
        self._forward = self.devices.map(make_forward(self.network), [True])
        self._truth = ground_truth(self.split)

    def _batches(self, steps: int) -> Iterator[HostBatch]:
        return batches(self.plan, self.split, range(steps), self.data, self.devices.share)

    def __call__(
        self, variables: Any, before_each: Callable[[], None] = lambda: None
    ) -> tuple[Evaluation, list[dict[str, Any]]]:
        """The evaluation and the COCO results of replicated variables; the same on every host.

        `before_each` is called before each batch.
        """
        steps = self.plan.steps_per_epoch
        results = predict_all(
            self.predict,
            variables,
            self._batches(steps),
            self.devices,
            self.split,
            total=steps,
            before_each=before_each,
        )
        image_ids = self.split.image_ids[self.plan.indices].tolist()
        return evaluate(results, self._truth, image_ids), results

    def images_per_second(self, variables: Any, repeats: int = 5) -> tuple[float, float]:
        """Throughput on the first batch, with and without post-processing: medians, in turn."""
        host = next(self._batches(1))
        shard = self.devices.shard(host.batch)
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
    """Detections of all images, as COCO results.

    Args:
        predict: mapped over the devices: (variables, batch) to Detections.
        variables: replicated over the devices.
        batches: every image once among the slots that are real; of each this host's part.
        devices: the mapping.
        split: gives category ids.
        total: number of batches, for the progress bar.
        before_each: called before each batch.

    Returns:
        One entry a detection: image_id, category_id, bbox (x, y, width, height in pixels of the
        original image) and score. The same on every host.
    """
    results = []
    progress = tqdm(
        ahead(devices, batches, lambda host: host.batch),
        total=total,
        desc="evaluating",
        unit=" batches",
        leave=False,
        disable=devices.share[0] > 0,
    )
    for host, batch in progress:
        before_each()
        found = devices.fetch_sharded(predict(variables, batch))
        for slot in np.flatnonzero(host.image_mask):
            for i in np.flatnonzero(found.mask[slot]):
                x1, y1, x2, y2 = found.boxes[slot, i].tolist()
                results.append(
                    {
                        "image_id": int(host.image_ids[slot]),
                        "category_id": split.category_ids[found.labels[slot, i]],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "score": float(found.scores[slot, i]),
                    }
                )
    return results
