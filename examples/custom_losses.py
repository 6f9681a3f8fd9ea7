"""Two custom losses: published ones that this project does not have.

examples/gfl_r18_custom_losses.py names them; docs/losses.md explains how.
"""

import jax
import jax.numpy as jnp

from gfl_jax.boxes import aligned_iou
from gfl_jax.losses import quality_focal_loss


def poly_quality_focal_loss(logits, targets, epsilon=1.0, beta=2.0):
    """QFL with the first term of a Taylor expansion made larger (PolyLoss, arXiv 2204.12511).

        QFL + epsilon |y - sigma|^(beta + 1)

    Args:
        logits: [..., classes].
        targets: y in [0, 1], of the same shape.
        epsilon: how much is added; 0 is QFL.
        beta: of QFL.

    Returns:
        The loss of every class.
    """
    distance = jnp.abs(targets - jax.nn.sigmoid(logits))
    return quality_focal_loss(logits, targets, beta) + epsilon * distance ** (beta + 1)


def alpha_iou_loss(predicted, target, alpha=3.0):
    """1 - IoU^alpha (arXiv 2110.13675): boxes that fit well already are pulled harder.

    Args:
        predicted: boxes [..., 4] in strides.
        target: boxes of the objects, likewise [..., 4] in strides.
        alpha: 1 is the plain IoU loss.

    Returns:
        The loss of every box.
    """
    return 1 - aligned_iou(predicted, target) ** alpha
