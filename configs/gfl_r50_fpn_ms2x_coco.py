"""GFL, ResNet-50, 2x schedule with multi-scale training.

Command:   python train.py configs/gfl_r50_fpn_ms2x_coco.py --data.root COCO
Hardware:  as gfl_r50_fpn_1x_coco.py, for twice the epochs.
Expected:  AP 42.9 on val2017 (mmdetection's gfl_r50_fpn_ms-2x_coco; the authors' repository 42.8;
           43.1 on test-dev in table 4 of the paper).
Run here:  no.

The short side is drawn from 480 to 800 pixels once per batch; small scales use the small canvas, so
four canvases are compiled in all.
"""

import dataclasses

from configs.gfl_r50_fpn_1x_coco import experiment as base

experiment = dataclasses.replace(
    base,
    data=dataclasses.replace(
        base.data, multi_scale=(480, 800), canvases=((608, 1024), (800, 1344))
    ),
    train=dataclasses.replace(base.train, epochs=24, milestones=(16, 22)),
)
