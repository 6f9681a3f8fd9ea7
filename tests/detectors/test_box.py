"""Box representations against their formulas in pixels, and the losses that pull boxes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfl_jax.detectors.box import (
    CustomBoxLoss,
    Deltas,
    Distances,
    Gaussian,
    GeneralDistribution,
    LogDistances,
    Overlap,
    Regression,
    SmoothL1,
)
from gfl_jax.detectors.matching import frame_of
from gfl_jax.priors import Points, RetinaAnchors, SquareAnchors

LEVELS = ((3, 4), (2, 2), (1, 1))
STRIDES = (8, 16, 32)
POINTS = Points(strides=STRIDES)(LEVELS)
ANCHORS = RetinaAnchors(4.0, 1, (0.5,), strides=STRIDES)(LEVELS)  # twice as wide as high
REPRESENTATIONS = {
    "relu-strides": Distances("relu", "strides"),
    "relu-pixels": Distances("relu", "pixels"),
    "exp-strides": Distances("exp", "strides"),
    "exp-pixels": Distances("exp", "pixels"),
    "log": LogDistances(),
    "log-base-1": LogDistances(base=1.0, limit=100.0),
    "deltas": Deltas(),
    "deltas-1": Deltas((1.0, 1.0, 1.0, 1.0)),
    "gaussian": Gaussian(),
    "general": GeneralDistribution(),
    "general-wide": GeneralDistribution(n=6, delta=2.5),
}


def raw_of(box, parameters):
    """A regression output whose parameters these are."""
    if isinstance(box, Distances) and box.activation == "exp":
        return np.log(parameters)
    if isinstance(box, Gaussian):
        return np.concatenate([parameters, np.ones_like(parameters)], -1)
    if isinstance(box, GeneralDistribution):
        bins = parameters[..., None] / box.delta
        parts = np.maximum(1 - np.abs(np.arange(box.n + 1) - bins), 0)
        return np.log(parts + 1e-30).reshape(*parameters.shape[:-1], -1)
    return parameters


def priors_of(box):
    return ANCHORS if isinstance(box, Deltas) else POINTS


def random_distances(priors, seed=0):
    """Of the sides of boxes around each prior, in pixels: 0.2 to 14 strides."""
    rng = np.random.default_rng(seed)
    shape = len(priors.boxes), 4
    return (np.exp(rng.uniform(np.log(0.2), np.log(14), shape)) * priors.strides[:, None]).astype(
        np.float32
    )


def around(priors, distances):
    """Boxes in pixels."""
    return np.concatenate(
        [priors.centers - distances[:, :2], priors.centers + distances[:, 2:]], -1
    )


# Representations.


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_a_box_comes_back_from_its_parameters(name):
    box = REPRESENTATIONS[name]
    priors = priors_of(box)
    boxes = around(priors, random_distances(priors)) / priors.strides[:, None]
    frame = frame_of(priors)
    raw = raw_of(box, np.asarray(box.encode(boxes, frame)))
    assert raw.shape[-1] == box.channels
    np.testing.assert_allclose(box.decode(raw, frame), boxes, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(box.parameters(raw), box.encode(boxes, frame), rtol=1e-4, atol=1e-4)


def in_pixels(name, raw, priors):
    """Boxes by the formulas as published, all in pixels."""
    centers, boxes = np.float64(priors.centers), np.float64(priors.boxes)
    stride, raw = np.float64(priors.strides)[:, None], np.float64(raw)
    if name in ("deltas", "deltas-1"):
        stds = [1.0, 1.0, 1.0, 1.0] if name == "deltas-1" else [0.1, 0.1, 0.2, 0.2]
        (dx, dy), (dw, dh) = (raw * stds).T[:2], (raw * stds).T[2:]
        x1, y1, x2, y2 = boxes.T
        x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
        w, h = (x2 - x1) * np.exp(dw), (y2 - y1) * np.exp(dh)
        return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    if name.startswith("general"):
        n, delta = {"general": (16, 1.0), "general-wide": (6, 2.5)}[name]
        weights = np.exp(raw.reshape(-1, 4, n + 1))
        mean = (weights * np.arange(n + 1)).sum(-1) / weights.sum(-1)
        distances = mean * delta * stride
    else:
        distances = {
            "relu-strides": np.maximum(raw, 0) * stride,
            "relu-pixels": np.maximum(raw, 0),
            "exp-strides": np.exp(raw) * stride,
            "exp-pixels": np.exp(raw),
            "log": 2 * stride * np.exp(raw),
            "log-base-1": stride * np.exp(raw),
            "gaussian": raw[:, :4] * stride,
        }[name]
    return np.concatenate([centers - distances[:, :2], centers + distances[:, 2:]], -1)


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_boxes_are_those_of_the_formulas_in_pixels(name):
    box = REPRESENTATIONS[name]
    priors, rng = priors_of(box), np.random.default_rng(1)
    raw = rng.normal(0, 1, (len(priors.boxes), box.channels)).astype(np.float32)
    found = box.decode(raw, frame_of(priors)) * priors.strides[:, None]
    np.testing.assert_allclose(found, in_pixels(name, raw, priors), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", REPRESENTATIONS)
def test_all_levels_look_alike(name):
    """An object 4 times as large at a level 4 times as coarse has the same parameters."""
    box = REPRESENTATIONS[name]
    generator = SquareAnchors(center_offset=0.5, strides=(8, 32))
    frame = frame_of(generator(((2, 3), (2, 3))))
    rng = np.random.default_rng(2)
    raw = np.tile(rng.normal(0, 1.5, (6, box.channels)), (2, 1)).astype(np.float32)
    fine, coarse = np.split(np.asarray(box.decode(raw, frame)), 2)
    sizes = [part[:, 2:] - part[:, :2] for part in (fine, coarse)]
    if name.endswith("pixels"):
        np.testing.assert_allclose(sizes[1] * 32, sizes[0] * 8, rtol=1e-4)
    else:
        np.testing.assert_allclose(coarse, fine, rtol=1e-5)
    boxes = np.tile(fine + np.array([-1, -1, 1, 1]), (2, 1))
    fine, coarse = np.split(np.asarray(box.encode(boxes, frame)), 2)
    np.testing.assert_allclose(coarse, 4 * fine if name.endswith("pixels") else fine, rtol=1e-4)


def test_an_anchor_moves_by_its_size_and_grows_exponentially():
    """A 40 x 20 anchor around (40, 30), at stride 8 or 16."""
    for stride in (8.0, 16.0):
        frame = frame_of(ANCHORS)._replace(
            centers=np.array([40, 30]) / stride,
            boxes=np.array([20, 20, 60, 40]) / stride,
            strides=np.array(stride),
        )
        box = np.array([30, 25, 110, 35]) / stride  # 80 x 10 around (70, 30)
        expected = [0.75, 0.0, math.log(2), -math.log(2)]
        np.testing.assert_allclose(Deltas((1, 1, 1, 1)).encode(box, frame), expected, atol=1e-6)
        found = Deltas().encode(box, frame)
        np.testing.assert_allclose(found, np.array(expected) / [0.1, 0.1, 0.2, 0.2], atol=1e-5)


def test_an_anchor_grows_no_further_than_a_factor():
    box, frame = Deltas((1.0, 1.0, 1.0, 1.0)), frame_of(ANCHORS)
    size = ANCHORS.boxes[:, 2:] - ANCHORS.boxes[:, :2]
    for growth in (5.0, 100.0, 1e30):
        raw = np.tile(np.float32([0.0, 0.0, growth, -growth]), (len(size), 1))
        x1, y1, x2, y2 = (np.asarray(box.decode(raw, frame)) * ANCHORS.strides[:, None]).T
        np.testing.assert_allclose((x2 - x1) / size[:, 0], 62.5, rtol=1e-3)
        np.testing.assert_allclose((y2 - y1) / size[:, 1], 0.016, rtol=2e-2)
    inside = np.tile(np.float32([0.0, 0.0, 4.1, -4.1]), (len(size), 1))
    x1, _, x2, _ = (np.asarray(box.decode(inside, frame)) * ANCHORS.strides[:, None]).T
    np.testing.assert_allclose((x2 - x1) / size[:, 0], math.exp(4.1), rtol=1e-3)


def test_log_distances_lie_within_their_limit():
    """Sides a hundredth and a hundred strides away, and on the wrong side."""
    frame = frame_of(POINTS)
    ones = np.ones((len(POINTS.boxes), 1), np.float32)
    boxes = np.concatenate([frame.centers - 0.01, frame.centers + np.array([100, -3])], -1)
    found = LogDistances().encode(boxes, frame)
    near, far = -math.log(16), math.log(16)
    np.testing.assert_allclose(found, ones * [near, near, far, near], rtol=1e-5)
    wider = LogDistances(base=1.0, limit=1000.0).encode(boxes, frame)
    expected = [math.log(0.01), math.log(0.01), math.log(100), -math.log(1000)]
    np.testing.assert_allclose(wider, ones * expected, rtol=1e-3)


@pytest.mark.parametrize("box", [Distances("exp"), Distances("exp", "pixels"), LogDistances()])
def test_exponentials_do_not_overflow(box):
    """Even areas of the boxes are finite."""
    raw = np.full((len(POINTS.boxes), 4), 1e4, np.float32)
    boxes, slope = jax.jvp(lambda raw: box.decode(raw, frame_of(POINTS)), (raw,), (raw,))
    assert np.isfinite((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).all()
    assert np.isfinite(slope).all()
    usual = np.full((len(POINTS.boxes), 4), 30.0, np.float32)
    assert np.asarray(box.parameters(usual)).max() >= 30
    assert (np.asarray(box.decode(usual, frame_of(POINTS)))[:, 2] > 1e10).all()


# Distributions.


def test_gaussian_likelihood_is_best_at_the_target_and_its_distance():
    """Gradients against (x - y) / sigma^2 and (1 - (x - y)^2 / sigma^2) / 2, a mean of four."""
    box, frame, rng = Gaussian(), frame_of(POINTS), np.random.default_rng(3)
    boxes = around(POINTS, random_distances(POINTS)) / POINTS.strides[:, None]
    target = np.asarray(box.encode(boxes, frame))
    difference = rng.choice([-1, 1], target.shape) * rng.uniform(0.2, 2.0, target.shape)
    log_variance = rng.uniform(-2, 2, target.shape)

    @jax.grad
    def slope(raw):
        return box.extra_losses(raw, boxes, frame)["loss_nll"].sum()

    raw = np.concatenate([target + difference, log_variance], -1).astype(np.float32)
    loss = box.extra_losses(raw, boxes, frame)
    variance = np.exp(log_variance)
    expected = 0.5 * difference**2 / variance + 0.5 * log_variance
    assert loss.keys() == {"loss_nll"}
    np.testing.assert_allclose(loss["loss_nll"], expected.mean(-1), rtol=1e-4, atol=1e-5)
    expected = np.concatenate([difference / variance, 0.5 * (1 - difference**2 / variance)], -1)
    np.testing.assert_allclose(slope(raw), expected / 4, rtol=1e-3, atol=1e-4)

    at_target = np.concatenate([target, log_variance], -1).astype(np.float32)
    np.testing.assert_allclose(slope(at_target)[:, :4], 0, atol=1e-5)
    at_distance = np.concatenate([target + difference, np.log(difference**2)], -1)
    np.testing.assert_allclose(slope(at_distance.astype(np.float32))[:, 4:], 0, atol=1e-3)


def test_gaussian_variances_stay_within_their_limit():
    box = Gaussian(limit=2.0)
    raw = np.concatenate([np.zeros((4, 4)), np.diag([-1e4, -1.0, 1.0, 1e4])], -1)
    spread = np.diag(np.asarray(box.spread(raw.astype(np.float32))))
    np.testing.assert_allclose(spread, np.exp([-1.0, -0.5, 0.5, 1.0]), rtol=1e-5)


@pytest.mark.parametrize("name", ["general", "general-wide"])
def test_spread_of_a_distribution_is_its_standard_deviation(name):
    box, rng = REPRESENTATIONS[name], np.random.default_rng(4)
    raw = rng.normal(0, 2, (20, box.channels)).astype(np.float32)
    found = np.asarray(box.spread(raw))
    y = box.delta * np.arange(box.n + 1)
    for row, logits in zip(found, np.float64(raw).reshape(20, 4, -1), strict=True):
        for side, p in zip(row, np.exp(logits), strict=True):
            p = p / p.sum()
            expected = math.sqrt(sum(p * y**2) - sum(p * y) ** 2)
            np.testing.assert_allclose(side, expected, rtol=1e-4)


def test_spread_of_known_distributions():
    box = GeneralDistribution(n=4, delta=0.5)
    one, two = (np.full((4, 5), -100.0, np.float32) for _ in range(2))
    one[:, 3], two[:, 0], two[:, 4] = 0, 0, 0
    flat = np.zeros((4, 5), np.float32)
    found = box.spread(np.stack([one, two, flat]).reshape(3, 20))
    expected = [0, 1, 0.5 * math.sqrt((5**2 - 1) / 12)]
    np.testing.assert_allclose(found, np.tile(expected, (4, 1)).T, rtol=1e-5, atol=1e-6)


def test_dfl_has_its_minimum_at_the_two_bins_around_the_target():
    box, frame = REPRESENTATIONS["general-wide"], frame_of(POINTS)
    boxes = around(POINTS, random_distances(POINTS)) / POINTS.strides[:, None]
    best = raw_of(box, np.asarray(box.encode(boxes, frame))).astype(np.float32)
    slope = jax.grad(lambda raw: box.extra_losses(raw, boxes, frame)["loss_dfl"].sum())
    np.testing.assert_allclose(slope(best), 0, atol=1e-5)
    assert np.abs(slope(np.zeros_like(best))).max() > 0.05


@pytest.mark.parametrize("box", [Distances(), LogDistances(), Deltas()])
def test_dirac_deltas_have_no_other_loss(box):
    raw = np.ones((len(ANCHORS.boxes), 4), np.float32)
    assert box.extra_losses(raw, raw, frame_of(ANCHORS)) == {}


# Losses.

A, B = np.float32([[0, 0, 4, 4]]), np.float32([[0, 0, 4, 3]])
FAR = np.float32([[10, 0, 14, 4]])
SHAPE = 4 / math.pi**2 * (math.atan(4 / 3) - math.atan(1)) ** 2


def regression(boxes, parameters=None):
    return Regression(boxes, jnp.asarray(boxes if parameters is None else parameters))


@pytest.mark.parametrize(
    ("loss", "beside", "apart"),
    [
        ("iou", -math.log(0.75), -math.log(1e-6)),
        ("giou", 0.25, 1 + 24 / 56),
        ("diou", 0.25 + 0.25 / 32, 1 + 100 / 212),
        ("ciou", 0.25 + 0.25 / 32 + SHAPE**2 / (0.25 + SHAPE), 1 + 100 / 212),
    ],
)
def test_an_overlap_is_the_loss_of_its_name(loss, beside, apart):
    """4 x 4 and 4 x 3 that share 12 of 16, and two boxes in an enclosing one of 14 x 4."""
    function = Overlap(loss)
    np.testing.assert_allclose(function(regression(A), regression(B)), [beside], rtol=1e-5)
    np.testing.assert_allclose(function(regression(A), regression(FAR)), [apart], rtol=1e-5)
    np.testing.assert_allclose(function(regression(A), regression(A)), [0], atol=1e-6)


def test_smooth_l1_is_of_the_parameters_summed():
    found = regression(A, [[0.0, 0.05, -0.3, 2.0], [1.0, 1.0, 1.0, 1.0]])
    wanted = regression(FAR, [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_allclose(SmoothL1()(found, wanted), [2.35, 1.0], rtol=1e-5)
    expected = 0.05**2 / 0.22 + (0.3 - 0.055) + (2 - 0.055)
    np.testing.assert_allclose(SmoothL1(0.11)(found, wanted), [expected, 0.945], rtol=1e-5)
    expected = (0.05**2 + 0.3**2) / 2 + 1.5
    np.testing.assert_allclose(SmoothL1(1.0)(found, wanted), [expected, 0.5], rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.11])
def test_smooth_l1_trains_the_prediction_alone(beta):
    def loss(found, wanted):
        return SmoothL1(beta)(regression(A, found), regression(A, wanted)).sum()

    found, wanted = np.float32([[1, 2, 3, 3]]), np.float32([[1, 1, 4, 2.95]])
    to_found, to_wanted = jax.grad(loss, (0, 1))(found, wanted)
    expected = [0, 1, -1, 1 if beta == 0 else 0.05 / 0.11]
    np.testing.assert_allclose(to_found, [expected], rtol=1e-4)
    assert not to_wanted.any()


CUSTOM = """
from gfl_jax.boxes import aligned_iou

def cubed(predicted, target):
    return 1 - aligned_iou(predicted, target) ** 3

def total(predicted, target):
    return cubed(predicted, target).sum()

def by_side(predicted, target):
    return abs(predicted - target)

def whole(predicted, target):
    return (predicted != target).any(-1).astype(int)
"""


@pytest.fixture
def custom_file(tmp_path):
    file = tmp_path / "custom.py"
    file.write_text(CUSTOM)
    return file


def test_a_custom_box_loss_is_called_with_boxes(custom_file):
    found = CustomBoxLoss(f"{custom_file}:cubed")(regression(A, FAR), regression(B, FAR))
    np.testing.assert_allclose(found, [1 - 0.75**3], rtol=1e-5)
    found = CustomBoxLoss(f"{custom_file}:whole")(regression(A), regression(B))
    assert found.dtype == jnp.float32
    assert found.tolist() == [1.0]


@pytest.mark.parametrize("function", ["total", "by_side"])
def test_a_custom_box_loss_of_a_wrong_shape_is_named(custom_file, function):
    loss = CustomBoxLoss(f"{custom_file}:{function}")
    with pytest.raises(ValueError, match=rf"custom.py:{function} returned shape .*return \(1,\)"):
        loss(regression(A), regression(B))


def test_a_custom_box_loss_is_looked_up_when_it_is_resolved(custom_file):
    with pytest.raises(ValueError, match=r"detector\.box_loss\.function .* has no function other"):
        CustomBoxLoss(f"{custom_file}:other").resolve()
    with pytest.raises(ValueError, match=r"detector\.box_loss\.function is ''"):
        CustomBoxLoss().resolve()
