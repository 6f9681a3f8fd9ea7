"""Table 2a: how a box is represented, on FCOS and on ATSS with centerness (COCO val2017).

Command:   gfl-jax tables 2a --data COCO
A row:     python train.py configs/table_2a.py:atss_general_dfl --data.root COCO
Run here:  the ATSS rows with --budget small on `shapes`, see docs/tables.md.

The Gaussian is trained by its likelihood alone, weighted like DFL. The paper states neither that
weight nor the unit of its distances (here: strides): see docs/differences.md.
"""

from configs.atss_r50_fpn_1x_coco import experiment as atss
from configs.fcos_r50_fpn_improved_1x_coco import experiment as fcos
from gfl_jax.config import Experiment, Row
from gfl_jax.detectors.box import Gaussian, GeneralDistribution
from gfl_jax.systems import variant

CHOICES = {
    "dirac": ("Dirac delta", {}),
    "gaussian": ("Gaussian", {"box": Gaussian(), "box_weight": 0.0}),
    "general": ("General", {"box": GeneralDistribution(), "dfl_weight": 0.0}),
    "general_dfl": ("General w/ DFL", {"box": GeneralDistribution()}),
}
PAPER = {
    "fcos": [
        (38.5, 56.8, 41.6, 22.4, 42.4, 49.1),
        (38.6, 56.5, 41.6, 21.7, 42.5, 50.0),
        (38.8, 56.6, 42.0, 22.5, 42.9, 49.8),
        (39.0, 57.0, 42.3, 22.6, 43.0, 50.6),
    ],
    "atss": [
        (39.2, 57.4, 42.2, 23.0, 42.8, 51.1),
        (39.3, 57.0, 42.4, 23.6, 42.9, 51.0),
        (39.3, 57.1, 42.5, 23.5, 43.0, 51.2),
        (39.5, 57.3, 42.8, 23.6, 43.2, 51.2),
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
