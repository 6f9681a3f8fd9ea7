"""Every system of the paper: its size, and what must hold for the losses of all of them."""

import functools
import math
from unittest import mock

import jax
import numpy as np
import pytest
from jax import lax

from gfl_jax import systems
from gfl_jax.config import Experiment
from gfl_jax.detectors.box import Gaussian
from gfl_jax.detectors.classification import QualityFocal
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.quality import GuidedQuality, JointQuality, QualityBranch
from gfl_jax.models.heads import Outputs
from gfl_jax.models.network import Network

SYSTEMS = {name: value for name, value in vars(systems).items() if isinstance(value, Experiment)}
JOINT = {"quality": JointQuality("none"), "classification": QualityFocal()}
VARIANTS = {  # of the paper's tables, by what the systems have not
    "foveabox-joint": systems.variant(systems.foveabox, detector=JOINT),
    "retinanet-guided": systems.variant(systems.retinanet, detector={"quality": GuidedQuality()}),
    "fcos-gaussian": systems.variant(
        systems.fcos_improved,
        detector={"box": Gaussian(), "box_weight": 0.0, "quality": QualityBranch("iou")},
    ),
}
DETECTORS = {
    name: experiment.detector
    for name, experiment in (SYSTEMS | VARIANTS).items()
    if name != "fcos_center"  # all its parts are in the two other ones of FCOS
}
LEVELS = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1), (1, 1), (1, 1))  # of a 64 x 96 canvas
CLASSES = 3
# Programs compiled for one run: quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0}


# Sizes.

PARAMETERS = {  # trained and all of them, of the reference with 80 classes
    "gfl": (32_215_193, 32_440_537),
    "atss": (32_069_978, 32_295_322),
    "fcos": (32_019_802, 32_295_322),
    "fcos_center": (32_019_802, 32_295_322),
    "fcos_improved": (32_021_850, 32_297_370),
    "retinanet": (37_743_348, 37_968_692),
    "foveabox": (36_194_388, 36_419_732),
    "ssd512": (36_038_196, 36_038_196),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_parameters_are_as_many_as_the_reference_has(name):
    network = Network(SYSTEMS[name].model, SYSTEMS[name].detector.predicts(80))
    variables = jax.eval_shape(lambda: network.init(0))
    constants = ("mean", "var")  # of frozen norms, which are no parameters
    trained, frozen = (
        sum(
            math.prod(array.shape)
            for name, array in arrays.items()
            if name.rpartition(".")[2] not in constants
        )
        for arrays in (variables.params, variables.frozen)
    )
    assert (trained, trained + frozen) == PARAMETERS[name]


# Losses.


@pytest.fixture
def batch(make_batch):
    """Four images, the last two in part padding, with 3, 0, 1 and 5 objects."""
    batch = make_batch([3, 0, 1, 5], (64, 96), classes=CLASSES)
    batch.sizes[2:] = (60, 50), (30, 96)
    batch.boxes[2:] = np.minimum(batch.boxes[2:], np.tile(batch.sizes[2:, ::-1], 2)[:, None])
    batch.boxes[~batch.box_mask] = 40, 40, 10, 10
    batch.boxes[3, :5, :2] = np.minimum(batch.boxes[3, :5, :2], batch.boxes[3, :5, 2:] - 12)
    return batch


def random_outputs(detector, scale=1.0, images=4, seed=0):
    """Of a head for this detector on LEVELS, or as many of them as it has."""
    rng, predicts = np.random.default_rng(seed), detector.predicts(CLASSES)

    def levels(channels):
        pairs = zip(LEVELS, predicts.per_cell, strict=False)
        shapes = [(images, *level, count * channels) for level, count in pairs]
        return [np.float32(rng.normal(0, scale, shape)) for shape in shapes]

    quality = levels(1) if predicts.quality else []
    return Outputs(levels(predicts.cls), levels(predicts.box), quality)


def with_matches(matches):
    """While a program is traced, in place of another assignment: compiled once, not three times."""
    return mock.patch.object(Detector, "match", lambda *_: matches)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def _losses_and_gradient(detector, outputs, batch):
    matches = detector.match(outputs, batch)

    def total(outputs):
        losses = detector.losses(outputs, batch)
        return sum(losses.terms.values()), losses

    with with_matches(matches):
        gradient, losses = jax.grad(total, has_aux=True)(outputs)
    return losses, gradient, matches


def losses_and_gradient(detector, outputs, batch):
    return jax.tree.map(np.asarray, _losses_and_gradient(detector, outputs, batch)[:2])


def matches_of(detector, outputs, batch):
    """What each prior is to learn."""
    return jax.tree.map(np.asarray, _losses_and_gradient(detector, outputs, batch)[2])


def assert_finite(tree):
    assert all(np.isfinite(array).all() for array in jax.tree.leaves(tree))


def assert_same_losses(found, expected):
    assert found.terms.keys() == expected.terms.keys()
    for name, value in expected.terms.items():
        np.testing.assert_allclose(found.terms[name].sum(), value, rtol=1e-5, err_msg=name)
        shares = found.per_image[name].reshape(-1)
        np.testing.assert_allclose(shares, expected.per_image[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_do_not_depend_on_how_images_are_spread_over_devices(name, batch):
    detector = DETECTORS[name]
    batch.image_mask[2] = False
    outputs = random_outputs(detector)
    whole, _ = losses_and_gradient(detector, outputs, batch)
    assert all(value > 0 for value in whole.terms.values())

    @functools.partial(jax.vmap, axis_name="devices")
    def on_devices(outputs, batch, matches):
        with with_matches(matches):
            return detector.losses(outputs, batch, lambda count: lax.psum(count, "devices"))

    arrays = outputs, batch, matches_of(detector, outputs, batch)
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), arrays)
    parts = jax.jit(on_devices, compiler_options=QUICKLY)(*halves)
    assert_same_losses(jax.tree.map(np.asarray, parts), whole)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_filler_image_changes_nothing(name, batch):
    """Not even the numbers of images and positives: whatever it holds."""
    detector = DETECTORS[name]
    outputs = random_outputs(detector)
    batch.image_mask[3] = False
    losses, gradient = losses_and_gradient(detector, outputs, batch)
    assert not any(level[3].any() for level in jax.tree.leaves(gradient))
    assert not any(shares[3] for shares in losses.per_image.values())
    assert any(level[:3].any() for level in jax.tree.leaves(gradient))

    batch.box_mask[3], batch.boxes[3], batch.labels[3] = True, batch.boxes[0, 0], 0
    for level in jax.tree.leaves(outputs):
        level[3] = 30.0
    again = losses_and_gradient(detector, outputs, batch)
    jax.tree.map(np.testing.assert_array_equal, again, (losses, gradient))
    batch.image_mask[3] = True
    assert losses_and_gradient(detector, outputs, batch)[0].terms != losses.terms


@pytest.mark.parametrize("name", DETECTORS)
def test_without_any_object_only_the_background_is_trained(name, batch):
    detector = DETECTORS[name]
    batch.box_mask[:] = False
    losses, gradient = losses_and_gradient(detector, random_outputs(detector), batch)
    assert_finite((losses, gradient))
    assert not any(value for key, value in losses.terms.items() if key != "loss_cls")
    assert not any(level.any() for level in jax.tree.leaves(gradient[1:]))
    mined = name == "ssd512"  # no positives, hence no negatives
    assert (losses.terms["loss_cls"] > 0) != mined
    assert gradient.cls_logits[0].any() != mined


@pytest.mark.parametrize("name", DETECTORS)
def test_a_batch_of_fillers_alone_is_zero(name, batch):
    detector = DETECTORS[name]
    batch.image_mask[:] = False
    found = losses_and_gradient(detector, random_outputs(detector), batch)
    assert not any(array.any() for array in jax.tree.leaves(found))


@pytest.mark.parametrize("magnitude", [20.0, 100.0, 1e4])
@pytest.mark.parametrize("name", DETECTORS)
def test_extreme_outputs_have_finite_losses_and_gradients(name, magnitude, batch):
    """Beyond where exp overflows too."""
    detector, rng = DETECTORS[name], np.random.default_rng(0)
    some = random_outputs(detector)
    signs = [jax.tree.map(lambda x: rng.choice([-1.0, 1.0], x.shape), some)]
    for cls, box in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        parts = zip(some, (cls, box, cls), strict=True)
        signs.append(Outputs(*([np.full(x.shape, s) for x in part] for part, s in parts)))
    for outputs in signs:
        outputs = jax.tree.map(lambda x: np.float32(magnitude * x), outputs)
        assert_finite(losses_and_gradient(detector, outputs, batch))


@pytest.mark.parametrize("name", DETECTORS)
def test_whatever_negatives_predict_for_boxes_does_not_matter(name, batch):
    """Infinity included, so that nothing they overflow to reaches a loss or a gradient."""
    detector = DETECTORS[name]
    outputs = random_outputs(detector)
    expected = losses_and_gradient(detector, outputs, batch)
    matched, start = matches_of(detector, outputs, batch).matched, 0
    for level, count in zip(outputs.box_logits, detector.priors.per_cell, strict=True):
        rows = level.reshape(len(level), level.shape[1] * level.shape[2] * count, -1)
        rows[matched[:, start : start + rows.shape[1]] < 0] = np.inf
        start += rows.shape[1]
    assert np.isinf(np.concatenate([x.ravel() for x in outputs.box_logits])).mean() > 0.3
    again = losses_and_gradient(detector, outputs, batch)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


# What losses are divided by.


def focal_of_zero(positives, trained, alpha=0.25, gamma=2.0):
    """The sum over all classes where every score is 0.5."""
    hard = positives * alpha + (trained * CLASSES - positives) * (1 - alpha)
    return hard * 0.5**gamma * math.log(2)


@pytest.mark.parametrize("objects", ["some", "none"])
@pytest.mark.parametrize("real", [4, 3])
@pytest.mark.parametrize("name", ["atss", "fcos", "retinanet", "foveabox", "ssd512"])
def test_losses_are_divided_by_the_positives_as_each_system_counts_them(name, real, objects, batch):
    """With outputs of 0, whose losses are known, for all the images or all but the last."""
    detector = DETECTORS[name]
    batch.image_mask[real:] = False
    batch.box_mask[:] &= objects == "some"
    outputs = jax.tree.map(np.zeros_like, random_outputs(detector))
    trained, matched = matches_of(detector, outputs, batch)[:2]
    counts = (matched >= 0).sum(1)
    assert (counts > 0).tolist() == (batch.box_mask.any(1) & batch.image_mask).tolist()
    found, at_least_one = counts.sum(), np.maximum(counts, 1)[:real].sum()
    assert at_least_one > found

    priors = detector.priors_of(outputs)
    inside = np.asarray(priors.valid(batch.sizes))[:real].sum()
    if name in ("fcos", "foveabox"):
        assert trained.sum() == real * len(priors.boxes)
    elif name == "retinanet":  # some are ignored
        assert (trained.sum() < inside) == (objects == "some")
    else:
        assert trained.sum() == inside
    cls = {
        "atss": focal_of_zero(found, trained.sum()) / at_least_one,
        "retinanet": focal_of_zero(found, trained.sum()) / at_least_one,
        "fcos": focal_of_zero(found, trained.sum()) / max(found, 1),
        "foveabox": focal_of_zero(found, trained.sum(), 0.4, 1.5) / (found + real),
        "ssd512": 4 * found * math.log(CLASSES + 1) / at_least_one,
    }
    branch = {"atss": found / at_least_one, "fcos": min(found, 1)}
    terms = losses_and_gradient(detector, outputs, batch)[0].terms
    np.testing.assert_allclose(terms["loss_cls"], cls[name], rtol=1e-5)
    assert ("loss_centerness" in terms) == (name in branch)
    if name in branch:
        np.testing.assert_allclose(terms["loss_centerness"], branch[name] * math.log(2), rtol=1e-5)
