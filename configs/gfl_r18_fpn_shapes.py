"""GFL, ResNet-18 of half width, on the procedural `shapes` data set: the default job.

Command:   python train.py
Hardware:  two CPU cores, no accelerator.
Expected:  AP >= 0.50 on held-out images in at most ten minutes, including the making of the data.
Run here:  yes, see the README's table of runs.

3000 images of 128 x 128 with up to five textured shapes of six classes, 200 held out. Batches are
small: from random weights the number of steps counts more than their size.
"""

from gfl_jax.config import Data, Experiment, Train
from gfl_jax.data.sources import Shapes
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model

experiment = Experiment(
    model=Model(
        backbone=Backbone(depth=18, width=32, norm="bn", frozen_stages=-1),
        neck=Neck(64),
        head=Head(width=64, stacked_convs=2),
    ),
    data=Data(
        source=Shapes(),
        scale=(128, 128),
        workers=0,
        cache_megabytes=192,
    ),
    train=Train(
        batch_size=8,
        lr=0.08,  # 0.04 for this batch
        epochs=8,
        milestones=(5, 7),
        warmup_steps=100,
        warmup_factor=0.01,
        clip_norm=35.0,
        eval_every=4,
    ),
)
