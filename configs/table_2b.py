"""Table 2b: n, the number of the last bin, of GFL (COCO val2017).

Command:   gfl-jax tables 2b --data COCO
A row:     python train.py configs/table_2b.py:n_12 --data.root COCO
Run here:  with --budget small on `shapes`, see docs/tables.md.
"""

from configs.gfl_r50_fpn_1x_coco import experiment as gfl
from gfl_jax.config import Row
from gfl_jax.detectors.box import GeneralDistribution
from gfl_jax.systems import variant

PAPER = {
    12: (40.1, 58.4, 43.1, 23.1, 43.8, 52.5),
    14: (40.2, 58.3, 43.6, 23.3, 44.2, 52.2),
    16: (40.2, 58.6, 43.4, 23.0, 44.3, 53.0),
    18: (40.1, 58.1, 43.1, 22.6, 43.9, 52.6),
}

rows = {
    f"n_{n}": Row(f"n {n}", variant(gfl, detector={"box": GeneralDistribution(n)}), paper)
    for n, paper in PAPER.items()
}
