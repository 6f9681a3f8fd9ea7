"""Table 1c: beta of QFL, on ATSS (COCO val2017).

Command:   gfl-jax tables 1c --data COCO
A row:     python train.py configs/table_1c.py:beta_2 --data.root COCO
Run here:  with --budget small on `shapes`, see docs/tables.md.
"""

from configs.table_1a import rows as table_1a
from gfl_jax.config import Row
from gfl_jax.detectors.classification import QualityFocal
from gfl_jax.systems import variant

PAPER = {
    0: (37.6, 55.4, 40.3),
    1: (39.0, 58.1, 41.7),
    2: (39.9, 58.5, 43.0),
    2.5: (39.7, 58.1, 42.7),
    4: (38.2, 55.4, 41.6),
}

rows = {
    f"beta_{beta:g}": Row(
        f"beta {beta:g}",
        variant(
            table_1a["atss_joint"].experiment,
            detector={"classification": QualityFocal(float(beta))},
        ),
        paper,
    )
    for beta, paper in PAPER.items()
}
