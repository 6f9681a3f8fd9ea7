"""What each prior is to learn, normalisers, and assigners that see predictions."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfl_jax import systems
from gfl_jax.assign import ATSS, BACKGROUND, FCOS, IGNORED, Assignment, FoveaBox, MaxIoU, Objects
from gfl_jax.boxes import pairwise_iou
from gfl_jax.detectors.box import Deltas, Distances, GeneralDistribution
from gfl_jax.detectors.classification import SoftmaxMining
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.matching import frame_of, match, normalizers
from gfl_jax.detectors.quality import JointQuality, NoQuality
from gfl_jax.models.heads import Outputs
from gfl_jax.priors import Points, SquareAnchors
from gfl_jax.scores import Scores

STRIDES = (8, 16, 32, 64, 128)
LEVELS = ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))  # of a 128 x 128 canvas
CLASSES = 3
ASSIGNERS = {
    "atss": (ATSS(), SquareAnchors()),
    "retina": (MaxIoU(), SquareAnchors(4.0)),
    "fcos": (FCOS(), Points()),
    "fcos-center": (FCOS(center_radius=1.5), Points()),
    "fovea": (FoveaBox(), Points()),
}


@pytest.fixture(scope="module")
def batch(make_batch):
    """Three images of different sizes, the last without objects; and one that only fills."""
    batch = make_batch([3, 2, 0, 2], (128, 128), classes=CLASSES, seed=1)
    batch.sizes[1] = 96, 100
    batch.image_mask[3] = False
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def matcher(name):
    assigner, generator = ASSIGNERS[name]
    return jax.jit(lambda batch: match(assigner, generator(LEVELS), batch))


@pytest.mark.parametrize("name", ASSIGNERS)
def test_matches_are_those_of_the_assigner_image_by_image(name, batch):
    assigner, generator = ASSIGNERS[name]
    priors, found = generator(LEVELS), jax.tree.map(np.asarray, matcher(name)(batch))
    usable = priors.trained(batch.sizes) & batch.image_mask[:, None]

    @jax.jit
    def alone(valid, objects):
        return assigner(priors, valid, objects).matched

    for i in range(4):
        objects = Objects(batch.boxes[i], batch.box_mask[i], batch.labels[i])
        np.testing.assert_array_equal(found.matched[i], alone(usable[i], objects))
    np.testing.assert_array_equal(found.trained, usable & (found.matched != IGNORED))
    np.testing.assert_array_equal(found.positive, found.matched >= 0)
    assert found.positive[:2].any(1).all()
    assert not found.positive[2:].any()
    assert (found.matched[2:] == BACKGROUND).all()
    assert (found.metric == 1).all()


@pytest.mark.parametrize("name", ASSIGNERS)
def test_positives_learn_their_object_and_others_have_a_box_around_them(name, batch):
    priors, found = ASSIGNERS[name][1](LEVELS), jax.tree.map(np.asarray, matcher(name)(batch))
    for i, p in np.argwhere(found.positive):
        g = found.matched[i, p]
        assert found.label[i, p] == batch.labels[i, g]
        expected = batch.boxes[i, g] / priors.strides[p]
        np.testing.assert_allclose(found.target[i, p], expected, rtol=1e-6)
    image, prior = np.nonzero(~found.positive)
    x, y = (priors.centers / priors.strides[:, None])[prior].T
    expected = np.stack([x - 1, y - 1, x + 1, y + 1], 1)
    np.testing.assert_allclose(found.target[image, prior], expected, rtol=1e-6)


def test_a_frame_holds_priors_in_strides_of_their_level():
    priors = SquareAnchors()(LEVELS)
    frame = frame_of(priors)
    size = frame.boxes[:, 2:] - frame.boxes[:, :2]
    assert (size == 8).all()
    np.testing.assert_array_equal(frame.centers * frame.strides[:, None], priors.centers)


@pytest.mark.parametrize(
    ("counting", "cls", "box"),
    [("batch", 7, 7), ("image", 8, 8), ("extra", 10, 7), ("targets", 3.5, 7)],
)
def test_normalizers_count_what_they_say(counting, cls, box):
    """Positives 2, 0 and 5 of three images, and another image that only fills the batch."""
    positive = np.arange(9) < np.array([2, 0, 5, 0])[:, None]
    targets = 0.5 * positive[..., None] * np.float32([0, 1, 0])
    targets[3], mask = 9.0, np.array([True, True, True, False])
    found = normalizers(counting, positive, targets, mask, lambda x: x)
    np.testing.assert_allclose(found, [cls, box])
    doubled = normalizers(counting, positive, targets, mask, lambda x: 2 * x)
    np.testing.assert_allclose(doubled, [2 * cls, 2 * box])
    nothing = normalizers(counting, positive & False, 0 * targets, mask, lambda x: x)
    assert min(nothing) >= 1


# Assigners that see predictions.


@dataclasses.dataclass(frozen=True)
class Closest:
    """An object takes the three priors whose predicted boxes overlap it most."""

    seen: ClassVar[list] = []
    sees_predictions: ClassVar[bool] = True

    def __call__(self, priors, valid, objects, predicted=None):
        self.seen.append(predicted)
        iou = pairwise_iou(objects.boxes, predicted.boxes)
        score = jnp.exp(predicted.scores.log_score)[:, objects.labels].T
        metric = jnp.where(valid & objects.mask[:, None], score * iou, 0.0)
        third = jnp.sort(metric, axis=1)[:, -3, None]
        wanted = jnp.where((metric >= third) & (metric > 0), metric, 0.0)
        matched = jnp.where(wanted.any(0), jnp.argmax(wanted, axis=0), BACKGROUND)
        return Assignment(matched, wanted.max(0))


def outputs_of(detector, images=4, seed=0):
    rng, predicts = np.random.default_rng(seed), detector.predicts(CLASSES)

    def maps(channels):
        shapes = [(images, *level, channels) for level in LEVELS]
        return [jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in shapes]

    return Outputs(maps(predicts.cls), maps(predicts.box))


SEEING = Detector(
    assigner=Closest(),
    quality=JointQuality("metric", "metric"),
    counting="targets",
)


@pytest.fixture(scope="module")
def seen(batch):
    """Outputs, matches, losses per prior and their gradient, of an assigner with predictions."""
    outputs = outputs_of(SEEING)

    @jax.jit
    def run(outputs):
        def total(outputs):
            shares = SEEING.losses_per_prior(outputs, batch)
            return sum(x.sum() for x in shares.values()), shares

        return SEEING.match(outputs, batch), *jax.value_and_grad(total, has_aux=True)(outputs)

    matches, (_, shares), gradient = run(outputs)
    return outputs, *jax.tree.map(np.asarray, (matches, shares, gradient))


def test_an_assigner_that_asks_for_them_sees_scores_and_boxes_in_pixels(batch, seen):
    outputs, matches, _, _ = seen
    priors = SEEING.priors_of(outputs)
    rows = [
        np.concatenate([np.float64(x).reshape(4, -1, x.shape[-1]) for x in levels], 1)
        for levels in outputs[:2]
    ]
    scores, bins = 1 / (1 + np.exp(-rows[0])), np.exp(rows[1].reshape(4, -1, 4, 17))
    sides = (bins * np.arange(17)).sum(-1) / bins.sum(-1) * priors.strides[:, None]
    boxes = np.tile(priors.centers, 2) + sides * [-1, -1, 1, 1]
    pairs = np.argwhere(matches.positive)
    assert len(pairs) > 9
    for i, p in pairs:
        g = matches.matched[i, p]
        iou = pairwise_iou(np.asarray(batch.boxes[i, g])[None], boxes[None, i, p])[0, 0]
        expected = iou * scores[i, p, batch.labels[i, g]]
        np.testing.assert_allclose(matches.metric[i, p], expected, rtol=1e-4)


def test_the_metric_is_label_weight_and_normaliser(seen):
    outputs, matches, shares, _ = seen
    metric, positive = np.float64(matches.metric), matches.positive
    n_pos = max(metric[positive].sum(), 1)
    x = np.concatenate([np.reshape(x, (4, -1, CLASSES)) for x in outputs.cls_logits], 1)
    sigma = 1 / (1 + np.exp(-np.float64(x)))
    y = positive[..., None] * metric[..., None]
    y = y * (matches.label[..., None] == np.arange(CLASSES))
    qfl = np.abs(y - sigma) ** 2 * -((1 - y) * np.log(1 - sigma) + y * np.log(sigma))
    expected = np.where(matches.trained, qfl.sum(-1), 0) / n_pos
    np.testing.assert_allclose(shares["loss_cls"], expected, rtol=1e-4, atol=1e-9)
    assert not shares["loss_bbox"][~positive].any()
    # GIoU loss is at most 2, each weighted by its metric.
    ratio = shares["loss_bbox"][positive] * n_pos / (SEEING.box_weight * metric[positive])
    assert ((ratio > 0) & (ratio <= 2.0001)).all()


def test_no_gradient_flows_through_an_assignment_or_its_metric(batch, seen):
    """The gradient is that of the losses with the same matches held constant."""
    outputs, matches, _, gradient = seen

    @dataclasses.dataclass(frozen=True)
    class Held:
        sees_predictions: ClassVar[bool] = False

        def __call__(self, priors, valid, objects, predicted=None):
            assert predicted is None
            i = jnp.argmax((batch.boxes == objects.boxes).all((1, 2)))
            return Assignment(jnp.asarray(matches.matched)[i], jnp.asarray(matches.metric)[i])

    held = dataclasses.replace(SEEING, assigner=Held())
    slope = jax.jit(jax.grad(lambda o: sum(held.losses(o, batch).terms.values())))(outputs)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert any(np.any(level) for level in gradient.box_logits)


def test_predictions_are_made_only_for_assigners_that_see_them(batch, monkeypatch):
    def refuse(*_):
        raise AssertionError("boxes of all priors were decoded")

    monkeypatch.setattr(GeneralDistribution, "decode", refuse)
    outputs = outputs_of(Detector())
    jax.eval_shape(Detector().match, outputs, batch)
    with pytest.raises(AssertionError, match="were decoded"):
        jax.eval_shape(SEEING.match, outputs, batch)


def test_what_does_not_go_together_is_refused_with_both_fields():
    with pytest.raises(ValueError, match=r"detector\.box Deltas.*detector\.priors are Points"):
        Detector(priors=Points(), box=Deltas())
    Detector(priors=Points(), box=Distances())
    with pytest.raises(ValueError, match=r"detector\.classification SoftmaxMining.* JointQuality"):
        Detector(classification=SoftmaxMining())
    Detector(classification=SoftmaxMining(), quality=NoQuality())


def test_log_scores_of_a_softmax_are_those_of_its_scores():
    rule, logits = SoftmaxMining(), np.random.default_rng(0).normal(0, 3, (50, 4))
    scores = rule.log_scores(jnp.float32(logits))
    assert isinstance(scores, Scores)
    e = np.exp(logits)
    p = (e / e.sum(-1, keepdims=True))[:, :-1]
    np.testing.assert_allclose(scores.log_score, np.log(p), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores.log_complement, np.log1p(-p), rtol=1e-4, atol=1e-6)
    assert systems.ssd512.detector.classification == rule
