"""The measures of ambiguity where the answer is known, and both claims drawn for a run."""

import json
from pathlib import Path

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

from gfl_jax import run as run_module
from gfl_jax.config import Data, Experiment, Train
from gfl_jax.data.sources import Shapes, open_split
from gfl_jax.detectors.box import Deltas, Gaussian, GeneralDistribution
from gfl_jax.run import Run, load
from gfl_jax.systems import variant
from gfl_jax.tools import ambiguity, consistency, tables
from gfl_jax.tools.ambiguity import opposites, sides_of
from gfl_jax.tools.candidates import Candidates, Objects, objects_of


def two_bins(mean, extra=0.0):
    """Logits of a distribution over bins next to `mean`, a share `extra` of it three bins away."""
    p = np.full(17, 1e-12)
    low = int(mean)
    p[low], p[low + 1] = (1 - extra) * (low + 1 - mean), (1 - extra) * (mean - low) + 1e-12
    p[low + 3] += extra / 2
    p[low - 2] += extra / 2
    return np.log(p)


def run_of(box, candidates, objects, monkeypatch):
    monkeypatch.setattr(ambiguity, "best_candidates", lambda *_: iter(candidates))
    monkeypatch.setattr(ambiguity, "objects_of", lambda _: objects)
    experiment = variant(Experiment(), detector={"box": box})
    return Run(Path(), 0, experiment, [], [], None, None), None


def test_spread_and_excess_are_those_of_the_best_candidate_of_each_object(monkeypatch):
    box = GeneralDistribution()
    sharp = np.stack([two_bins(m) for m in (3.25, 4.5, 5.0, 2.75)])
    wide = np.stack([two_bins(m, 0.4) for m in (3.25, 4.5, 5.0, 2.75)])
    target = np.array([10.0, 20.0, 50.0, 70.0])
    boxes = np.array([[10.5, 20, 50, 69], [11, 20, 50, 70], [100, 100, 120, 120]], float)
    candidates = Candidates(
        boxes,
        np.array([0.9, 0.8, 0.7]),
        np.array([1, 0, 1]),
        np.stack([wide, sharp, sharp]).reshape(3, -1),
        np.array([[8, 16, 8, 16], [8, 8, 8, 8], [8, 8, 8, 8]], float),
        np.full((3, 4), 30.0),
    )
    ambiguity = np.array([0.0, 1.0, 2.0, 3.0])
    objects = {
        7: Objects(
            np.stack([target, target + 300]),
            np.array([1, 1]),
            np.tile(ambiguity, (2, 1)),
            np.stack([target + 1, target]),
        )
    }
    sides = sides_of(*run_of(box, [(7, candidates)], objects, monkeypatch))
    np.testing.assert_array_equal(sides.ambiguity, [ambiguity])  # the other object is not detected
    p = np.exp(wide)
    mean = (p * np.arange(17)).sum(1)
    variance = (p * np.arange(17) ** 2).sum(1) - mean**2
    np.testing.assert_allclose(sides.spread[0], np.sqrt(variance) * [8, 16, 8, 16], rtol=1e-3)
    between = (mean - np.floor(mean)) * (np.ceil(mean) - mean)
    excess = np.sqrt(variance - between) * [8, 16, 8, 16]
    np.testing.assert_allclose(sides.excess[0], excess, rtol=1e-3)
    # The ideal: labels drawn around the nominal side, each two bins.
    rng, drawn = np.random.default_rng(0), []
    for side, stride, sigma in zip(target + 1, [8, 16, 8, 16], ambiguity, strict=True):
        bins = (abs(side - 30) + sigma * rng.normal(size=200_000)) / stride
        low = np.floor(bins)
        drawn.append(stride * (low + (rng.random(len(low)) < bins - low)).std())
    np.testing.assert_allclose(sides.ideal_spread[0], drawn, rtol=0.02)
    assert (sides.ideal_excess[0, :2] == 0).all()  # a pixel within a bin of 16 cannot be seen
    assert (sides.ideal_excess[0, 2:] > 0).all()
    np.testing.assert_array_equal(sides.error, [[0.5, 0, 0, 1]])


def test_what_dfl_makes_of_a_clear_side_has_no_excess(monkeypatch):
    raw = np.stack([two_bins(m) for m in (3.25, 4.5, 5.0, 2.75)]).reshape(-1)
    candidates = Candidates(
        np.array([[0.0, 0.0, 9.0, 9.0]]),
        np.array([0.9]),
        np.array([0]),
        jnp.asarray(raw[None], jnp.float32),
        np.full((1, 4), 8.0),
        np.full((1, 4), 4.5),
    )
    box = np.array([[0.0, 0.0, 9.0, 9.0]])
    objects = {1: Objects(box, np.array([0]), np.zeros((1, 4)), box)}
    sides = sides_of(*run_of(GeneralDistribution(), [(1, candidates)], objects, monkeypatch))
    assert (sides.spread[0, [0, 1, 3]] > 3).all()
    np.testing.assert_allclose(sides.excess, 0, atol=0.05)


def test_a_gaussian_says_its_spread(monkeypatch):
    raw = np.concatenate([np.full(4, 2.0), np.log([0.25, 1.0, 4.0, 9.0])])
    candidates = Candidates(
        np.array([[0.0, 0.0, 9.0, 9.0]]),
        np.array([0.9]),
        np.array([0]),
        raw[None],
        np.full((1, 4), 8.0),
        np.full((1, 4), 4.5),
    )
    box = np.array([[0.0, 0.0, 9.0, 9.0]])
    objects = {1: Objects(box, np.array([0]), np.zeros((1, 4)), box)}
    sides = sides_of(*run_of(Gaussian(), [(1, candidates)], objects, monkeypatch))
    np.testing.assert_allclose(sides.spread[0], [4, 8, 16, 24], rtol=1e-5)


def test_opposite_sides_are_compared_where_one_of_them_is_blurred():
    ambiguity = np.array([[2, 0, 0, 0], [0, 0, 3, 0], [1, 0, 2, 0], [0, 1, 0, 0]], float)
    spread = np.array([[5, 9, 4, 1], [5, 0, 6, 7], [0, 0, 9, 9], [0, 3, 0, 4]], float)
    # left > right, right > left, (both blurred), top < bottom
    of, larger = opposites(ambiguity, spread)
    np.testing.assert_array_equal(of, [2, 3, 1])
    np.testing.assert_array_equal(larger, [True, True, False])
    of, larger = opposites(np.zeros((2, 4)), spread[:2])
    assert of.size == larger.size == 0


def test_boxes_without_a_spread_and_data_without_ambiguity_are_named(monkeypatch):
    with pytest.raises(ValueError, match="Deltas"):
        sides_of(*run_of(Deltas(), [], {}, monkeypatch))
    unknown = np.full((1, 4), np.nan)
    objects = {1: Objects(np.zeros((1, 4)), np.zeros(1, int), unknown, unknown)}
    with pytest.raises(ValueError, match="ambiguity"):
        sides_of(*run_of(GeneralDistribution(), [], objects, monkeypatch))


def test_a_run_is_drawn_with_its_numbers(tmp_path, linear_network, monkeypatch, capsys):
    monkeypatch.setattr(tables, "Network", linear_network)
    monkeypatch.setattr(run_module, "Network", linear_network)
    shapes = Shapes(12, 9, image_size=(64, 64), cache_dir=str(tmp_path / "cache"))
    data = Data(shapes, scale=(64, 64), workers=0)
    train = Train(batch_size=8, lr=0.02, epochs=1, milestones=(), warmup_steps=2)
    tables.train_row(Experiment(data=data, train=train), tmp_path / "run")
    consistency.main((tmp_path / "run",), ("linear",), count=20, out=tmp_path / "c.png")
    numbers = json.loads((tmp_path / "c.json").read_text())["linear"]
    assert set(numbers) == {
        f"{split}, {what}"
        for split in ("val", "train")
        for what in ("all", "on an object", "share on an object")
    }
    assert -1 <= numbers["val, all"] <= 1
    assert 0 <= numbers["val, share on an object"] < 0.5
    assert len(np.unique(cv2.imread(str(tmp_path / "c.png")).reshape(-1, 3), axis=0)) > 20

    # So small a network detects nothing; pretend that it detected each object exactly.
    with pytest.raises(ValueError, match="no detection reaches"):
        ambiguity.main(tmp_path / "run", out=tmp_path / "a.png")
    run = load(tmp_path / "run")
    by_id = objects_of(open_split(run.experiment.data, "val"))
    rng = np.random.default_rng(0)

    def perfect(*_):
        for image_id, objects in by_id.items():
            n = len(objects.boxes)
            raw = rng.normal(size=(n, 4 * 17)).astype(np.float32)
            yield (
                image_id,
                Candidates(
                    objects.boxes,
                    np.ones(n),
                    objects.labels,
                    raw,
                    np.full((n, 4), 8.0),
                    np.tile(objects.boxes.reshape(n, 2, 2).mean(1), 2),
                ),
            )

    monkeypatch.setattr(ambiguity, "best_candidates", perfect)
    ambiguity.main(tmp_path / "run", out=tmp_path / "a.png")
    numbers = json.loads((tmp_path / "a.json").read_text())
    hidden = [np.isnan(objects.ambiguity).any(1) for objects in by_id.values()]
    assert numbers["sides"] == 4 * np.sum(~np.concatenate(hidden))
    assert np.concatenate(hidden).any(), "what hides a side makes it unclear by an unknown amount"
    assert 0 < numbers["blurred sides"] < numbers["sides"]
    assert 0 < numbers["pairs of a blurred and a sharp side"] <= numbers["blurred sides"]
    assert numbers["error: median of blurred sides, px"] == 0, "they were detected exactly"
    for name in ("a.png", "a-examples.png"):
        picture = cv2.imread(str(tmp_path / name))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
