"""GFL on `shapes` with a classification and a box loss from the user's own file.

Command:   python train.py examples/gfl_r18_custom_losses.py
Hardware:  two CPU cores, as configs/gfl_r18_fpn_shapes.py.
Expected:  nothing published; an example of how losses are exchanged.
Run here:  a few steps, in the tests.
"""

from pathlib import Path

from configs.gfl_r18_fpn_shapes import experiment as base
from gfl_jax.detectors.box import CustomBoxLoss
from gfl_jax.detectors.classification import CustomClassification
from gfl_jax.systems import variant

LOSSES = Path(__file__).resolve().with_name("custom_losses.py")

experiment = variant(
    base,
    detector={
        "classification": CustomClassification(f"{LOSSES}:poly_quality_focal_loss"),
        "box_loss": CustomBoxLoss(f"{LOSSES}:alpha_iou_loss"),
    },
)
