"""Losses in a user's own file: the example, and what happens when something is wrong with it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gfl_jax.cli import load_experiment
from gfl_jax.config import Experiment, from_dict, to_dict
from gfl_jax.detectors.box import CustomBoxLoss
from gfl_jax.detectors.classification import CustomClassification
from gfl_jax.losses import quality_focal_loss
from gfl_jax.models.heads import Outputs
from gfl_jax.systems import changed

EXAMPLE = Path(__file__).parents[2] / "examples" / "gfl_r18_custom_losses.py"
OWN = """
import jax.numpy as jnp

def zero(logits, targets):
    return jnp.zeros_like(logits)

def ones(predicted, target):
    return jnp.ones(predicted.shape[:-1])

def reduced(a, b):
    return jnp.zeros(())

def faulty(a, b):
    return undefined

constant = 3
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "my_losses.py"
    file.write_text(OWN)
    return str(file)


def losses(detector, make_batch, classes=3):
    batch = jax.tree.map(jnp.asarray, make_batch([2, 1], (64, 64), classes=classes))
    rng = np.random.default_rng(0)
    levels = [8, 4, 2, 1, 1]

    def maps(channels):
        return [jnp.asarray(rng.normal(size=(2, n, n, channels)), jnp.float32) for n in levels]

    outputs = Outputs(maps(classes), maps(detector.box.channels))

    def total(outputs):
        found = detector.losses(outputs, batch).terms
        return sum(found.values()), found

    gradient, terms = jax.jit(jax.grad(total, has_aux=True))(outputs)
    return terms, gradient


def test_the_example_names_both_losses_and_survives_a_checkpoint():
    experiment = load_experiment(EXAMPLE)
    assert isinstance(experiment.detector.classification, CustomClassification)
    assert isinstance(experiment.detector.box_loss, CustomBoxLoss)
    assert from_dict(Experiment, to_dict(experiment)) == experiment


def test_the_example_has_finite_losses_that_differ_from_gfls(make_batch):
    detector = load_experiment(EXAMPLE).detector
    terms, gradient = losses(detector, make_batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((terms, gradient)))
    plain, _ = losses(Experiment().detector, make_batch)
    assert terms["loss_cls"] > plain["loss_cls"]  # epsilon adds
    assert terms["loss_bbox"] != plain["loss_bbox"]
    assert terms["loss_dfl"] == plain["loss_dfl"]


def test_the_examples_functions_meet_known_losses_at_their_limits():
    detector = load_experiment(EXAMPLE).detector
    name = detector.classification.function
    from gfl_jax.detectors.custom import custom_function

    poly = custom_function(name, "field")
    x, y = jnp.linspace(-3, 3, 12).reshape(4, 3), jnp.linspace(0, 1, 12).reshape(4, 3)
    np.testing.assert_allclose(poly(x, y, epsilon=0.0), quality_focal_loss(x, y), rtol=1e-6)
    alpha = custom_function(detector.box_loss.function, "field")
    boxes = jnp.array([[0.0, 0.0, 2.0, 2.0]])
    shifted = boxes + jnp.array([1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(alpha(boxes, shifted, alpha=1.0), 1 - 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(alpha(boxes, shifted), 1 - 1 / 27, rtol=1e-6)


def test_own_losses_are_weighted_and_reduced_as_the_projects_own(own, make_batch):
    detector = changed(
        Experiment(),
        detector={
            "classification": CustomClassification(f"{own}:zero"),
            "box_loss": CustomBoxLoss(f"{own}:ones"),
            "quality": dataclasses.replace(Experiment().detector.quality, weighting="iou"),
        },
    ).detector
    terms, _ = losses(detector, make_batch)
    assert terms["loss_cls"] == 0
    # The weighted mean of ones, as long as the weights add up to one at least.
    assert 0 < terms["loss_bbox"] <= detector.box_weight + 1e-5


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("nowhere.py:loss", FileNotFoundError, "nowhere.py"),
        ("{own}:absent", ValueError, "no function absent; it has zero, ones, reduced, faulty"),
        ("{own}:constant", ValueError, "no function constant"),
        ("no_colon", ValueError, "path/to/file.py:function"),
        ("", ValueError, "path/to/file.py:function"),
        ("no_such_package:loss", ValueError, "no_such_package"),
    ],
)
def test_a_name_that_leads_nowhere_stops_at_once(own, name, error, match):
    for kind, field in ((CustomClassification, "classification"), (CustomBoxLoss, "box_loss")):
        with pytest.raises(error, match=match) as caught:
            kind(name.format(own=own))
        assert f"detector.{field}.function" in str(caught.value)


def test_a_reduced_loss_is_refused_with_the_right_shape(own, make_batch):
    for field, kind in (("classification", CustomClassification), ("box_loss", CustomBoxLoss)):
        detector = changed(Experiment(), detector={field: kind(f"{own}:reduced")}).detector
        with pytest.raises(ValueError, match=r"reduced returned shape \(\)"):
            losses(detector, make_batch)


def test_an_error_in_the_users_function_is_the_users(own, make_batch):
    detector = changed(Experiment(), detector={"box_loss": CustomBoxLoss(f"{own}:faulty")}).detector
    with pytest.raises(NameError, match="undefined"):
        losses(detector, make_batch)
