"""The losses against their definitions, worked examples and the values of mmdet."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfl_jax import losses
from gfl_jax.boxes import aligned_iou, pairwise_iou

quality_focal_loss = jax.jit(losses.quality_focal_loss, static_argnames=["beta"])
sigmoid_focal_loss = jax.jit(losses.sigmoid_focal_loss, static_argnames=["alpha", "gamma"])
varifocal_loss = jax.jit(losses.varifocal_loss, static_argnames=["alpha", "gamma"])
distribution_focal_loss = jax.jit(losses.distribution_focal_loss)
iou_loss = jax.jit(losses.iou_loss)
giou_loss = jax.jit(losses.giou_loss)
diou_loss = jax.jit(losses.diou_loss)
ciou_loss = jax.jit(losses.ciou_loss)
l1_loss = jax.jit(losses.l1_loss)
smooth_l1_loss = jax.jit(losses.smooth_l1_loss, static_argnames=["beta"])

SIGMOID_LOSSES = [quality_focal_loss, sigmoid_focal_loss, varifocal_loss]
IOU_LOSSES = [iou_loss, giou_loss, diou_loss, ciou_loss]
BETAS = [0.0, 0.5, 1.0, 2.5]

few_examples = settings(max_examples=25, deadline=None)
coordinate = st.integers(0, 30)
side = st.integers(1, 30)
box = st.tuples(coordinate, coordinate, side, side).map(
    lambda b: np.array([b[0], b[1], b[0] + b[2], b[1] + b[3]], np.float32)
)


@cache
def value_and_gradients(loss, **constants):
    """The element-wise loss and the gradients of its sum, as a function of its arrays."""

    @jax.jit
    def run(*arrays):
        value, vjp = jax.vjp(partial(loss, **constants), *arrays)
        return value, *vjp(jnp.ones_like(value))

    return run


def slope(function, x, step=1e-5):
    """Central difference, in float64."""
    return (function(x + step) - function(x - step)) / (2 * step)


def logits_and_targets(shape=(64, 5)):
    """Random logits and soft labels that are 0, 1 or between."""
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, shape), np.clip(rng.uniform(-0.5, 1.5, shape), 0, 1)
    return np.asarray(logits, np.float32), np.asarray(targets, np.float32)


# Quality focal loss, focal loss, varifocal loss


def test_qfl_with_beta_0_is_binary_cross_entropy():
    logits, targets = logits_and_targets()
    expected = jax.jit(optax.sigmoid_binary_cross_entropy)(logits, targets)
    np.testing.assert_allclose(quality_focal_loss(logits, targets, 0.0), expected, rtol=1e-6)


def test_qfl_on_hard_labels_is_focal_loss_without_alpha():
    logits, targets = logits_and_targets()
    labels = np.round(targets)
    expected = jax.jit(optax.sigmoid_focal_loss)(logits, labels)
    np.testing.assert_allclose(quality_focal_loss(logits, labels), expected, rtol=1e-4, atol=1e-9)


def test_focal_loss_weighs_positives_by_alpha_and_negatives_by_the_rest():
    logits, targets = logits_and_targets()
    labels = np.round(targets).astype(int)
    expected = jax.jit(partial(optax.sigmoid_focal_loss, alpha=0.4, gamma=1.5))(logits, labels)
    actual = sigmoid_focal_loss(logits, labels, 0.4, 1.5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-9)


def test_varifocal_loss_down_weights_negatives_only():
    logits = np.array([0, 0, math.log(3)])  # p = 1/2, 1/2, 3/4
    targets = np.array([0.5, 1, 0])
    expected = [0.5 * math.log(2), math.log(2), 0.75 * 0.75**2 * math.log(4)]
    np.testing.assert_allclose(varifocal_loss(logits, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_qfl_and_its_gradient_follow_the_formula(beta):
    logits, targets = logits_and_targets()
    x, y = np.float64(logits), np.float64(targets)

    def formula(x):
        sigma = 1 / (1 + np.exp(-x))
        cross_entropy = -((1 - y) * np.log(1 - sigma) + y * np.log(sigma))
        return np.abs(y - sigma) ** beta * cross_entropy

    value, gradient, _ = value_and_gradients(quality_focal_loss, beta=beta)(logits, targets)
    np.testing.assert_allclose(value, formula(x), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(gradient, slope(formula, x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("beta", [1.5, 2.0])
def test_qfl_gradient_vanishes_where_sigma_is_the_target(beta):
    targets = np.linspace(0.01, 0.99, 50)
    optimum = np.log(targets / (1 - targets))
    logits = optimum + np.array([[-0.2], [0], [0.2]])
    loss = value_and_gradients(quality_focal_loss, beta=beta)
    below, at, above = loss(logits, np.broadcast_to(targets, logits.shape))[1]
    np.testing.assert_allclose(at, 0, atol=1e-3)
    assert (np.asarray(below) < at).all()
    assert (np.asarray(above) > at).all()


@pytest.mark.parametrize("exponent", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("loss", SIGMOID_LOSSES)
def test_sigmoid_losses_are_finite_for_extreme_logits(loss, exponent):
    logits = np.array([-1e4, -110, -100, -95, -88, -50, 0, 17, 50, 100, 1e4])[:, None]
    targets = np.array([0, 1] if loss is sigmoid_focal_loss else [0, 0.3, 0.5, 1])
    name = "beta" if loss is quality_focal_loss else "gamma"
    run = value_and_gradients(loss, **{name: exponent})
    value, gradient, _ = run(*np.broadcast_arrays(logits, targets))
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("beta", BETAS)
def test_qfl_has_no_gradient_where_sigma_is_exactly_the_target(beta):
    loss = value_and_gradients(quality_focal_loss, beta=beta)
    value, gradient, _ = loss(np.zeros((64, 5)), np.full((64, 5), 0.5))
    np.testing.assert_allclose(value, math.log(2) if beta == 0 else 0, rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def test_confidently_wrong_logits_cost_their_size():
    logits, labels = np.array([100.0, -100]), np.array([0.0, 1])
    np.testing.assert_allclose(quality_focal_loss(logits, labels), 100)
    np.testing.assert_allclose(sigmoid_focal_loss(logits, labels), [75, 25])
    np.testing.assert_allclose(varifocal_loss(logits, labels), [75, 100])


@pytest.mark.parametrize("loss", [quality_focal_loss, varifocal_loss])
def test_soft_labels_are_constants(loss):
    _, _, gradient = value_and_gradients(loss)(*logits_and_targets())
    np.testing.assert_array_equal(gradient, 0)


# Distribution focal loss


@pytest.mark.parametrize("n", [7, 16])
def test_dfl_on_an_integer_target_is_cross_entropy(n):
    logits, _ = logits_and_targets(shape=(n + 1, n + 1))
    bins = np.arange(n + 1)
    cross_entropy = jax.jit(optax.softmax_cross_entropy_with_integer_labels)
    actual = distribution_focal_loss(logits, np.float32(bins))
    np.testing.assert_allclose(actual, cross_entropy(logits, bins), rtol=1e-5)


def test_dfl_interpolates_between_the_neighbouring_bins():
    logits = np.tile(logits_and_targets(shape=(17,))[0], (161, 1))
    targets = np.linspace(0, 16, 161)
    loss = np.asarray(distribution_focal_loss(logits, targets))
    np.testing.assert_allclose(loss, np.interp(targets, targets[::10], loss[::10]), rtol=1e-4)


@pytest.mark.parametrize("target", [0, 0.25, 3.5, 7.9, 8])
def test_dfl_is_least_at_the_two_bins_around_the_target(target):
    bins = np.arange(9)
    two_hot = np.interp(bins, [target - 1, target, target + 1], [0, 1, 0])
    logits, _ = logits_and_targets(shape=(100, 9))
    logits[0] = np.log(two_hot + 1e-12)
    value, gradient, _ = value_and_gradients(distribution_focal_loss)(logits, np.full(100, target))
    np.testing.assert_allclose(two_hot @ bins, target)
    np.testing.assert_allclose(gradient[0], 0, atol=1e-6)
    assert (value[0] < np.asarray(value[1:])).all()


def test_dfl_gradient_is_softmax_minus_the_two_weights():
    logits, _ = logits_and_targets(shape=(5,))
    softmax = np.exp(logits) / np.exp(logits).sum()
    _, gradient, _ = value_and_gradients(distribution_focal_loss)(logits, 2.25)
    np.testing.assert_allclose(gradient, softmax - [0, 0, 0.75, 0.25, 0], atol=1e-6)


def test_dfl_takes_targets_outside_the_bins_to_the_nearer_end():
    logits = np.tile(logits_and_targets(shape=(17,))[0], (6, 1))
    loss = distribution_focal_loss(logits, np.array([-3, -0.1, 0, 16, 16.5, math.inf]))
    np.testing.assert_array_equal(loss[:3], loss[2])
    np.testing.assert_array_equal(loss[3:], loss[3])


def test_dfl_is_finite_for_extreme_logits():
    signs = np.array([[1, -1, 1, -1, -1], [-1, -1, -1, -1, 1]])
    logits, targets = np.repeat(100.0 * signs, 4, axis=0), np.tile([0, 0.5, 3.2, 4], 2)
    value, gradient, _ = value_and_gradients(distribution_focal_loss)(logits, targets)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(value[4], 200, rtol=1e-6)


def test_dfl_target_is_a_constant():
    logits, _ = logits_and_targets(shape=(100, 9))
    targets = np.linspace(0, 8, 100)
    _, _, gradient = value_and_gradients(distribution_focal_loss)(logits, targets)
    np.testing.assert_array_equal(gradient, 0)


# Losses on boxes


@given(a=box, b=box)
@few_examples
def test_iou_counts_common_pixels(a, b):
    grid = np.arange(60)

    def mask(box):
        x1, y1, x2, y2 = box
        return np.outer((grid >= y1) & (grid < y2), (grid >= x1) & (grid < x2))

    expected = (mask(a) & mask(b)).sum() / (mask(a) | mask(b)).sum()
    pairs = jax.jit(pairwise_iou)(np.stack([a, b, a]), b[None])
    np.testing.assert_allclose(jax.jit(aligned_iou)(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(pairs, [[expected], [1], [expected]], rtol=1e-6)


@pytest.mark.parametrize("loss", IOU_LOSSES)
@given(a=box, b=box)
@few_examples
def test_box_losses_are_zero_only_for_identical_boxes(loss, a, b):
    np.testing.assert_allclose(loss(a, a), 0, atol=1e-6)
    assert (a == b).all() or loss(a, b) > 1e-3


@pytest.mark.parametrize("loss", IOU_LOSSES)
@given(a=box, b=box, shift=st.integers(-50, 50), scale=st.sampled_from([0.5, 2, 16]))
@few_examples
def test_box_losses_are_symmetric_and_ignore_position_and_scale(loss, a, b, shift, scale):
    expected = loss(a, b)
    np.testing.assert_allclose(loss(b, a), expected, atol=1e-6)
    np.testing.assert_allclose(loss(a + shift, b + shift), expected, atol=1e-6)
    np.testing.assert_allclose(loss(a * scale, b * scale), expected, atol=1e-6)


@pytest.mark.parametrize("loss", [giou_loss, diou_loss])
@given(a=box, b=box)
@few_examples
def test_giou_and_diou_losses_lie_between_0_and_2(loss, a, b):
    assert -1e-6 <= loss(a, b) <= 2


def test_box_losses_of_disjoint_boxes():
    a, b = np.array([0, 0, 2, 2.0]), np.array([4, 0, 6, 2.0])
    np.testing.assert_allclose(iou_loss(a, b), math.log(1e6), rtol=1e-6)
    np.testing.assert_allclose(giou_loss(a, b), 1 + (12 - 8) / 12, rtol=1e-6)
    np.testing.assert_allclose(diou_loss(a, b), 1 + 4**2 / (6**2 + 2**2), rtol=1e-6)
    np.testing.assert_allclose(ciou_loss(a, b), 1 + 4**2 / (6**2 + 2**2), rtol=1e-6)


def test_box_losses_of_overlapping_boxes():
    a, b = np.array([0, 0, 4, 4.0]), np.array([0, 0, 4, 3.0])
    v = 4 / math.pi**2 * (math.atan(4 / 3) - math.atan(1)) ** 2
    np.testing.assert_allclose(iou_loss(a, b), math.log(4 / 3), rtol=1e-6)
    np.testing.assert_allclose(giou_loss(a, b), 1 / 4, rtol=1e-6)
    np.testing.assert_allclose(diou_loss(a, b), 1 / 4 + 0.5**2 / 32, rtol=1e-6)
    np.testing.assert_allclose(ciou_loss(a, b), 1 / 4 + 0.5**2 / 32 + v**2 / (1 / 4 + v), rtol=1e-6)


def test_ciou_ignores_the_aspect_ratio_of_boxes_that_overlap_little():
    a, b = np.array([0, 0, 4, 2.0]), np.array([0, 0, 4, 8.0])
    np.testing.assert_allclose(ciou_loss(a, b), diou_loss(a, b), rtol=1e-6)


def test_no_gradient_flows_through_the_weight_of_the_aspect_ratio():
    a, b = np.array([0, 0, 4, 4.0]), np.array([0, 0, 4, 3.0])

    def v(width):
        return 4 / math.pi**2 * (math.atan(4 / 3) - math.atan(width / 4)) ** 2

    expected = v(4) / (1 / 4 + v(4)) * slope(v, 4)
    shape_term = value_and_gradients(ciou_loss)(a, b)[1] - value_and_gradients(diou_loss)(a, b)[1]
    np.testing.assert_allclose(shape_term[2], expected, rtol=1e-3)


DEGENERATE_PAIRS = {
    "identical": ([2, 3, 8, 9], [2, 3, 8, 9]),
    "a point inside": ([5, 5, 5, 5], [0, 0, 10, 10]),
    "a line inside": ([5, 2, 5, 8], [0, 0, 10, 10]),
    "flat": ([2, 5, 8, 5], [0, 0, 10, 10]),
    "empty target": ([0, 0, 10, 10], [5, 5, 5, 5]),
    "the same point": ([5, 5, 5, 5], [5, 5, 5, 5]),
    "two points": ([1, 1, 1, 1], [5, 5, 5, 5]),
    "inverted": ([8, 9, 2, 3], [2, 3, 8, 9]),
    "inverted elsewhere": ([90, 90, 80, 80], [2, 3, 8, 9]),
    "both inverted": ([8, 9, 2, 3], [8, 9, 2, 3]),
    "touching": ([10, 0, 20, 10], [0, 0, 10, 10]),
    "far apart": ([1e6, 1e6, 1e6 + 10, 1e6 + 10], [-1e6, -1e6, 10 - 1e6, 10 - 1e6]),
    "tiny in huge": ([0, 0, 1e-4, 1e-4], [-1e6, -1e6, 1e6, 1e6]),
}


@pytest.mark.parametrize("loss", IOU_LOSSES)
def test_box_losses_are_finite_for_degenerate_boxes(loss):
    pred, target = np.moveaxis(np.array(list(DEGENERATE_PAIRS.values()), np.float32), 1, 0)
    for array in value_and_gradients(loss)(pred, target):
        for name, row in zip(DEGENERATE_PAIRS, array, strict=True):
            assert np.isfinite(row).all(), name


def test_a_line_grows_within_its_target():
    line, target = np.array([5, 2, 5, 8.0]), np.array([0, 0, 10, 10.0])
    _, gradient, _ = value_and_gradients(giou_loss)(line, target)  # IoU = 6 width / 100
    np.testing.assert_allclose(gradient, [0.06, 0, -0.06, 0], atol=1e-6)


@pytest.mark.parametrize("loss", IOU_LOSSES)
def test_box_losses_broadcast(loss):
    assert jax.eval_shape(loss, jnp.zeros((3, 1, 4)), jnp.zeros((2, 4))).shape == (3, 2)


def test_l1_is_the_distance_and_flat_at_0():
    value, gradient, _ = value_and_gradients(l1_loss)(np.array([1.0, -2, 3]), np.ones(3))
    np.testing.assert_array_equal(value, [0, 3, 2])
    np.testing.assert_array_equal(gradient, [0, -1, 1])


@pytest.mark.parametrize("beta", [0.11, 1.0])
def test_smooth_l1_is_huber_loss_over_beta(beta):
    pred, target = np.linspace(-3, 3, 101), np.zeros(101)
    huber = jax.jit(partial(optax.huber_loss, delta=beta))
    value, gradient, _ = value_and_gradients(smooth_l1_loss, beta=beta)(pred, target)
    np.testing.assert_allclose(value, huber(pred) / beta, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, np.clip(pred / beta, -1, 1), rtol=1e-5, atol=1e-6)


# All of them


def examples():
    """Every loss with a prediction and a target."""
    logits, targets = logits_and_targets()
    boxes = np.array([0, 0, 10, 12]) + logits[:, :4]
    for loss in SIGMOID_LOSSES:
        yield loss, logits, targets
    yield distribution_focal_loss, logits, 4 * targets[:, 0]
    for loss in [*IOU_LOSSES, l1_loss, partial(smooth_l1_loss, beta=0.11)]:
        yield loss, boxes, boxes[::-1]


def test_bfloat16_comes_in_and_float32_comes_out():
    for loss, pred, target in examples():
        pred, target = pred.astype(jnp.bfloat16), target.astype(jnp.bfloat16)
        actual = loss(pred, target)
        assert actual.dtype == np.float32
        expected = loss(np.float32(pred), np.float32(target))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
