"""Default job."""

from gfl_jax.config import Data, Experiment, Train
from gfl_jax.models.network import Backbone, Model

experiment = Experiment(
    model=Model(
        backbone=Backbone(depth=18, width=32, norm="bn", frozen_stages=-1),
        fpn_width=64,
        head_width=64,
        stacked_convs=2,
    ),
    data=Data(source="shapes", scale=(192, 192), workers=0),
    train=Train(
        batch_size=16,
        lr=0.02,
        epochs=8,
        milestones=(6, 7),
        warmup_steps=100,
        clip_norm=35.0,
        eval_every=4,
    ),
)
