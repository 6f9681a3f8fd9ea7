"""ATSS, ResNet-50, 1x schedule: the baseline of tables 1a, 2a and 3 of the paper.

Command:   python train.py configs/atss_r50_fpn_1x_coco.py --data.root COCO
Hardware:  as gfl_r50_fpn_1x_coco.py.
Expected:  AP 39.2 on val2017 (the paper's table 1a; mmdetection's atss_r50_fpn_1x_coco: 39.4).
Run here:  no. Every stage, loss and gradient equals mmdetection's (tests/reference), and it takes
           its first steps in the tests; never trained on COCO.
"""

from gfl_jax import systems

experiment = systems.for_coco(systems.atss, "timm/resnet50.tv_in1k")
