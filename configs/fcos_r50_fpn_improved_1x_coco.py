"""FCOS with all its improvements, ResNet-50, 1x schedule: the baseline of tables 1a and 2a.

Command:   python train.py configs/fcos_r50_fpn_improved_1x_coco.py --data.root COCO
Hardware:  as gfl_r50_fpn_1x_coco.py.
Expected:  AP 38.5 on val2017 (the paper's table 1a; mmdetection's
           fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco: 38.7).
Run here:  no. Every stage, loss and gradient equals mmdetection's (tests/reference), and it takes
           its first steps in the tests; never trained on COCO.

The backbone's weights are those of Detectron, in caffe's layout (blue first, stride on the first
1x1): the file resnet50_msra-5891d200.pth of OpenMMLab's model zoo, in the current folder
or named by --model.backbone.pretrained.
"""

from gfl_jax import systems

experiment = systems.for_coco(systems.fcos_improved, "resnet50_msra-5891d200.pth")
