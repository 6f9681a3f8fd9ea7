"""bccd."""

from gfl_jax.config import Data, Experiment, Train
from gfl_jax.models.network import Backbone, Model

experiment = Experiment(
    model=Model(
        backbone=Backbone(depth=18, norm="bn", frozen_stages=-1),
        fpn_width=128,
        head_width=128,
        stacked_convs=2,
    ),
    data=Data(
        train_annotations="annotations/instances_trainval.json",
        train_images="trainval",
        val_annotations="annotations/instances_test.json",
        val_images="test",
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
