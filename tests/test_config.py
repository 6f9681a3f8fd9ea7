"""Experiments as values and as JSON."""

import dataclasses
import json

import pytest

from gfl_jax import systems
from gfl_jax.config import Experiment, differences, from_dict, to_dict
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.quality import NoQuality
from gfl_jax.models.network import Model
from gfl_jax.models.ssd import SSDModel

SYSTEMS = {name: value for name, value in vars(systems).items() if isinstance(value, Experiment)}


def through_json(value):
    return json.loads(json.dumps(to_dict(value)))


def test_these_are_the_systems_of_the_paper():
    assert SYSTEMS.keys() >= {
        "gfl",
        "atss",
        "fcos",
        "fcos_center",
        "fcos_improved",
        "retinanet",
        "foveabox",
        "ssd512",
    }


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_survives_json(name):
    found = from_dict(Experiment, through_json(SYSTEMS[name]))
    assert found == SYSTEMS[name]
    assert hash(found) == hash(SYSTEMS[name])  # tuples are tuples again
    for part in ("priors", "assigner", "box", "quality", "classification", "box_loss"):
        ours, theirs = (getattr(e.detector, part) for e in (found, SYSTEMS[name]))
        assert type(ours) is type(theirs)


def test_json_names_the_kind_of_every_choice():
    written = through_json(systems.ssd512)
    assert written["kind"] == "Experiment"
    assert written["model"]["kind"] == "SSDModel"
    kinds = {part: written["detector"][part]["kind"] for part in ("priors", "assigner", "box")}
    assert kinds == {"priors": "SSDBoxes", "assigner": "MaxIoU", "box": "Deltas"}


def test_a_choice_between_kinds_takes_the_named_one():
    for model in (Model(), SSDModel(width=4)):
        assert from_dict(Model | SSDModel, through_json(model)) == model
    found = from_dict(Model | SSDModel, {"kind": "SSDModel", "mean": [1.0, 2.0, 3.0]})
    assert found == SSDModel(mean=(1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "ResNet"}, "'ResNet' is not a kind of Model, SSDModel"),
        ({}, "None is not a kind of Model, SSDModel"),
        ({"kind": "SSDModel", "backbone": None, "depth": 50}, "SSDModel has no field backbone, "),
    ],
)
def test_what_no_config_value_has_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Model | SSDModel, value)


def test_a_choice_of_another_part_is_named():
    written = through_json(Detector())
    written["box"] = written["quality"]
    with pytest.raises(ValueError, match="'JointQuality' is not a kind of GeneralDistribution, "):
        from_dict(Detector, written)


def test_every_field_of_a_system_can_be_replaced_without_changing_the_others():
    changed = systems.variant(systems.fcos, train={"epochs": 3}, data={"flip": 0.0})
    assert changed.train == dataclasses.replace(systems.fcos.train, epochs=3)
    assert changed.data == dataclasses.replace(systems.fcos.data, flip=0.0)
    assert (changed.model, changed.detector) == (systems.fcos.model, systems.fcos.detector)


def test_differences_name_every_field_that_changed():
    old = to_dict(systems.gfl)
    assert differences(old, old) == []
    new = to_dict(systems.variant(systems.gfl, train={"lr": 0.02, "milestones": (3,)}))
    assert differences(old, new) == [
        "train.lr: 0.01, now 0.02",
        "train.milestones: [8, 11], now [3]",
    ]
    new = to_dict(systems.variant(systems.gfl, detector={"quality": NoQuality()}))
    assert differences(old, new) == ["detector.quality: JointQuality, now NoQuality"]
