"""How quality enters targets, weights and scores; the objective against one in float64."""

import dataclasses
import functools
import math
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest

from gfl_jax import systems
from gfl_jax.assign import FoveaBox
from gfl_jax.detectors.box import Deltas, LogDistances, SmoothL1
from gfl_jax.detectors.classification import QualityFocal
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.detectors.quality import (
    GuidedQuality,
    JointQuality,
    NoQuality,
    QualityBranch,
    centerness,
)
from gfl_jax.models.heads import Outputs
from gfl_jax.priors import RetinaAnchors, SquareAnchors

LEVELS = ((6, 8), (3, 4))  # of a 48 x 64 canvas
STRIDES = (8, 16)
CLASSES = 3
# Programs compiled for one run: quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0}


# Centerness.


def test_centerness_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    points = rng.uniform(4, 14, (200, 2)).astype(np.float32)
    boxes = np.concatenate([rng.uniform(0, 8, (200, 2)), rng.uniform(9, 20, (200, 2))], 1)
    boxes = boxes.astype(np.float32)
    found = np.asarray(centerness(points, boxes))
    expected = []
    for (x, y), (x1, y1, x2, y2) in zip(np.float64(points), np.float64(boxes), strict=True):
        left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
        inside = min(left, top, right, bottom) > 0
        horizontal = min(left, right) / max(left, right)
        vertical = min(top, bottom) / max(top, bottom)
        expected.append(math.sqrt(horizontal * vertical) if inside else 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert 0.2 < (found > 0).mean() < 0.8
    assert found.min() >= 0
    assert found.max() <= 1


def test_centerness_of_known_places():
    points = np.float32([[2, 3], [1, 3], [1, 1.5], [0, 3], [2, 6], [-1, 3], [9, 9], [-1, -1]])
    found = centerness(points, np.tile(np.float32([0, 0, 4, 6]), (len(points), 1)))
    expected = [1, math.sqrt(1 / 3), 1 / 3, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_centerness_is_finite_without_size_and_a_constant():
    boxes = np.float32([[1, 1, 1, 1], [2, 2, 0, 0], [1, 0, 1, 2], [0, 0, 2, 2]])
    points = np.ones((4, 2), np.float32)
    assert np.isfinite(centerness(points, boxes)).all()
    slopes = jax.grad(lambda *a: centerness(*a).sum(), (0, 1))(points + 0.3, boxes)
    assert not any(slope.any() for slope in slopes)


# The objective in float64.


def small(detector):
    """The same on two levels."""
    changes = {"priors": dataclasses.replace(detector.priors, strides=STRIDES)}
    if hasattr(detector.assigner, "ranges"):
        ranges = tuple((low / 4, high / 4) for low, high in detector.assigner.ranges[:2])
        changes["assigner"] = dataclasses.replace(detector.assigner, ranges=ranges)
    return dataclasses.replace(detector, **changes)


RETINA = dataclasses.replace(
    systems.retinanet.detector, priors=RetinaAnchors(3.0, 1, (0.5, 1.0), strides=STRIDES)
)
BASES = {
    "atss": dataclasses.replace(systems.atss.detector, priors=SquareAnchors(3.0, strides=STRIDES)),
    "fcos": small(systems.fcos.detector),
    "retinanet": RETINA,
    "foveabox": small(dataclasses.replace(systems.foveabox.detector, assigner=FoveaBox(sigma=0.9))),
}
WEIGHTINGS = ("none", "iou", "centerness", "predicted")
MEASURES = ("iou", "centerness")
QUALITIES = {
    **{f"none-{w}": NoQuality(w) for w in WEIGHTINGS},
    **{f"branch-{m}": QualityBranch(m) for m in MEASURES},
    **{f"guided-{m}-{w}": GuidedQuality(m, 1.5, w) for m in MEASURES for w in WEIGHTINGS},
    **{f"joint-{w}": JointQuality(w) for w in WEIGHTINGS},
}


def with_quality(detector, name):
    quality = QUALITIES[name]
    joint = {"classification": QualityFocal()} if isinstance(quality, JointQuality) else {}
    return dataclasses.replace(detector, quality=quality, **joint)


class Case(NamedTuple):
    """A batch, outputs with a quality branch, and what is trained on with which object."""

    batch: tuple
    outputs: Outputs
    trained: np.ndarray
    matched: np.ndarray


def overlaps(a, b):
    """IoU and GIoU loss."""
    size_a, size_b = (np.maximum(c[:, 2:] - c[:, :2], 0).prod(1) for c in (a, b))
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    inter = np.maximum(high - low, 0).prod(1)
    union = np.maximum(size_a + size_b - inter, 1e-6)
    low, high = np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:])
    outer = np.maximum((high - low).prod(1), 1e-6)
    return inter / union, 1 - inter / union + (outer - union) / outer


def boxes_and_targets(box, raw, priors, target):
    """Predicted boxes in pixels, their parameters and those of the targets, of positives."""
    centers, anchors, stride = priors
    if isinstance(box, Deltas):
        size, middle = anchors[:, 2:] - anchors[:, :2], (anchors[:, 2:] + anchors[:, :2]) / 2
        deltas = raw * box.stds
        center, half = middle + deltas[:, :2] * size, np.exp(deltas[:, 2:]) * size / 2
        target_size, target_middle = (
            target[:, 2:] - target[:, :2],
            (target[:, 2:] + target[:, :2]) / 2,
        )
        wanted = [(target_middle - middle) / size, np.log(target_size / size)]
        return np.concatenate([center - half, center + half], 1), np.concatenate(
            wanted, 1
        ) / box.stds
    sides = np.concatenate([centers - target[:, :2], target[:, 2:] - centers], 1)
    if isinstance(box, LogDistances):
        distances = 2 * stride * np.exp(raw)
        wanted = np.log(np.clip(sides / (2 * stride), 1 / 16, 16))
    elif box.activation == "exp":
        distances, wanted = np.exp(raw), None
    else:
        distances, wanted = np.maximum(raw, 0) * stride, None
    found = np.concatenate([centers - distances[:, :2], centers + distances[:, 2:]], 1)
    return found, wanted


def objective(detector, cls, raw, branch, case, frozen=None):
    """The terms, and what they take as constants: quality, weight and factor of each positive.

    cls: [b, priors, classes] and so on.  frozen: those constants if they are not of these outputs.
    """
    batch, trained, matched = case.batch, case.trained, case.matched
    priors = detector.priors(LEVELS)
    image, prior = np.nonzero(matched >= 0)
    of_prior = priors.centers[prior], priors.boxes[prior], priors.strides[prior, None]
    of_prior = [np.float64(x) for x in of_prior]
    target = np.float64(batch.boxes[image, matched[image, prior]])
    label = batch.labels[image, matched[image, prior]]
    found, wanted = boxes_and_targets(detector.box, raw[image, prior], of_prior, target)
    iou, giou = overlaps(found, target)
    (x, y), (x1, y1, x2, y2) = of_prior[0].T, target.T
    sides = np.maximum([x - x1, x2 - x, y - y1, y2 - y], 0)
    (left, right), (top, bottom) = sides[:2], sides[2:]
    measures = {
        "iou": iou,
        "centerness": np.sqrt(
            np.minimum(left, right)
            / np.maximum(left, right)
            * np.minimum(top, bottom)
            / np.maximum(top, bottom)
        ),
        "predicted": 1 / (1 + np.exp(-cls[image, prior].max(1))),
        "none": np.ones(len(image)),
    }
    quality = detector.quality
    measure = "iou" if isinstance(quality, JointQuality) else getattr(quality, "measure", "none")

    per_image = np.bincount(image, minlength=len(matched))
    n_box = {
        "image": np.maximum(per_image, 1).sum(),
        "batch": max(per_image.sum(), 1),
        "extra": max(per_image.sum(), 1),
    }[detector.counting]
    n_pos = per_image.sum() + len(matched) if detector.counting == "extra" else n_box

    sigma = 1 / (1 + np.exp(-cls))
    positive_loss, negative_loss = -np.log(sigma), -np.log(1 - sigma)
    rule = detector.classification
    if isinstance(quality, JointQuality):
        q = measures["iou"] if frozen is None else frozen[0]
        own_sigma = sigma[image, prior, label]
        loss = sigma**2 * negative_loss
        own = np.abs(q - own_sigma) ** 2 * (
            q * positive_loss[image, prior, label] + (1 - q) * negative_loss[image, prior, label]
        )
    else:
        loss = (1 - rule.alpha) * sigma**rule.gamma * negative_loss
        hard = rule.alpha * (1 - sigma) ** rule.gamma * positive_loss
        own = hard[image, prior, label]
    factor = np.ones(len(image))
    if isinstance(quality, GuidedQuality):
        power = measures[measure] ** quality.eta
        factor = power * own.sum() / (power * own).sum()
    constants = measures[measure], measures[quality.weighting], factor
    target_quality, weight, factor = constants if frozen is None else frozen
    loss[image, prior, label] = factor * own
    terms = {"loss_cls": (loss * trained[..., None]).sum() / n_pos}

    divisor = n_box if quality.weighting == "none" else max(weight.sum(), detector.min_weight)
    if isinstance(detector.box_loss, SmoothL1):
        distance, beta = np.abs(raw[image, prior] - wanted), detector.box_loss.beta
        each = (
            distance
            if beta == 0
            else np.where(distance < beta, distance**2 / (2 * beta or 1), distance - beta / 2)
        )
        each = each.sum(1)
    else:
        each = giou if detector.box_loss.loss == "giou" else -np.log(np.maximum(iou, 1e-6))
    terms["loss_bbox"] = detector.box_weight * (weight * each).sum() / divisor
    if isinstance(quality, QualityBranch):
        z = branch[image, prior, 0]
        cross_entropy = np.log1p(np.exp(z)) - target_quality * z
        terms[f"loss_{measure}"] = cross_entropy.sum() / n_box
    return terms, constants


# Outputs, and what the detectors make of them.

SHIFTS = {  # mean and deviation of regressions whose boxes overlap objects
    "atss": (0.0, 1.0),
    "fcos": (2.3, 0.5),
    "retinanet": (0.0, 0.3),
    "foveabox": (-0.3, 0.4),
}


def by_level(flat, per_cell):
    """[b, priors, c] as the levels of a head's output."""
    sizes = [height * width * n for (height, width), n in zip(LEVELS, per_cell, strict=True)]
    levels = np.split(flat, np.cumsum(sizes)[:-1], axis=1)
    return [x.reshape(len(x), *level, -1) for x, level in zip(levels, LEVELS, strict=True)]


def flat(levels, channels):
    return np.concatenate([np.reshape(x, (len(x), -1, channels)) for x in levels], axis=1)


def outputs_of(detector, cls, raw, branch):
    per_cell = detector.priors.per_cell
    return Outputs(*(by_level(np.float32(x), per_cell) for x in (cls, raw, branch)))


def total(detector, outputs, batch):
    if not detector.quality.branch:
        outputs = outputs._replace(quality_logits=[])
    terms = detector.losses(outputs, batch).terms
    return sum(terms.values()), terms


class Found(NamedTuple):
    """Of a base: outputs in float64, and terms and gradients with every quality."""

    case: Case
    arrays: tuple
    terms: dict
    gradients: dict


@pytest.fixture(scope="module")
def found_of(make_batch):
    @functools.cache
    def compute(base):
        detector, (mean, deviation) = BASES[base], SHIFTS[base]
        batch = make_batch([3, 2, 0, 4], (48, 64), classes=CLASSES, seed=3)
        batch.sizes[1] = 32, 60
        rng, priors = np.random.default_rng(0), detector.priors(LEVELS)
        shape = 4, len(priors.boxes)
        cls, raw, branch = (
            np.float64(np.float32(rng.normal(*spread, (*shape, channels))))
            for channels, spread in ((CLASSES, (-1, 1.5)), (4, (mean, deviation)), (1, (0, 1.5)))
        )
        outputs = outputs_of(detector, cls, raw, branch)
        find = jax.jit(detector.match, compiler_options=QUICKLY)
        matches = jax.tree.map(np.asarray, find(outputs, batch))
        variants = {name: with_quality(detector, name) for name in QUALITIES}

        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def run(outputs, batch):
            gradient = jax.value_and_grad(total, argnums=1, has_aux=True)
            return {name: gradient(variant, outputs, batch) for name, variant in variants.items()}

        with mock.patch.object(Detector, "match", lambda *_: matches):  # traced once
            results = jax.tree.map(np.asarray, run(outputs, batch))
        case = Case(batch, outputs, matches.trained, matches.matched)
        terms = {name: result[0][1] for name, result in results.items()}
        gradients = {
            name: [flat(x, c) for x, c in zip(result[1], (CLASSES, 4, 1), strict=True)]
            for name, result in results.items()
        }
        return Found(case, (cls, raw, branch), terms, gradients)

    return compute


EVERY = [(base, name) for base in BASES for name in QUALITIES]


@pytest.mark.parametrize("base", BASES)
def test_the_case_exercises_the_objective(base, found_of):
    found = found_of(base)
    assert ((found.case.matched >= 0).sum(1) >= [2, 1, 0, 2]).all()
    _, (iou, _, _) = objective(with_quality(BASES[base], "branch-iou"), *found.arrays, found.case)
    assert (iou > 0.05).mean() > 0.8
    assert np.std(iou) > 0.05


@pytest.mark.parametrize(("base", "name"), EVERY)
def test_losses_are_those_of_the_objective_in_float64(base, name, found_of):
    found = found_of(base)
    expected, _ = objective(with_quality(BASES[base], name), *found.arrays, found.case)
    assert found.terms[name].keys() == expected.keys()
    for term, value in expected.items():
        np.testing.assert_allclose(found.terms[name][term], value, rtol=1e-4, err_msg=term)


def depends_on_outputs(quality):
    """Whether targets, weights or factors do."""
    if isinstance(quality, JointQuality | GuidedQuality):
        return True
    return quality.weighting in ("iou", "predicted")


@pytest.mark.parametrize(("base", "name"), EVERY)
def test_no_gradient_flows_through_targets_and_weights(base, name, found_of):
    """Central differences of the objective with frozen ones; with others they are far off."""
    detector, found = with_quality(BASES[base], name), found_of(base)
    _, constants = objective(detector, *found.arrays, found.case)

    def slope(direction, frozen):
        above, below = (
            sum(
                objective(
                    detector,
                    *(x + h * d for x, d in zip(found.arrays, direction, strict=True)),
                    found.case,
                    frozen,
                )[0].values()
            )
            for h in (1e-5, -1e-5)
        )
        return (above - below) / 2e-5

    rng, positive = np.random.default_rng(0), (found.case.matched >= 0)[..., None]
    noticed = [0.0]
    for part, gradient in enumerate(found.gradients[name]):
        for where in (positive, positive, ~positive):
            direction = [np.zeros_like(x) for x in found.arrays]
            direction[part] = rng.normal(size=gradient.shape) * where
            along = gradient * direction[part]
            expected, tolerance = slope(direction, constants), 1e-4 * np.abs(along).sum() + 1e-7
            assert abs(along.sum() - expected) < tolerance
            noticed.append(abs(slope(direction, None) - expected) / tolerance)
    assert (max(noticed) > 20) == depends_on_outputs(detector.quality)


# What each representation does.


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("base", BASES)
def test_guided_quality_leaves_the_sum_of_the_losses(base, measure, found_of):
    terms = found_of(base).terms
    for weighting in WEIGHTINGS:
        guided, plain = terms[f"guided-{measure}-{weighting}"], terms[f"none-{weighting}"]
        np.testing.assert_allclose(guided["loss_cls"], plain["loss_cls"], rtol=1e-5)
        np.testing.assert_array_equal(guided["loss_bbox"], plain["loss_bbox"])


@pytest.mark.parametrize(("measure", "eta"), [("iou", 1.5), ("centerness", 0.5), ("iou", 0.0)])
def test_guided_quality_weighs_positives_by_a_power_of_their_quality(measure, eta, found_of):
    """w_i = q_i^eta sum_j L_j / sum_j q_j^eta L_j, of the true class of positives alone."""
    found, base = found_of("atss"), BASES["atss"]
    case, plain = found.case, with_quality(base, "none-none")
    guided = dataclasses.replace(base, quality=GuidedQuality(measure, eta))

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(outputs, batch):
        return [d.losses_per_prior(outputs, batch)["loss_cls"] for d in (guided, plain)]

    outputs = case.outputs._replace(quality_logits=[])
    find = jax.jit(base.match, compiler_options=QUICKLY)
    matches = jax.tree.map(np.asarray, find(case.outputs, case.batch))
    with mock.patch.object(Detector, "match", lambda *_: matches):
        weighted, unweighted = np.float64(run(outputs, case.batch))
    image, prior = np.nonzero(case.matched >= 0)
    label = case.batch.labels[image, case.matched[image, prior]]
    p = 1 / (1 + np.exp(-found.arrays[0][image, prior, label]))
    own = -0.25 * (1 - p) ** 2 * np.log(p)
    quality = objective(with_quality(base, f"branch-{measure}"), *found.arrays, case)[1][0]
    weight = quality**eta * own.sum() / (quality**eta * own).sum()
    n_pos = np.maximum((case.matched >= 0).sum(1), 1).sum()
    expected = np.zeros_like(weighted)
    expected[image, prior] = (weight - 1) * own / n_pos
    np.testing.assert_allclose(weighted - unweighted, expected, rtol=1e-3, atol=1e-6)
    assert (np.ptp(weight) > 0.3) == (eta > 0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("base", ["atss", "fcos", "retinanet"])
def test_a_branch_learns_the_quality_of_positives(base, measure, found_of):
    """The slope of cross entropy is sigmoid(z) - q; its divisor is N_pos."""
    found, detector = found_of(base), with_quality(BASES[base], f"branch-{measure}")
    quality = objective(detector, *found.arrays, found.case)[1][0]
    positive = found.case.matched >= 0
    counts = positive.sum(1)
    n_pos = counts.sum() if detector.counting == "batch" else np.maximum(counts, 1).sum()
    slope = found.gradients[f"branch-{measure}"][2][..., 0]
    expected = (1 / (1 + np.exp(-found.arrays[2][positive][:, 0])) - quality) / n_pos
    np.testing.assert_allclose(slope[positive], expected, rtol=1e-3, atol=1e-6)
    assert not slope[~positive].any()
    without = [g[2] for name, g in found.gradients.items() if not name.startswith("branch")]
    assert not np.any(without)


@pytest.mark.parametrize("quality", QUALITIES.values(), ids=QUALITIES)
def test_only_branches_need_an_output(quality):
    predicts = Detector(quality=quality).predicts(CLASSES)
    assert predicts.quality == (quality.measure if isinstance(quality, QualityBranch) else "")


@pytest.mark.parametrize("base", ["atss", "ssd512"])
def test_joint_quality_needs_a_loss_of_soft_labels(base):
    """Neither the focal loss nor a softmax has any."""
    detector = vars(systems)[base].detector
    with pytest.raises(ValueError, match=r"detector\.classification .* JointQuality"):
        dataclasses.replace(detector, quality=JointQuality())


def test_deltas_need_anchors():
    with pytest.raises(ValueError, match=r"detector\.box Deltas.* needs anchors"):
        dataclasses.replace(systems.fcos.detector, box=Deltas())


# Scores.


@pytest.mark.parametrize("name", ["branch-iou", "none-none", "joint-iou", "guided-iou-none"])
@pytest.mark.parametrize("base", ["atss", "fcos", "retinanet"])
def test_a_branch_multiplies_the_scores_after_threshold_and_choice(base, name, found_of):
    """So that some scores are below the threshold, and those of the best classes are kept."""
    found, threshold, most = found_of(base), 0.6, 15
    rule = Inference(score_threshold=threshold, nms_pre=most, padding_predicts=True)
    detector = dataclasses.replace(with_quality(BASES[base], name), inference=rule)
    outputs = found.case.outputs
    if not detector.quality.branch:
        outputs = outputs._replace(quality_logits=[])
    run = jax.jit(detector.candidates, compiler_options=QUICKLY)
    got = jax.tree.map(np.asarray, run(outputs, found.case.batch.sizes))
    cls, _, branch = (1 / (1 + np.exp(-x)) for x in found.arrays)
    ends = np.cumsum(detector.priors(LEVELS).levels)
    dropped = lowered = 0
    for i in range(len(cls)):
        of_class = cls[i][got.priors[i], got.labels[i]]
        quality = branch[i][got.priors[i], 0] if detector.quality.branch else 1.0
        expected = np.where(of_class > threshold, of_class * quality, 0)
        np.testing.assert_allclose(got.scores[i], expected, rtol=1e-4)
        levels = np.split(cls[i], ends[:-1])
        best = [np.sort(level.ravel())[::-1][:most] for level in levels]
        np.testing.assert_allclose(of_class, np.concatenate(best), rtol=1e-4)
        dropped += (expected == 0).sum()
        lowered += ((0 < expected) & (expected < threshold)).sum()
    assert dropped > 0
    assert (lowered > 0) == bool(detector.quality.branch)
