"""A tiny experiment and batches of noise, also for programs that tests start."""

import dataclasses

import numpy as np

from gfl_jax.data.batch import Batch
from gfl_jax.data.cache import open_in_cache

# An epoch is three batches, the last one partly filled; 27 steps in all.
CONFIG = '''
"""Tiny."""

from gfl_jax.config import Data, Experiment, Train
from gfl_jax.data.sources import Shapes
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model

experiment = Experiment(
    model=Model(
        backbone=Backbone(depth=18, width=8, norm="bn", frozen_stages=-1),
        neck=Neck(32),
        head=Head(width=32, stacked_convs=1),
    ),
    # So short a training finds little: every score counts.
    detector=Detector(inference=Inference(score_threshold=0.0, nms_pre=60)),
    data=Data(
        source=Shapes(num_train=22, num_val=10, image_size=(64, 64)),
        scale=(64, 64),
        workers=0,
    ),
    train=Train(
        batch_size=8,
        lr=0.02,
        epochs=9,
        milestones=(7,),
        warmup_steps=5,
        clip_norm=35.0,
        ema_decay=0.5,
        eval_every=4,
        checkpoint_every=2,
        log_every=1,
    ),
)
'''


def prepare(raw, cache, on_error="raise"):
    """A split of raw files in COCO's format, prepared in a cache folder."""
    raw = dataclasses.replace(raw)  # which has not read the json yet
    return open_in_cache("val", raw, cache, on_error)


def make_batch(objects, canvas=(64, 64), *, classes=3, slots=8, seed=0):
    """Noise images with as many random boxes as `objects` says."""
    rng = np.random.default_rng(seed)
    size, (height, width) = len(objects), canvas
    low = rng.uniform(0, np.array([width, height]) - 20, (size, slots, 2))
    side = rng.uniform(12, 40, (size, slots, 2))
    boxes = np.concatenate([low, np.minimum(low + side, [width, height])], -1)
    exists = np.arange(slots) < np.array(objects)[:, None]
    return Batch(
        images=rng.integers(0, 256, (size, height, width, 3), np.uint8),
        sizes=np.tile(np.array([height, width], np.int32), (size, 1)),
        scales=np.ones((size, 2), np.float32),
        boxes=np.where(exists[..., None], boxes, 0).astype(np.float32),
        labels=np.where(exists, rng.integers(0, classes, exists.shape), 0).astype(np.int32),
        box_mask=exists,
        image_mask=np.ones(size, bool),
    )
