"""GFL, ResNet-50, 1x schedule: table 3, last row, of the paper.

Command:   python train.py configs/gfl_r50_fpn_1x_coco.py --data.root COCO
           COCO holds annotations/instances_{train,val}2017.json, train2017/ and val2017/.
           A data set prepared by tfds as array_record: --data.source Tfds --data.root TFDS_DIR
Hardware:  meant for 8 accelerators x 2 images, or any number of devices that divides the batch of
           16 (the learning rate follows --train.batch-size).
Expected:  AP 40.2 on val2017 (the paper's table 3 and mmdetection's gfl_r50_fpn_1x_coco; seeds
           differ by 0.1 to 0.2).
Run here:  no. In float32 it took nine steps of two images on a CPU and was evaluated on 79 photos;
           never trained on COCO.

The backbone is torchvision's ImageNet ResNet-50, fetched from the Hugging Face hub or put where the
error message says. COCO's train2017 has two boxes without height, which `on_error="skip"` leaves
out and reports.
"""

from gfl_jax.config import Data, Experiment, Train
from gfl_jax.data.sources import CocoFolder
from gfl_jax.models.network import Backbone, Model

experiment = Experiment(
    model=Model(backbone=Backbone(depth=50, pretrained="timm/resnet50.tv_in1k"), dtype="bfloat16"),
    data=Data(source=CocoFolder(on_error="skip")),
    train=Train(checkpoint_every=1000),
)
