"""GFL, ResNet-101, 2x schedule with multi-scale training.

Command:   python train.py configs/gfl_r101_fpn_ms2x_coco.py --data.root COCO
Hardware:  as gfl_r50_fpn_1x_coco.py; a step takes about 1.5 times as long as with ResNet-50 (by the
           number of multiplications, not measured).
Expected:  AP 44.7 on val2017 (mmdetection's gfl_r101_fpn_ms-2x_coco; 45.0 on test-dev in table 4 of
           the paper).
Run here:  no.
"""

import dataclasses

from configs.gfl_r50_fpn_ms2x_coco import experiment as base
from gfl_jax.models.network import Backbone

experiment = dataclasses.replace(
    base,
    model=dataclasses.replace(
        base.model, backbone=Backbone(depth=101, pretrained="timm/resnet101.tv_in1k")
    ),
)
