"""Table 1b: other detectors with and without QFL (COCO val2017).

Command:   gfl-jax tables 1b --data COCO
A row:     python train.py configs/table_1b.py:retinanet_joint --data.root COCO
Run here:  RetinaNet with --budget small on `shapes`, see docs/tables.md.

QFL takes the place of the focal loss, with the IoU of the decoded box as its target; the box loss
is unchanged. The paper does not say what happens to SSD's softmax: see docs/differences.md.
"""

from configs.foveabox_r50_fpn_1x_coco import experiment as foveabox
from configs.retinanet_r50_fpn_1x_coco import experiment as retinanet
from configs.ssd512_vgg16_coco import experiment as ssd512
from gfl_jax.config import Row
from gfl_jax.detectors.classification import QualityFocal
from gfl_jax.detectors.quality import JointQuality
from gfl_jax.systems import variant

JOINT = {"quality": JointQuality(weighting="none"), "classification": QualityFocal()}

rows = {
    "foveabox": Row("FoveaBox", foveabox, (36.4, 55.8, 38.8, 19.4, 40.4, 47.7)),
    "foveabox_joint": Row(
        "FoveaBox + joint w/ QFL",
        variant(foveabox, detector=JOINT),
        (37.0, 55.7, 39.6, 20.2, 41.2, 48.8),
    ),
    "retinanet": Row("RetinaNet", retinanet, (35.6, 55.5, 38.1, 20.1, 39.4, 46.8)),
    "retinanet_joint": Row(
        "RetinaNet + joint w/ QFL",
        variant(retinanet, detector=JOINT),
        (36.4, 56.3, 39.1, 20.4, 40.0, 48.7),
    ),
    "ssd512": Row("SSD512", ssd512, (29.4, 49.1, 30.6, 11.4, 34.1, 44.9)),
    "ssd512_joint": Row(
        "SSD512 + joint w/ QFL",
        variant(ssd512, detector=JOINT),
        (30.2, 50.3, 31.7, 13.3, 34.4, 45.5),
    ),
}
