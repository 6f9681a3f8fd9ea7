"""FCOS as first published, ResNet-50, 1x schedule.

Command:   python train.py configs/fcos_r50_fpn_1x_coco.py --data.root COCO
Hardware:  as gfl_r50_fpn_1x_coco.py.
Expected:  AP 36.6 on val2017 (mmdetection's fcos_r50-caffe_fpn_gn-head_1x_coco).
Run here:  no. Every stage, loss and gradient equals mmdetection's (tests/reference), and so do
           ten steps; never trained on COCO.

The backbone's weights are those of Detectron, in caffe's layout (blue first, stride on the first
1x1): the file resnet50_caffe-788b5fa3.pth of OpenMMLab's model zoo, in the current folder
or named by --model.backbone.pretrained.
"""

from gfl_jax import systems

experiment = systems.for_coco(systems.fcos, "resnet50_caffe-788b5fa3.pth")
