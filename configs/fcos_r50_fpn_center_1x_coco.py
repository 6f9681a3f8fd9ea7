"""FCOS with center sampling alone, ResNet-50, 1x schedule.

Command:   python train.py configs/fcos_r50_fpn_center_1x_coco.py --data.root COCO
Hardware:  as gfl_r50_fpn_1x_coco.py.
Expected:  between the plain FCOS and the improved one; this project knows of no published number.
Run here:  no. Stages, losses and detections equal mmdetection's (crosscheck, on two photos);
           never trained on COCO.

The backbone's weights are those of Detectron, in caffe's layout (blue first, stride on the first
1x1): the file resnet50_caffe-788b5fa3.pth of OpenMMLab's model zoo, in the current folder
or named by --model.backbone.pretrained.
"""

from gfl_jax import systems

experiment = systems.for_coco(systems.fcos_center, "resnet50_caffe-788b5fa3.pth")
