"""Table 2c: Delta, the width of a bin in strides, of GFL with n = 16 (COCO val2017).

Command:   gfl-jax tables 2c --data COCO
A row:     python train.py configs/table_2c.py:delta_0.5 --data.root COCO
Run here:  no.
"""

from configs.gfl_r50_fpn_1x_coco import experiment as gfl
from gfl_jax.config import Row
from gfl_jax.detectors.box import GeneralDistribution
from gfl_jax.systems import variant

PAPER = {
    0.5: (40.2, 58.4, 43.0, 22.3, 43.8, 53.1),
    1.0: (40.2, 58.6, 43.4, 23.0, 44.3, 53.0),
    2.0: (39.9, 58.3, 42.9, 22.5, 43.8, 51.8),
    4.0: (39.8, 58.5, 42.8, 22.8, 43.4, 52.3),
}

rows = {
    f"delta_{delta:g}": Row(
        f"Delta {delta:g}", variant(gfl, detector={"box": GeneralDistribution(16, delta)}), paper
    )
    for delta, paper in PAPER.items()
}
