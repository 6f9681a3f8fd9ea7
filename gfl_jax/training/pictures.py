"""What a detector sees on a few validation images, for those who follow its training."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from gfl_jax.data import images
from gfl_jax.data.batch import Batch
from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import eval_plan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.detectors import sides
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.sides import Sides
from gfl_jax.detectors.with_sides import detections_with_sides
from gfl_jax.distributed import SHARDED, Pmap, ShardMap
from gfl_jax.drawing import draw_boxes
from gfl_jax.models.network import Network, Variables

LONG_SIDE = 640
"""Longer side of a picture, in pixels."""

LEAST_SCORE = 0.3
"""Of the boxes that are drawn."""


class Seen(NamedTuple):
    """What the detector sees on the images of this process.

    Attributes:
        pictures: with boxes, by image id; uint8 RGB [height, width, 3].
        spread: standard deviation of each side of each detection, in pixels of the image; [n].
            Empty if boxes are described by four numbers.
    """

    pictures: dict[int, np.ndarray]
    spread: np.ndarray


class Pictures:
    """Detects on a few validation images, repeatedly."""

    def __init__(
        self,
        network: Network,
        detector: Detector,
        data: Data,
        devices: Pmap | ShardMap,
        split: PreparedSplit,
        count: int,
    ):
        """Compiles nothing yet.

        Args:
            network: the network.
            detector: turns its outputs into detections.
            data: how images reach the network.
            devices: the device mapping.
            split: the validation images.
            count: how many of them, evenly spaced; 0: none.
        """

        def predict(variables: Variables, batch: Batch) -> Any:
            outputs, _ = network.apply(variables, batch.images, batch.sizes, train=False)
            return detections_with_sides(detector, outputs, batch.sizes, batch.scales)

        self._count, self._split, self._devices = count, split, devices
        self._data = dataclasses.replace(data, workers=0)
        self._predict = devices.map(predict, outputs=SHARDED)

    def __call__(self, variables: Any) -> Seen | None:
        """Detects with replicated variables; every process must call it. None without images."""
        if not self._count:
            return None
        devices, split, pictures = self._devices, self._split, {}
        size = -(-self._count // devices.count) * devices.count
        plan = eval_plan(self._data, split, size)
        spaced = np.linspace(0, len(plan.indices) - 1, min(self._count, len(plan.indices)))
        plan = dataclasses.replace(plan, indices=spaced.astype(int))
        found = [np.zeros(0)]
        steps = range(plan.steps_per_epoch)
        for host in batches(plan, split, steps, self._data, devices.share):
            predicted = self._predict(variables, devices.shard(host.batch))
            detections, where = devices.fetch_local(predicted)
            first = devices.share[0] * len(detections.mask)
            for slot, mask in enumerate(detections.mask):
                if not host.image_mask[first + slot]:
                    continue
                image_id = int(host.image_ids[first + slot])
                boxes, scores, labels = (array[slot, mask] for array in detections[:3])
                pictures[image_id] = self._drawn(image_id, boxes, scores, labels)
                own = Sides(*(array[slot, mask] for array in where))
                if own.positions.shape[-1] > 1:
                    found.append(sides.spread(own).ravel())
        return Seen(pictures, np.concatenate(found))

    def _drawn(
        self, image_id: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        (index,) = np.flatnonzero(self._split.image_ids == image_id)
        record = self._split.source[int(index)]
        size = record["height"], record["width"]
        image = images.decode(record["image"], size, record["filename"])
        image, scale = images.resize_keep_ratio(image, LONG_SIDE, LONG_SIDE)
        shown = scores >= LEAST_SCORE
        boxes, classes = boxes[shown] * np.tile(scale, 2), labels[shown].tolist()
        names = [self._split.category_names[label] for label in classes]
        texts = [f"{n} {score:.2f}" for n, score in zip(names, scores[shown], strict=True)]
        return draw_boxes(image, boxes, classes, texts)
