"""GFL, ResNet-18 from random weights, on BCCD: 292 photos of blood smears, three classes.

Command:   python train.py configs/gfl_r18_fpn_bccd.py --data.root BCCD
           BCCD is a COCO-format folder of the data set at github.com/Shenggan/BCCD_Dataset (MIT),
           converted from its Pascal VOC files: trainval/, test/ and annotations/instances_*.json.
Hardware:  two CPU cores, no accelerator, half an hour, 3 GB of memory.
Expected:  AP 0.529 +- 0.010 on the 72 test photos (mmdetection 3.3 with this recipe, three seeds;
           here 0.525 +- 0.002, three seeds).
Run here:  yes, see the README's table of runs.

A recipe for laptops: photos at 320 x 240, pyramid and head 128 wide, two convolutions per tower.
"""

from gfl_jax.config import Data, Experiment, Train
from gfl_jax.data.sources import CocoFolder
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model

experiment = Experiment(
    model=Model(
        backbone=Backbone(depth=18, norm="bn", frozen_stages=-1),
        neck=Neck(128),
        head=Head(width=128, stacked_convs=2),
    ),
    data=Data(
        source=CocoFolder(
            train_annotations="annotations/instances_trainval.json",
            train_images="trainval",
            val_annotations="annotations/instances_test.json",
            val_images="test",
        ),
        scale=(320, 240),
        workers=0,
        cache_megabytes=256,
    ),
    train=Train(
        batch_size=8,
        lr=0.02,  # 0.01 for this batch
        epochs=24,
        milestones=(16, 22),
        warmup_steps=100,
        warmup_factor=0.01,
        clip_norm=35.0,
        eval_every=12,
    ),
)
