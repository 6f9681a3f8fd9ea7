"""SSD512, VGG-16, 24 epochs of five rounds each: table 1b of the paper.

Command:   python train.py configs/ssd512_vgg16_coco.py --data.root COCO
Hardware:  meant for 8 accelerators x 8 images (the learning rate follows --train.batch-size).
Expected:  AP 29.5 on val2017 (mmdetection's ssd512_coco; the paper: 29.4).
Run here:  no. Every stage, loss and gradient equals mmdetection's (tests/reference), and it takes
           its first steps in the tests; never trained on COCO.

VGG-16 comes from the file vgg16_caffe-292e1171.pth of OpenMMLab's model zoo (fc6 and fc7 are
already convolutions), in the current folder or named by --model.pretrained.
"""

from gfl_jax import systems

experiment = systems.for_coco(systems.ssd512, "vgg16_caffe-292e1171.pth")
