"""Table 1a: how localization quality is represented, on FCOS and on ATSS (COCO val2017).

Command:   gfl-jax tables 1a --data COCO
A row:     python train.py configs/table_1a.py:atss_joint --data.root COCO
Run here:  with --budget small on `shapes`, see docs/tables.md.

The paper does not say how '-guided' weights losses, nor what weights the box loss without a
quality: see docs/differences.md.
"""

from configs.atss_r50_fpn_1x_coco import experiment as atss
from configs.fcos_r50_fpn_improved_1x_coco import experiment as fcos
from gfl_jax.config import Experiment, Row
from gfl_jax.detectors.classification import QualityFocal
from gfl_jax.detectors.quality import GuidedQuality, JointQuality, NoQuality, QualityBranch
from gfl_jax.systems import variant

CHOICES = {
    "none": ("w/o quality branch", {"quality": NoQuality()}),
    "centerness_branch": ("centerness-branch", {"quality": QualityBranch("centerness")}),
    "iou_branch": ("IoU-branch", {"quality": QualityBranch("iou")}),
    "centerness_guided": ("centerness-guided", {"quality": GuidedQuality("centerness")}),
    "iou_guided": ("IoU-guided", {"quality": GuidedQuality("iou")}),
    "joint": ("joint w/ QFL", {"quality": JointQuality(), "classification": QualityFocal()}),
}
PAPER = {
    "fcos": [
        (37.8, 56.2, 40.8, 21.2, 42.1, 48.2),
        (38.5, 56.8, 41.6, 22.4, 42.4, 49.1),
        (38.7, 56.7, 42.0, 21.6, 43.0, 50.3),
        (37.9, 56.7, 40.7, 21.2, 42.1, 49.4),
        (38.2, 57.0, 41.1, 22.5, 42.2, 48.9),
        (39.0, 57.8, 41.9, 22.0, 43.1, 51.0),
    ],
    "atss": [
        (38.0, 56.5, 40.7, 20.6, 42.1, 49.1),
        (39.2, 57.4, 42.2, 23.0, 42.8, 51.1),
        (39.6, 57.6, 43.0, 23.3, 43.7, 51.2),
        (38.2, 56.2, 41.0, 21.5, 41.9, 49.7),
        (38.9, 57.4, 41.8, 22.8, 42.4, 50.6),
        (39.9, 58.5, 43.0, 22.4, 43.9, 52.7),
    ],
}
BASES: dict[str, Experiment] = {"fcos": fcos, "atss": atss}

rows = {
    f"{base}_{name}": Row(
        f"{base.upper()}, {title}", variant(BASES[base], detector=choice), PAPER[base][i]
    )
    for base in BASES
    for i, (name, (title, choice)) in enumerate(CHOICES.items())
}
