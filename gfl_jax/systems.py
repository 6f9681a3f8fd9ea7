"""The detectors of the paper's tables, each as model, detector and what else its training needs.

GFL is the base: `gfl_jax.config.Experiment` has its values as defaults. The others state what they
do differently, as described in their papers and the reference's configs.
"""

import dataclasses
from typing import Any

from gfl_jax import assign, priors
from gfl_jax.config import Data, Experiment, Train
from gfl_jax.data.sources import CocoFolder
from gfl_jax.detectors.box import Deltas, Distances, LogDistances, Overlap, SmoothL1
from gfl_jax.detectors.classification import Focal, SoftmaxMining
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.detectors.quality import NoQuality, QualityBranch
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model
from gfl_jax.models.ssd import SSDModel


def variant(experiment: Experiment, **parts: dict[str, Any]) -> Experiment:
    """The experiment with other fields in some of its parts.

    Args:
        experiment: what to start from.
        parts: fields to replace, by part: `variant(gfl, detector={"box": Deltas()})`.
    """
    values = {
        name: dataclasses.replace(getattr(experiment, name), **fields)
        for name, fields in parts.items()
    }
    return dataclasses.replace(experiment, **values)


def for_coco(system: Experiment, pretrained: str) -> Experiment:
    """A system as trained on COCO: from ImageNet weights, in bfloat16, skipping faulty boxes.

    COCO's train2017 has two boxes without height.
    """
    model = dataclasses.replace(system.model, dtype="bfloat16").with_pretrained(pretrained)
    system = dataclasses.replace(system, model=model)
    return variant(
        system, data={"source": CocoFolder(on_error="skip")}, train={"checkpoint_every": 1000}
    )


gfl = Experiment()
"""GFL (arXiv 2006.04388)."""

atss = Experiment(
    model=Model(head=Head("atss")),
    detector=Detector(
        box=Deltas(),
        quality=QualityBranch("centerness"),
        classification=Focal(),
    ),
)
"""ATSS (Zhang et al., arXiv 1912.02424)."""

fcos = Experiment(
    model=Model(
        backbone=Backbone(caffe=True, train_norm=False),
        neck=Neck(extra_relu=True),
        head=Head("conv", quality_on="cls"),
        mean=(102.9801, 115.9465, 122.7717),
        std=(1.0, 1.0, 1.0),
        channel_order="bgr",
    ),
    detector=Detector(
        priors=priors.Points(),
        assigner=assign.FCOS(),
        box=Distances("exp", "pixels"),
        quality=QualityBranch("centerness"),
        classification=Focal(),
        box_loss=Overlap("iou"),
        box_weight=1.0,
        counting="batch",
        min_weight=1e-6,
        inference=Inference(nms_iou=0.5),
    ),
    train=Train(
        warmup="constant", warmup_factor=1 / 3, bias_lr=2.0, bias_decay=0.0, clip_norm=35.0
    ),
)
"""FCOS as first published (Tian et al., arXiv 1904.01355)."""

fcos_center = variant(fcos, detector={"assigner": assign.FCOS(center_radius=1.5)})
"""FCOS whose positives lie near the centres of objects."""

fcos_improved = variant(
    fcos_center,
    model={
        "head": Head("conv", conv_bias=True),
        "mean": (103.53, 116.28, 123.675),
    },
    detector={
        "box": Distances("relu", "strides"),
        "box_loss": Overlap("giou"),
        "inference": Inference(nms_iou=0.6),
    },
    train={"warmup": "linear", "clip_norm": 0.0},
)
"""FCOS with center sampling, centerness on the regression tower, distances in strides and GIoU: the
FCOS of the paper's tables."""

retinanet = Experiment(
    model=Model(
        neck=Neck(extra_from="input"),
        head=Head("retina", norm="none", scales=False),
    ),
    detector=Detector(
        priors=priors.RetinaAnchors(),
        assigner=assign.MaxIoU(),
        box=Deltas((1.0, 1.0, 1.0, 1.0)),
        quality=NoQuality(),
        classification=Focal(),
        box_loss=SmoothL1(0.0),
        box_weight=1.0,
        inference=Inference(nms_iou=0.5),
    ),
)
"""RetinaNet (Lin et al., arXiv 1708.02002)."""

foveabox = Experiment(
    model=Model(
        neck=Neck(extra_from="input"),
        head=Head("conv", norm="none", scales=False),
    ),
    detector=Detector(
        priors=priors.Points(),
        assigner=assign.FoveaBox(),
        box=LogDistances(),
        quality=NoQuality(),
        classification=Focal(alpha=0.4, gamma=1.5),
        box_loss=SmoothL1(0.11),
        box_weight=1.0,
        counting="extra",
        inference=Inference(nms_iou=0.5, clip_margin=1, drop_empty=False),
    ),
)
"""FoveaBox (Kong et al., arXiv 1904.03797)."""

ssd512 = Experiment(
    model=SSDModel(),
    detector=Detector(
        priors=priors.SSDBoxes(),
        assigner=assign.MaxIoU(0.5, 0.5, force_first=True),
        box=Deltas(),
        quality=NoQuality(),
        classification=SoftmaxMining(),
        box_loss=SmoothL1(1.0),
        box_weight=1.0,
        inference=Inference(score_threshold=0.02, nms_iou=0.45, max_per_image=200),
    ),
    data=Data(scale=(512, 512), keep_ratio=False, augmentation="ssd", repeats=5),
    train=Train(
        batch_size=64,
        lr=5e-4,  # 0.002 for this batch
        weight_decay=5e-4,
        epochs=24,
        milestones=(16, 22),
    ),
)
"""SSD512 (Liu et al., arXiv 1512.02325)."""
