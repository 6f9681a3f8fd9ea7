"""Intervals of sides that hold what they promise."""

import json

import numpy as np
import pytest

import gfl_jax
from gfl_jax.__main__ import main as front_door
from gfl_jax.config import Data, Experiment
from gfl_jax.data.sources import Shapes
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.dirac import Distances
from gfl_jax.detectors.inference import Inference
from gfl_jax.detectors.sides import Sides, interval, sharpened
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.run import CALIBRATION, describe
from gfl_jax.tools.calibrate import Matched, coverage, fitted_temperature
from gfl_jax.training.checkpoint import Checkpoints

INFERENCE = Inference(score_threshold=0.0, nms_pre=60, max_per_image=50)


def bells(stated, true=3.0, count=4000, seed=0):
    """Sides stated as bells of a standard deviation; the truth has another."""
    rng = np.random.default_rng(seed)
    center = rng.uniform(50, 100, (count, 4, 1))
    steps = np.linspace(-8, 8, 161)
    weights = np.exp(-0.5 * (steps * true / stated) ** 2)
    positions = center + true * steps
    probabilities = np.broadcast_to(weights / weights.sum(), positions.shape)
    truth = center[..., 0] + rng.normal(0, true, (count, 4))
    return Matched(np.arange(count), truth, Sides(positions, probabilities))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
def test_distributions_that_are_true_hold_their_share(share):
    assert coverage(bells(stated=3.0), share) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("stated", [1.5, 3.0, 6.0])
def test_the_temperature_undoes_a_wrong_width(stated):
    matched = bells(stated)
    temperature = fitted_temperature(matched)
    # A temperature multiplies the variance of a bell.
    assert temperature == pytest.approx((3.0 / stated) ** 2, rel=0.05)
    for share in (0.5, 0.8, 0.95):
        assert coverage(matched, share, temperature) == pytest.approx(share, abs=0.015)


def saved(folder, box=None):
    """A work directory of a detector with random weights on a tiny `shapes`."""
    source = Shapes(num_train=2, num_val=8, image_size=(64, 64), cache_dir=str(folder / "cache"))
    detector = Detector(inference=INFERENCE, **({"box": box} if box else {}))
    experiment = Experiment(
        model=Model(
            Backbone(depth=18, width=8, norm="bn", frozen_stages=-1),
            Neck(32),
            Head(width=32, stacked_convs=1),
        ),
        detector=detector,
        data=Data(source=source, scale=(64, 64)),
    )
    network = Network(experiment.model, detector.predicts(6))
    weights = network.init(0)
    rng = np.random.default_rng(1)
    for name, array in weights.params.items():
        if name.startswith("bbox_head"):
            noise = 0.3 * rng.normal(size=array.shape)
            weights.params[name] = np.asarray(array + noise, np.float32)
    names = ["ellipse", "rectangle", "triangle", "star", "ring", "cross"]
    with Checkpoints(folder / "run" / "checkpoints") as checkpoints:
        about = describe(experiment, [1, 2, 3, 4, 5, 6], names)
        checkpoints.save(5, {"weights": weights}, about)
    return folder / "run"


def calibrate(*arguments):
    with pytest.raises(SystemExit) as ended:
        front_door(["calibrate", *map(str, arguments)])
    return ended.value.code or 0


@pytest.mark.slow
def test_the_temperature_is_kept_and_used(tmp_path, capsys, monkeypatch):
    run = saved(tmp_path)
    # Boxes of random weights are nowhere near.
    assert calibrate(run, "--iou", 0.1) == 1
    assert "no temperature makes the intervals of 90%" in capsys.readouterr().err
    monkeypatch.setattr("gfl_jax.tools.calibrate.fitted_temperature", lambda *_: 2.0)
    assert calibrate(run, "--iou", 0.1) == 0
    said = capsys.readouterr().out
    assert "temperature 2.000" in said and "90%" in said
    temperature = json.loads((run / CALIBRATION).read_text())["temperature"]
    assert temperature == 2

    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    used = gfl_jax.load(run)
    assert used.temperature == temperature
    assert gfl_jax.load(run / "checkpoints").temperature == temperature
    found = used(image, distributions=True).interval()
    (run / CALIBRATION).unlink()
    plain = gfl_jax.load(run)(image, distributions=True)
    # The boxes stay what they are; the distributions do not.
    np.testing.assert_allclose(plain.boxes, used(image).boxes, atol=1e-4)
    np.testing.assert_allclose(found, interval(sharpened(plain.sides, 2.0), 0.9), atol=1e-2)
    assert np.abs(np.subtract(found, plain.interval())).max() > 1


def test_a_temperature_of_other_weights_is_not_used(tmp_path):
    run = saved(tmp_path)
    (run / CALIBRATION).write_text('{"temperature": 3.0, "share": 0.9, "step": 4}')
    with pytest.warns(UserWarning, match=r"is for step 4, the weights are of step 5"):
        assert gfl_jax.load(run).temperature == 1.0
    (run / CALIBRATION).write_text('{"temperature": 3.0}')
    with pytest.raises(ValueError, match=r"calibration\.json is damaged, delete it"):
        gfl_jax.load(run)


def test_boxes_of_four_numbers_have_nothing_to_calibrate(tmp_path, capsys):
    run = saved(tmp_path, box=Distances())
    assert calibrate(run, "--iou", 0.05) == 1
    assert "no distributions to calibrate" in capsys.readouterr().err
    assert calibrate(run, "--share", 90) == 2
