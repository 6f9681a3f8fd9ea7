"""Losses of GFL (Li et al. 2020, arXiv 2006.04388) and of the detectors it is compared with.

Pure functions, element by element: weighting and reduction are the caller's. Inputs of any dtype
are taken to float32, and so is the result. Values and gradients are finite for logits of +-100 and
for empty, inverted, identical or distant boxes. Boxes are x1, y1, x2, y2 in any unit, pair by pair.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from gfl_jax.boxes import EPS, aligned_iou, aligned_union, area, enclosure, sizes
from gfl_jax.scores import Logits, as_scores, probability


def binary_cross_entropy(logits: Logits, targets: Num[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Cross entropy of p = sigmoid(x) and y: -((1 - y) log(1 - p) + y log(p)).

    Args:
        logits: x, or p as `Scores`.
        targets: y in [0, 1].

    Returns:
        The float32 loss of every element.
    """
    (log_p, log_not_p), y = as_scores(logits), _float32(targets)
    return -((1 - y) * log_not_p + y * log_p)


def quality_focal_loss(
    logits: Logits,
    targets: Float[Array, "*batch classes"],
    beta: float = 2.0,
) -> Float[Array, "*batch classes"]:
    """Quality focal loss, equation 2 of the paper.

        QFL(sigma) = -|y - sigma|^beta ((1 - y) log(1 - sigma) + y log(sigma))

    Its minimum is at sigma = y. The gradient flows through |y - sigma|^beta too; beta = 0 is binary
    cross entropy.

    Args:
        logits: x, or `Scores`; sigma = sigmoid(x) is the joint score of classification and quality.
        targets: y in [0, 1], a constant: the IoU of the predicted box with its object at the class
            of a positive, zero elsewhere.
        beta: how strongly well estimated scores are down-weighted, >= 0.

    Returns:
        The float32 loss of every class.
    """
    sigma, y = probability(logits), jax.lax.stop_gradient(_float32(targets))
    return _power(jnp.abs(y - sigma), beta) * binary_cross_entropy(logits, y)


def sigmoid_focal_loss(
    logits: Logits,
    labels: Num[Array, "*shape"],
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Array, "*shape"]:
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, equation 5; equation 1 here without alpha_t).

        FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t)

    p_t is p = sigmoid(x) where the label is 1 and 1 - p where it is 0; alpha_t likewise is alpha or
    1 - alpha. On such labels 1 - p_t = |y - p|, so this is QFL weighted by alpha_t.

    Args:
        logits: x, or p as `Scores`.
        labels: y, 0 or 1.
        alpha: weight of the labels 1.
        gamma: focusing parameter, >= 0.

    Returns:
        The float32 loss of every element.
    """
    y = _float32(labels)
    alpha_t = jnp.where(y == 1, alpha, 1 - alpha)
    return alpha_t * quality_focal_loss(logits, y, gamma)


def varifocal_loss(
    logits: Logits,
    targets: Float[Array, "*shape"],
    alpha: float = 0.75,
    gamma: float = 2.0,
) -> Float[Array, "*shape"]:
    """Varifocal loss (Zhang et al. 2021, arXiv 2008.13367, equation 2).

        VFL(p, q) = -q (q log(p) + (1 - q) log(1 - p))    if q > 0
                    -alpha p^gamma log(1 - p)             if q = 0

    Args:
        logits: x, with p = sigmoid(x), or p as `Scores`.
        targets: q in [0, 1], a constant: the IoU at the class of a positive, zero elsewhere.
        alpha: weight of the negatives.
        gamma: focusing parameter of the negatives, >= 0.

    Returns:
        The float32 loss of every element.
    """
    p, q = probability(logits), jax.lax.stop_gradient(_float32(targets))
    weight = jnp.where(q > 0, q, alpha * _power(p, gamma))
    return weight * binary_cross_entropy(logits, q)


def distribution_focal_loss(
    logits: Float[Array, "*batch bins"], target: Num[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Distribution focal loss, equation 6 of the paper.

        DFL(S_i, S_i+1) = -((y_i+1 - y) log(S_i) + (y - y_i) log(S_i+1)),    y_i <= y <= y_i+1

    S is the softmax over the n + 1 bins y_0 = 0, ..., y_n = n, whatever n. The two coefficients are
    max(0, 1 - |y_k - y|) at k = i and k = i + 1, and this is zero at all other bins. The minimum is
    at S equal to the coefficients, whose expectation is y.

    Args:
        logits: n + 1 of them for each side of a box.
        target: y, a constant, in bins: for bins of width Delta divide the distance by Delta first.
            Values outside [0, n] count as the nearer end.

    Returns:
        The float32 loss of every side.
    """
    n = logits.shape[-1] - 1
    y = jax.lax.stop_gradient(jnp.clip(_float32(target), 0, n))
    coefficients = jnp.maximum(0, 1 - jnp.abs(jnp.arange(n + 1) - y[..., None]))
    return -jnp.sum(coefficients * jax.nn.log_softmax(_float32(logits)), axis=-1)


def iou_loss(
    pred: Float[Array, "*#batch 4"], target: Float[Array, "*#batch 4"]
) -> Float[Array, "*batch"]:
    """IoU loss (Yu et al. 2016, arXiv 1608.01471): -log(max(IoU, 1e-6)).

    Boxes without overlap have the constant loss 13.8 and no gradient.
    """
    return -jnp.log(jnp.maximum(aligned_iou(pred, target), EPS))


def giou_loss(
    pred: Float[Array, "*#batch 4"], target: Float[Array, "*#batch 4"]
) -> Float[Array, "*batch"]:
    """Generalized IoU loss (Rezatofighi et al. 2019, arXiv 1902.09630, algorithm 2).

        GIoU loss = 1 - IoU + (E - U) / E

    U is the area of the union and E that of the smallest enclosing box, both at least 1e-6.
    """
    union = aligned_union(pred, target)
    enclosed = jnp.maximum(area(enclosure(pred, target)), EPS)
    return 1 - aligned_iou(pred, target) + (enclosed - union) / enclosed


def diou_loss(
    pred: Float[Array, "*#batch 4"], target: Float[Array, "*#batch 4"]
) -> Float[Array, "*batch"]:
    """Distance IoU loss (Zheng et al. 2020, arXiv 1911.08287, equation 7).

        DIoU loss = 1 - IoU + rho^2 / c^2

    rho is the distance between the centres, c the diagonal of the smallest enclosing box (c^2 at
    least 1e-6).
    """
    pred, target = _float32(pred), _float32(target)
    offset = (pred[..., :2] + pred[..., 2:] - target[..., :2] - target[..., 2:]) / 2
    rho_squared = jnp.sum(offset**2, axis=-1)
    c_squared = jnp.sum(sizes(enclosure(pred, target)) ** 2, axis=-1)
    return 1 - aligned_iou(pred, target) + rho_squared / jnp.maximum(c_squared, EPS)


def ciou_loss(
    pred: Float[Array, "*#batch 4"], target: Float[Array, "*#batch 4"]
) -> Float[Array, "*batch"]:
    """Complete IoU loss (Zheng et al. 2020, arXiv 1911.08287, equations 8 to 11).

        CIoU loss = DIoU loss + alpha v
        v = 4 / pi^2 (arctan(w_target / h_target) - arctan(w / h))^2
        alpha = v / (1 - IoU + v) if IoU > 0.5, else 0

    v compares the aspect ratios. alpha is detached: no gradient flows through it. Its threshold is
    that of the authors' later paper (arXiv 2005.03572): shape matters once boxes overlap well.
    """
    v = 4 / jnp.pi**2 * (_aspect_angle(target) - _aspect_angle(pred)) ** 2
    iou = aligned_iou(pred, target)
    alpha = jnp.where(iou > 0.5, v / jnp.maximum(1 - iou + v, EPS), 0)
    return diou_loss(pred, target) + jax.lax.stop_gradient(alpha) * v


def l1_loss(
    pred: Float[Array, "*#shape"], target: Float[Array, "*#shape"]
) -> Float[Array, "*shape"]:
    """Absolute difference |pred - target|, its gradient 0 where they are equal."""
    difference = _float32(pred) - _float32(target)
    return jnp.maximum(difference, -difference)  # the gradient of jnp.abs at 0 is 1


def smooth_l1_loss(
    pred: Float[Array, "*#shape"], target: Float[Array, "*#shape"], beta: float
) -> Float[Array, "*shape"]:
    """Smooth L1 loss (Girshick 2015, arXiv 1504.08083, equation 3, there with beta = 1).

        d^2 / (2 beta) if d < beta, else d - beta / 2,    d = |pred - target|

    beta > 0 is the difference at which the parabola ends.
    """
    d = l1_loss(pred, target)
    return jnp.where(d < beta, d**2 / (2 * beta), d - beta / 2)


def gaussian_nll_loss(
    mean: Float[Array, "*#shape"],
    log_variance: Float[Array, "*#shape"],
    target: Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
    """Negative log-likelihood of a normal distribution, its constant left out.

        NLL = (x - y)^2 / (2 sigma^2) + log(sigma^2) / 2

    For box sides as in He et al. 2019 (arXiv 1809.08545, section 3.2); the Gaussian of table 2a.

    Args:
        mean: x.
        log_variance: log(sigma^2).
        target: y.

    Returns:
        The float32 loss of every element, as small as -infinity where sigma vanishes at x = y.
    """
    difference, log_variance = _float32(mean) - _float32(target), _float32(log_variance)
    return 0.5 * (difference**2 * jnp.exp(-log_variance) + log_variance)


def _float32(array: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.asarray(array, jnp.float32)


def _power(base: Float[Array, "*shape"], exponent: float) -> Float[Array, "*shape"]:
    """base**exponent for base >= 0, with a gradient of 0 rather than infinity where base is 0."""
    positive = base > jnp.finfo(jnp.float32).tiny
    return jnp.where(positive, jnp.where(positive, base, 1) ** exponent, 0.0**exponent)


def _aspect_angle(boxes: Float[Array, "*batch 4"]) -> Float[Array, "*batch"]:
    """arctan(w / h), the height at least 1e-6."""
    extent = sizes(boxes)
    return jnp.arctan2(extent[..., 0], jnp.maximum(extent[..., 1], EPS))
