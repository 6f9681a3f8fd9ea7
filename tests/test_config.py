"""Experiments as JSON, and config files that define one experiment or the rows of a table."""

import dataclasses
import json

import pytest

from gfl_jax import systems
from gfl_jax.assign import FCOS, MaxIoU
from gfl_jax.config import (
    Experiment,
    Row,
    Train,
    TrainCommand,
    differences,
    from_dict,
    load_experiment,
    load_rows,
    parse_fields,
    to_dict,
)
from gfl_jax.detectors.box import GeneralDistribution, SmoothL1
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.quality import NoQuality, QualityBranch
from gfl_jax.models.network import Model
from gfl_jax.models.ssd import SSDModel
from gfl_jax.priors import SSDBoxes

SYSTEMS = {name: value for name, value in vars(systems).items() if isinstance(value, Experiment)}


def through_json(value):
    return json.loads(json.dumps(to_dict(value)))


# JSON.


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


# The command line.


@pytest.mark.parametrize(
    ("name", "field", "part", "expected"),
    [
        ("gfl", "detector.box.n=8", "box", GeneralDistribution(n=8)),
        ("atss", "detector.quality.measure=iou", "quality", QualityBranch("iou")),
        ("fcos", "detector.assigner.center-radius=2.5", "assigner", FCOS(center_radius=2.5)),
        ("retinanet", "detector.assigner.negative=0.3", "assigner", MaxIoU(negative=0.3)),
        ("foveabox", "detector.box-loss.beta=0.5", "box_loss", SmoothL1(0.5)),
        ("ssd512", "detector.priors.first=0.07", "priors", SSDBoxes(first=0.07)),
    ],
)
def test_fields_of_the_chosen_kind_change_on_the_command_line(name, field, part, expected):
    system = SYSTEMS[name]
    arguments = [f"--{field}", "--train.epochs=3"]
    found, _ = parse_fields(TrainCommand, system, arguments, None)
    assert found == systems.changed(system, detector={part: expected}, train={"epochs": 3})


def test_ssd_s_width_changes_on_the_command_line():
    found, _ = parse_fields(TrainCommand, systems.ssd512, ["--model.width=16"], None)
    assert found == systems.changed(systems.ssd512, model={"width": 16})


def test_fields_of_another_kind_are_no_fields(capsys):
    with pytest.raises(SystemExit):
        parse_fields(TrainCommand, systems.ssd512, ["--model.backbone.depth=18"], None)
    assert "--model.backbone.depth" in "".join(capsys.readouterr())


# Files.

EXPERIMENT = """
from gfl_jax.config import Experiment, Train
experiment = Experiment(train=Train(epochs=3))
"""
ROWS = """
from gfl_jax.config import Experiment, Row, Train
rows = {
    "short": Row("A short one", Experiment(train=Train(epochs=3)), (38.0, 56.5)),
    "long-0.5": Row("A long one", Experiment(train=Train(epochs=30))),
}
"""


def written(folder, text, name="table.py"):
    (folder / name).write_text(text)
    return folder / name


def test_a_row_of_a_table_is_named_after_the_file(tmp_path):
    file = written(tmp_path, ROWS)
    for row, epochs in (("short", 3), ("long-0.5", 30)):
        expected = Experiment(train=Train(epochs=epochs))
        assert load_experiment(f"{file}:{row}") == expected
        assert load_rows(file)[row].experiment == expected
    assert load_rows(file)["short"] == Row(
        "A short one", Experiment(train=Train(epochs=3)), (38.0, 56.5)
    )


@pytest.mark.parametrize("row", ["", ":long", ":Short"])
def test_a_table_without_that_row_names_those_there_are(tmp_path, row):
    file = written(tmp_path, ROWS)
    with pytest.raises(ValueError, match=r"table\.py has the rows short, long-0\.5") as error:
        load_experiment(f"{file}{row}")
    assert repr(row.removeprefix(":")) in str(error.value)


def test_a_row_of_a_file_without_rows_is_an_error(tmp_path):
    file = written(tmp_path, EXPERIMENT)
    assert load_experiment(file) == Experiment(train=Train(epochs=3))
    with pytest.raises(ValueError, match=r"table\.py has the rows \(none\)"):
        load_experiment(f"{file}:short")


def test_a_file_may_have_an_experiment_and_rows(tmp_path):
    file = written(tmp_path, ROWS + EXPERIMENT.replace("epochs=3", "epochs=4"))
    assert load_experiment(file).train.epochs == 4
    assert load_experiment(f"{file}:short").train.epochs == 3


@pytest.mark.parametrize("row", ["", ":short"])
def test_a_file_that_is_not_there_is_named(tmp_path, row):
    with pytest.raises(FileNotFoundError, match=r"no config file .*none\.py; there are"):
        load_experiment(f"{tmp_path / 'none.py'}{row}")


@pytest.mark.parametrize("text", ["", "rows = {}", "rows = {'a': 1}", EXPERIMENT])
def test_rows_that_are_none_are_an_error(tmp_path, text):
    with pytest.raises(ValueError, match=r"table\.py must define `rows`"):
        load_rows(written(tmp_path, text))


def test_every_field_of_a_system_can_be_replaced_without_changing_the_others():
    changed = systems.changed(systems.fcos, train={"epochs": 3}, data={"flip": 0.0})
    assert changed.train == dataclasses.replace(systems.fcos.train, epochs=3)
    assert changed.data == dataclasses.replace(systems.fcos.data, flip=0.0)
    assert (changed.model, changed.detector) == (systems.fcos.model, systems.fcos.detector)


def test_differences_name_every_field_that_changed():
    old = to_dict(systems.gfl)
    assert differences(old, old) == []
    new = to_dict(systems.changed(systems.gfl, train={"lr": 0.02, "milestones": (3,)}))
    assert differences(old, new) == [
        "train.lr: 0.01, now 0.02",
        "train.milestones: [8, 11], now [3]",
    ]
    new = to_dict(systems.changed(systems.gfl, detector={"quality": NoQuality()}))
    assert differences(old, new) == ["detector.quality: JointQuality, now NoQuality"]
