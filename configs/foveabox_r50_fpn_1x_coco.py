"""FoveaBox, ResNet-50, 1x schedule: table 1b of the paper.

Command:   python train.py configs/foveabox_r50_fpn_1x_coco.py --data.root COCO
Hardware:  as gfl_r50_fpn_1x_coco.py.
Expected:  AP 36.5 on val2017 (mmdetection's fovea_r50_fpn_4xb4-1x_coco; the paper: 36.4).
Run here:  no. Every stage, loss and gradient equals mmdetection's (tests/reference), and it takes
           its first steps in the tests; never trained on COCO.
"""

from gfl_jax import systems

experiment = systems.for_coco(systems.foveabox, "timm/resnet50.tv_in1k")
