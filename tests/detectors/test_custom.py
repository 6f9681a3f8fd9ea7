"""Custom losses: the example, when their file is executed, and what is wrong with a name."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

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
from gfl_jax.systems import variant
from gfl_jax.training.loop import fit
from gfl_jax.training.step import Train

EXAMPLE = Path(__file__).parents[2] / "examples" / "gfl_r18_custom_losses.py"
CUSTOM = """
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
def custom(tmp_path_factory):
    file = tmp_path_factory.mktemp("custom") / "my_losses.py"
    file.write_text(CUSTOM)
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


def test_custom_losses_are_weighted_and_reduced_as_built_in_ones(custom, make_batch):
    detector = variant(
        Experiment(),
        detector={
            "classification": CustomClassification(f"{custom}:zero"),
            "box_loss": CustomBoxLoss(f"{custom}:ones"),
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
        ("{custom}:absent", ValueError, "no function absent; it has zero, ones, reduced, faulty"),
        ("{custom}:constant", ValueError, "no function constant"),
        ("no_colon", ValueError, "path/to/file.py:function"),
        ("", ValueError, "path/to/file.py:function"),
        ("no_such_package:loss", ValueError, "no_such_package"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_its_field(custom, name, error, match):
    for kind, field in ((CustomClassification, "classification"), (CustomBoxLoss, "box_loss")):
        with pytest.raises(error, match=match) as caught:
            kind(name.format(custom=custom)).resolve()
        assert f"detector.{field}.function" in str(caught.value)


def test_a_detector_resolves_both_losses(custom):
    detector = variant(
        Experiment(),
        detector={
            "classification": CustomClassification(f"{custom}:zero"),
            "box_loss": CustomBoxLoss(f"{custom}:ones"),
        },
    ).detector
    detector.resolve()
    for field in ("classification", "box_loss"):
        wrong = dataclasses.replace(getattr(detector, field), function=f"{custom}:absent")
        with pytest.raises(ValueError, match=rf"detector\.{field}\.function .* no function absent"):
            dataclasses.replace(detector, **{field: wrong}).resolve()
    Experiment().detector.resolve()


def test_the_file_is_executed_when_the_loss_is_first_called_and_not_before(tmp_path, make_batch):
    """Neither by a config, nor when its JSON is read, nor for detections."""
    file, ran = tmp_path / "marks.py", tmp_path / "ran"
    file.write_text(f"open({str(ran)!r}, 'a').write('x')\n" + CUSTOM)
    experiment = variant(
        Experiment(),
        detector={
            "classification": CustomClassification(f"{file}:zero"),
            "box_loss": CustomBoxLoss(f"{file}:ones"),
        },
    )
    stored = to_dict(experiment)
    assert stored["detector"]["classification"]["function"] == f"{file}:zero"
    assert from_dict(Experiment, stored) == experiment
    batch = make_batch([2], (64, 64), classes=3)
    outputs = Outputs(
        [jnp.zeros((1, n, n, 3)) for n in (8, 4, 2, 1, 1)],
        [jnp.zeros((1, n, n, 68)) for n in (8, 4, 2, 1, 1)],
    )
    jax.eval_shape(experiment.detector.detections, outputs, batch.sizes, batch.scales)
    assert not ran.exists()
    jax.eval_shape(experiment.detector.losses, outputs, batch)
    assert ran.read_text() == "x"


def test_what_is_stored_opens_after_the_file_has_moved(tmp_path):
    file = tmp_path / "before.py"
    file.write_text(CUSTOM)
    loss = CustomBoxLoss(f"{file}:ones")
    stored = to_dict(variant(Experiment(), detector={"box_loss": loss}))
    moved = file.rename(tmp_path / "after.py")
    detector = from_dict(Experiment, stored).detector
    with pytest.raises(FileNotFoundError, match=r"detector\.box_loss\.function .*before\.py"):
        detector.resolve()
    renamed = dataclasses.replace(detector.box_loss, function=f"{moved}:ones")
    dataclasses.replace(detector, box_loss=renamed).resolve()


def test_training_looks_custom_losses_up_before_its_first_step(tmp_path):
    """Before anything is made: there is neither data nor a network here."""
    split = SimpleNamespace(category_ids=[1], category_names=["thing"])
    wrong = CustomBoxLoss(f"{tmp_path / 'absent.py'}:loss")
    with pytest.raises(FileNotFoundError, match=r"detector\.box_loss\.function .*absent\.py"):
        fit(
            None,
            dataclasses.replace(Experiment().detector, box_loss=wrong),
            None,
            Train(),
            train_split=split,
            val_split=split,
            devices=None,
            workdir=tmp_path,
            initial=None,
            about={},
        )
    assert not list(tmp_path.iterdir())


def test_a_reduced_loss_is_refused_with_the_right_shape(custom, make_batch):
    for field, kind in (("classification", CustomClassification), ("box_loss", CustomBoxLoss)):
        detector = variant(Experiment(), detector={field: kind(f"{custom}:reduced")}).detector
        with pytest.raises(ValueError, match=r"reduced returned shape \(\)"):
            losses(detector, make_batch)


def test_an_error_in_the_users_function_is_the_users(custom, make_batch):
    detector = variant(
        Experiment(), detector={"box_loss": CustomBoxLoss(f"{custom}:faulty")}
    ).detector
    with pytest.raises(NameError, match="undefined"):
        losses(detector, make_batch)
