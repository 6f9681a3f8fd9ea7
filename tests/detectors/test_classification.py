"""Scores, hard negative mining against a plain computation, and custom losses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gfl_jax import systems
from gfl_jax.detectors.classification import (
    CustomClassification,
    Focal,
    QualityFocal,
    SoftmaxMining,
    Varifocal,
)
from gfl_jax.detectors.custom import custom_function
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.quality import GuidedQuality, NoQuality
from gfl_jax.models.heads import Outputs
from gfl_jax.priors import SSDBoxes

CLASSES = 3
SIGMOIDS = {"qfl": QualityFocal(), "focal": Focal(), "varifocal": Varifocal()}
# Programs compiled for one run: quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0}


def softmax(logits):
    e = np.exp(np.float64(logits) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# Scores.


@pytest.mark.parametrize("loss", SIGMOIDS.values(), ids=SIGMOIDS)
def test_a_sigmoid_scores_every_class_by_itself(loss):
    logits = np.random.default_rng(0).normal(0, 3, (2, 5, CLASSES)).astype(np.float32)
    assert loss.channels(CLASSES) == CLASSES
    np.testing.assert_allclose(loss.scores(logits), 1 / (1 + np.exp(-logits)), rtol=1e-5)
    np.testing.assert_allclose(loss.scores(np.float32([loss.initial_bias])), [0.01], rtol=1e-4)


def test_a_softmax_scores_classes_and_not_the_background():
    logits = np.random.default_rng(0).normal(0, 3, (2, 5, CLASSES + 1)).astype(np.float32)
    loss = SoftmaxMining()
    assert loss.channels(CLASSES) == CLASSES + 1
    expected = softmax(logits)
    found = loss.scores(logits)
    np.testing.assert_allclose(found, expected[..., :-1], rtol=1e-5)
    np.testing.assert_allclose(1 - found.sum(-1), expected[..., -1], atol=1e-6)
    assert loss.initial_bias == 0


@pytest.mark.parametrize("loss", SIGMOIDS.values(), ids=SIGMOIDS)
def test_without_mining_all_trained_priors_count(loss):
    rng = np.random.default_rng(0)
    positive, trained = rng.random((2, 3, 20)) < [[[0.2]], [[0.7]]]
    counted = loss.counted(rng.random((3, 20)), positive & trained, trained)
    np.testing.assert_array_equal(counted, trained)


# Mining.


def mined(loss, positive, trained, ratio):
    """Image by image: the positives and the hardest of the others."""
    counted = positive.copy()
    for image in range(len(loss)):
        negatives = np.flatnonzero(trained[image] & ~positive[image])
        hardest = sorted(negatives, key=lambda prior, i=image: -loss[i, prior])
        counted[image, hardest[: int(ratio * positive[image].sum())]] = True
    return counted


@pytest.mark.parametrize("ratio", [3.0, 1.0])
def test_negatives_are_the_hardest_three_for_each_positive_of_the_image(ratio):
    """With 0, 1, 5 and 30 of 60 positives: none, some, and all that there are."""
    rng = np.random.default_rng(0)
    loss = rng.exponential(1.0, (4, 60)).astype(np.float32)
    trained, positive = np.ones((4, 60), bool), np.zeros((4, 60), bool)
    for image, count in enumerate((0, 1, 5, 30)):
        positive[image, rng.choice(60, count, replace=False)] = True
    trained[2, 30:] = positive[2, 30:]
    found = np.asarray(SoftmaxMining(ratio).counted(loss, positive, trained))
    np.testing.assert_array_equal(found, mined(loss, positive, trained, ratio))
    negatives = (found & ~positive).sum(1)
    assert negatives.tolist() == ([0, 3, 15, 30] if ratio == 3 else [0, 1, 5, 30])


@settings(max_examples=60)
@given(data=st.data())
def test_mining_counts_what_ranks_by_two_sorts_count(data):
    """Few different losses: nearly all negatives are as hard as others."""
    shape = 2, 25
    loss = data.draw(arrays(np.float32, shape, elements=st.sampled_from([0, -0.0, 0.5, 1, 7])))
    positive, usable = (data.draw(arrays(bool, shape)) for _ in range(2))
    ratio = data.draw(st.sampled_from([0.0, 0.3, 1.0, 1.5, 3.0]))
    trained = usable | positive
    negative = trained & ~positive
    hardness = jnp.where(negative, loss, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-hardness, axis=1), axis=1)
    expected = positive | (negative & (rank < ratio * positive.sum(1, keepdims=True)))
    found = SoftmaxMining(ratio).counted(loss, positive, trained)
    np.testing.assert_array_equal(found, expected)


def test_mining_takes_the_first_of_equally_hard_ones():
    loss, positive = np.zeros((1, 10), np.float32), np.arange(10)[None] == 4
    found = SoftmaxMining().counted(loss, positive, np.ones((1, 10), bool))
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 4]


def test_mining_never_takes_untrained_priors():
    """Not even where there are too few others, whatever their loss."""
    loss = np.float32([[9, 1, 2, 9, 9, 0.5]])
    positive = np.array([[False, True, False, False, False, False]])
    trained = np.array([[False, True, True, False, False, True]])
    found = SoftmaxMining().counted(loss, positive, trained)
    np.testing.assert_array_equal(found, trained)


def test_cross_entropy_is_of_the_class_or_the_background():
    logits = np.random.default_rng(0).normal(0, 2, (1, 3, CLASSES + 1)).astype(np.float32)
    targets = np.float32([[[0, 1, 0], [0, 0, 0], [1, 0, 0]]])
    found = SoftmaxMining()(logits, targets)
    expected = -np.log(softmax(logits))[0, [0, 1, 2], [1, 3, 0]]
    assert found.shape == logits.shape
    np.testing.assert_allclose(found.sum(-1), [expected], rtol=1e-5)


# The whole of SSD's.

LEVELS = ((8, 8), (4, 4), (2, 2))  # of a 64 x 64 canvas
SSD = dataclasses.replace(
    systems.ssd512.detector,
    priors=SSDBoxes(64, 0.2, 0.4, 0.9, ((2,), (2,), (2,)), (8, 16, 32)),
)


@pytest.fixture
def batch(make_batch):
    """Four images, the last one a filler, with 2, 0, 3 and 1 objects."""
    batch = make_batch([2, 0, 3, 1], classes=CLASSES)
    batch.image_mask[3] = False
    return batch


def random_outputs(detector, seed=0):
    rng, predicts = np.random.default_rng(seed), detector.predicts(CLASSES)

    def levels(channels):
        pairs = zip(LEVELS, predicts.per_cell, strict=True)
        return [np.float32(rng.normal(size=(4, *level, n * channels))) for level, n in pairs]

    return Outputs(levels(predicts.cls), levels(predicts.box))


def flat(levels, channels):
    return np.concatenate([np.reshape(x, (4, -1, channels)) for x in levels], axis=1)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def _classified(detector, outputs, batch):
    """loss_cls by image, its slope, and the assignment."""

    def total(outputs):
        losses = detector.losses(outputs, batch)
        return losses.terms["loss_cls"], losses.per_image["loss_cls"]

    gradient, per_image = jax.grad(total, has_aux=True)(outputs)
    return per_image, gradient, detector.match(outputs, batch)[:2]


def classified(detector, outputs, batch):
    return jax.tree.map(np.asarray, _classified(detector, outputs, batch))


def test_the_loss_of_ssd_is_that_of_a_plain_computation(batch):
    outputs = random_outputs(SSD)
    per_image, gradient, (trained, matched) = classified(SSD, outputs, batch)
    positive = matched >= 0
    assert positive.sum(1)[[0, 2]].min() > 2
    assert trained[:3].all()
    assert not trained[3].any()
    p = softmax(flat(outputs.cls_logits, CLASSES + 1))
    label = np.where(positive, batch.labels[np.arange(4)[:, None], matched * positive], CLASSES)
    loss = -np.log(np.take_along_axis(p, label[..., None], 2)[..., 0])
    counted = mined(loss, positive, trained, 3)
    assert counted[[0, 2]].sum(1).tolist() == (4 * positive[[0, 2]].sum(1)).tolist()
    assert not counted[[1, 3]].any()
    n_pos = positive.sum() + 1  # the image without any counts as one
    np.testing.assert_allclose(per_image, (loss * counted).sum(1) / n_pos, rtol=1e-5)
    slope = (p - np.eye(CLASSES + 1)[label]) * counted[..., None] / n_pos
    np.testing.assert_allclose(flat(gradient.cls_logits, CLASSES + 1), slope, rtol=1e-4, atol=1e-7)


def test_ssd_is_guided_by_quality_too(batch):
    """The sum over the positives stays; their shares change; negatives are the same."""
    outputs, guided = random_outputs(SSD), dataclasses.replace(SSD, quality=GuidedQuality())
    plain, slopes, (_, matched) = classified(SSD, outputs, batch)
    found, guided_slopes, _ = classified(guided, outputs, batch)
    np.testing.assert_allclose(found.sum(), plain.sum(), rtol=1e-5)
    slopes, guided_slopes = (flat(x.cls_logits, CLASSES + 1) for x in (slopes, guided_slopes))
    positive = matched >= 0
    np.testing.assert_array_equal(guided_slopes[~positive], slopes[~positive])
    ratio = guided_slopes[positive] / slopes[positive]
    np.testing.assert_allclose(ratio, np.tile(ratio[:, :1], (1, CLASSES + 1)), rtol=1e-3)
    assert np.ptp(ratio) > 0.1


# Custom losses.

CUSTOM = """
from gfl_jax.losses import sigmoid_focal_loss

CONSTANT = 3

def focal(logits, targets):
    return sigmoid_focal_loss(logits, targets)

def product(logits, targets):
    return logits * targets

def negatives_in_half(logits, targets):
    return (logits * (targets == 0)).astype("bfloat16")

def total(logits, targets):
    return focal(logits, targets).sum()

def by_prior(logits, targets):
    return focal(logits, targets).sum(-1)

def _hidden(logits, targets):
    return logits
"""


@pytest.fixture
def custom_file(tmp_path):
    file = tmp_path / "custom.py"
    file.write_text(CUSTOM)
    return file


def test_a_custom_loss_is_called_with_logits_and_targets(custom_file, batch):
    """As built-in ones are: the same detector with RetinaNet's focal loss by another name."""
    focal = dataclasses.replace(SSD, classification=Focal(), quality=NoQuality())
    custom = CustomClassification(f"{custom_file}:focal")
    assert custom.channels(CLASSES) == CLASSES
    outputs = random_outputs(focal)
    expected = classified(focal, outputs, batch)
    assert expected[0][0] > 0
    found = classified(dataclasses.replace(focal, classification=custom), outputs, batch)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_custom_loss_takes_targets_as_constants_and_becomes_float32(custom_file):
    logits, targets = np.float32([[1, 2, 3]]), np.float32([[0, 0.5, 0]])
    product = CustomClassification(f"{custom_file}:product")
    slopes = jax.grad(lambda *a: product(*a).sum(), (0, 1))(logits, targets)
    np.testing.assert_array_equal(slopes[0], targets)
    assert not slopes[1].any()
    found = CustomClassification(f"{custom_file}:negatives_in_half")(logits, targets)
    assert found.dtype == jnp.float32
    assert found.tolist() == [[1, 0, 3]]


def test_custom_losses_go_with_joint_quality(custom_file):
    Detector(classification=CustomClassification(f"{custom_file}:focal"))


@pytest.mark.parametrize(("name", "shape"), [("total", r"\(\)"), ("by_prior", r"\(2, 5\)")])
def test_a_custom_loss_of_a_wrong_shape_is_named(custom_file, name, shape):
    logits = np.zeros((2, 5, CLASSES), np.float32)
    with pytest.raises(
        ValueError, match=rf"custom\.py:{name} returned shape {shape} .*\(2, 5, 3\)"
    ):
        CustomClassification(f"{custom_file}:{name}")(logits, logits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is ''; write 'path/to/file.py:function'"),
        ("custom.py", "is 'custom.py'; write"),
        (":focal", "is ':focal'; write"),
        ("custom.py:", "is 'custom.py:'; write"),
        ("no.such.module:focal", "names 'no.such.module:focal': No module named 'no'"),
        ("gfl_jax.losses:no_loss", ".* has no function no_loss; it has .*giou_loss"),
        ("math:pi", ".* has no function pi; it has .*sqrt"),
    ],
)
def test_what_names_no_function_is_an_error_that_says_so(name, message):
    with pytest.raises(ValueError, match=rf"detector\.classification\.function {message}"):
        CustomClassification(name).resolve()


def test_what_a_file_has_instead_is_listed(custom_file):
    for name in ("CONSTANT", "other"):
        with pytest.raises(ValueError, match=f"no function {name}; it has .*by_prior") as error:
            custom_function(f"{custom_file}:{name}", "here")
        assert "_hidden" not in str(error.value)


def test_an_absent_file_is_named_with_its_place(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"there is no file {tmp_path / 'none.py'}"):
        CustomClassification(f"{tmp_path / 'none.py'}:focal").resolve()


def test_a_path_is_relative_to_where_the_program_was_started(custom_file, monkeypatch):
    monkeypatch.chdir(custom_file.parent)
    assert custom_function("custom.py:product", "here")(2, 3) == 6
    assert custom_function("./custom.py:product", "here")(2, 3) == 6
    assert custom_function("gfl_jax.losses:giou_loss", "here").__name__ == "giou_loss"


def test_a_file_is_executed_once(custom_file):
    custom_file.write_text(CUSTOM + "\nloaded = []\ndef load(*_):\n    return loaded\n")
    product, load = (
        custom_function(f"{custom_file}:{name}", "here") for name in ("product", "load")
    )
    assert custom_function(f"{custom_file}:product", "here") is product
    assert load() is product.__globals__["loaded"]


def test_an_error_in_a_custom_file_is_its_own(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(SyntaxError):
        custom_function(f"{tmp_path / 'broken.py'}:f", "here")
