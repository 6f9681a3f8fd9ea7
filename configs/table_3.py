"""Table 3: QFL and DFL, each alone and both, on ATSS (COCO val2017).

Command:   gfl-jax tables 3 --data COCO
A row:     python train.py configs/table_3.py:qfl_dfl --data.root COCO
Run here:  with --budget small on `shapes`, see docs/tables.md.

The paper measured 19.4 images/s for each of the four.
"""

from configs.gfl_r50_fpn_1x_coco import experiment as gfl
from configs.table_1a import rows as table_1a
from configs.table_2a import rows as table_2a
from gfl_jax.config import Row

rows = {
    "neither": Row("ATSS", table_2a["atss_dirac"].experiment, (39.2, 57.4, 42.2)),
    "qfl": Row("ATSS + QFL", table_1a["atss_joint"].experiment, (39.9, 58.5, 43.0)),
    "dfl": Row("ATSS + DFL", table_2a["atss_general_dfl"].experiment, (39.5, 57.3, 42.8)),
    "qfl_dfl": Row("ATSS + QFL + DFL (GFL)", gfl, (40.2, 58.6, 43.4)),
}
