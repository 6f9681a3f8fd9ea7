"""`prepare`: from a folder in any form to one that can be trained on, and what it says."""

import re
from pathlib import Path

import forms_written as written
import numpy as np
import pytest
from PIL import Image
from tiny_experiment import prepare as prepared

from gfl_jax.__main__ import main
from gfl_jax.cli import load_experiment, parse_command
from gfl_jax.config import Experiment
from gfl_jax.data.plan import train_plan
from gfl_jax.data.prepare import RawSplit
from gfl_jax.data.sources import Data, Prepared
from gfl_jax.errors import InputError
from gfl_jax.systems import variant
from gfl_jax.tools.findings import _scale, description, positives, suggestions
from gfl_jax.train import TrainCommand
from gfl_jax.training.start import with_warmup_that_ends
from gfl_jax.visualize import _showing_all_classes


def run(capsys, *arguments):
    """Status, output and errors of the command."""
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *map(str, arguments)])
    return stop.value.code or 0, *capsys.readouterr()


def split_of(root, images, classes=written.CLASSES):
    """A prepared split of {name: (height, width, [(class, x1, y1, x2, y2)])}."""
    written.photos(root / "photos", images)
    content = {
        "images": [
            {"id": i, "file_name": name, "height": size[0], "width": size[1]}
            for i, (name, size) in enumerate(images.items())
        ],
        "annotations": [
            {"image_id": i, "category_id": classes.index(c), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for i, (_, _, objects) in enumerate(images.values())
            for c, x1, y1, x2, y2 in objects
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
    }
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = number
    (root / "made.json").write_text("{}")
    return prepared(RawSplit(root / "made.json", root / "photos", read=content), root / "cache")


@pytest.mark.parametrize("form", written.WRITERS)
def test_any_form_can_be_prepared_and_trained_on(tmp_path, capsys, form):
    images = written.random_set(3)
    written.WRITERS[form](tmp_path / "src", images)
    made = tmp_path / "made"
    status, said, _ = run(capsys, tmp_path / "src", made, "--config", "gfl_r18_fpn_shapes")
    assert status == 0
    found = {}
    for name in ("train", "val"):
        split = Prepared(str(made)).open(name)
        for record in split.source:
            boxes = zip(record["labels"], record["boxes"], strict=True)
            entry = [(split.category_names[label], *map(float, box)) for label, box in boxes]
            found[record["filename"].replace("\\", "/").rpartition("/")[2]] = entry
        picture = np.asarray(Image.open(made / f"ground_truth_{name}.png"))
        assert picture.std() > 10
        assert str(made / f"ground_truth_{name}.png") in said
    assert found.keys() == images.keys()
    for name, (_, _, objects) in images.items():
        assert [o[0] for o in found[name]] == [o[0] for o in objects]
        np.testing.assert_allclose(
            np.reshape([o[1:] for o in found[name]], (-1, 4)),
            np.reshape([o[1:] for o in objects], (-1, 4)),
            atol=1e-4,
        )
    for label in written.CLASSES:
        assert re.search(rf"^  {label} +\d+ +\d+$", said, re.M)
    flags = re.search(r"^  gfl-jax train (.*)$", said, re.M)[1].split()
    default = TrainCommand(flags[0], load_experiment(flags[0]))
    command = parse_command(default, flags, "gfl-jax train", None)
    plan = train_plan(command.experiment.data, command.experiment.data.source.open("train"), 8, 0)
    assert plan(0).images.shape == (8,)


def test_faults_end_with_status_1_and_name_file_and_line(tmp_path, capsys):
    written.yolo(tmp_path / "src", written.random_set(3))
    labels = next((tmp_path / "src" / "labels").rglob("*.txt"))
    labels.write_text("0 0.5 0.5 0.1 0.1\nx\n")
    status, _, errors = run(capsys, tmp_path / "src", tmp_path / "made")
    assert status == 1
    assert f"labels/all/{labels.name}, line 2: 'x' is no number" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "made").exists()
    rest = "--config", "gfl_r18_fpn_shapes", "--on-error", "skip"
    status, said, _ = run(capsys, tmp_path / "src", tmp_path / "made", *rest)
    assert status == 0
    assert re.search(r"problem: bad line +1$", said, re.M)
    assert run(capsys, tmp_path / "gone", tmp_path / "other")[0] == 1
    assert run(capsys, tmp_path / "src", tmp_path / "made", "--form", "tfrecord")[0] == 2


def test_a_complete_folder_of_other_annotations_is_not_taken_for_these(tmp_path, capsys):
    written.yolo(tmp_path / "src", written.random_set(3))
    arguments = tmp_path / "src", tmp_path / "made", "--config", "gfl_r18_fpn_shapes"
    assert run(capsys, *arguments)[0] == 0
    status, said, _ = run(capsys, *arguments)
    assert status == 0
    assert "is complete: nothing to do" in said and "suggestions for" in said
    labels = next((tmp_path / "src" / "labels").rglob("*.txt"))
    labels.write_text("0 0.5 0.5 0.125 0.125\n")
    for changed in (arguments, (*arguments, "--val-share", "0.6")):
        status, _, errors = run(capsys, *changed)
        assert status == 1
        assert "was made from other annotations or lists of images" in errors
    status, said, _ = run(capsys, *arguments, "--overwrite", "--on-error", "skip")
    assert status == 0
    assert str(tmp_path / "made" / "train" / "report.json") in said


def test_where_nothing_can_be_trained_on_no_command_is_suggested(tmp_path, capsys):
    images = {f"{n}.jpg": (48, 64, []) for n in "abc"}
    written.cvat(tmp_path / "src", images)
    status, said, _ = run(capsys, tmp_path / "src", tmp_path / "made")
    assert status == 0
    assert "warning: no image can be trained on: of " in said
    assert "gfl-jax train" not in said


def test_a_description_counts_what_is_there(tmp_path):
    images = {
        "a.jpg": (100, 200, [("no", 0.0, 0.0, 20.0, 20.0), ("no", 0.0, 0.0, 40.0, 40.0)]),
        "b.jpg": (100, 200, [("été", -50.0, 0.0, 100.0, 100.0)]),
        "c.jpg": (60, 50, []),
    }
    said = description(split_of(tmp_path, images))
    assert "images of 200 x 100 pixels (median; 2 sizes, the longest side 200)" in said
    assert "objects per image: 1.0 on average, 2 at most; 1 images have none" in said
    assert "sizes: 33% small (under 32 x 32 pixels), 33% medium, 33% large" in said
    assert "40 pixels in the middle" in said
    assert "covers 8.0% of its image" in said
    assert "1 boxes reach beyond their image" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["no", "2", "1"] in lines
    assert ["été", "1", "1"] in lines
    assert "no objects of: traffic light, 日本語, 007" in said


def test_of_many_classes_the_ends_are_listed(tmp_path):
    classes = [f"c{i:02}" for i in range(70)]
    objects = [(c, 1.0, 1.0, 20.0, 20.0) for i, c in enumerate(classes[:60]) for _ in range(61 - i)]
    said = description(split_of(tmp_path, {"a.jpg": (64, 64, objects)}, classes))
    listed = re.findall(r"^  (c\d\d) ", said, re.M)
    assert listed == [*classes[:15], *classes[45:60]]
    assert "... 30 more" in said
    assert said.endswith(f"no objects of: {', '.join(classes[60:])}")


def squares(side, count=3, size=(480, 640)):
    """Eight images with squares of a side, in pixels, apart from each other."""
    step = max(side + 4, 12)
    objects = [("no", 8.0 + step * k, 9.0, 8.0 + step * k + side, 9.0 + side) for k in range(count)]
    return {f"{i}.png": (*size, objects) for i in range(8)}


def flags(experiment, split):
    return " ".join(s.flag for s in suggestions(experiment, split) if s.flag)


LONG = {"epochs": 600, "milestones": (400, 500), "warmup_steps": 10, "batch_size": 4}


def with_scale(*scale, **train):
    base = Experiment()
    return variant(base, data={"scale": scale}, train=LONG | train)


@pytest.mark.parametrize(
    ("side", "scale", "flag"),
    [
        (100, (1333, 800), "--data.scale 640 480"),  # enlarging large objects is for nothing
        (20, (1333, 800), ""),  # enlarging small ones is not
        (6, (640, 480), "--data.scale 1280 960"),  # no more than twice
        (12, (640, 480), "--data.scale 864 640"),
        (40, (640, 480), ""),
    ],
)
def test_a_scale_is_suggested_by_the_smallest_objects(tmp_path, side, scale, flag):
    found = _scale(with_scale(*scale), split_of(tmp_path, squares(side)))
    assert found.suggestion.flag == flag
    assert flag in ("", f"--data.scale {found.scale[0]} {found.scale[1]}")


def test_a_scale_that_is_more_than_one_number_is_left_alone(tmp_path):
    split = split_of(tmp_path, squares(100))
    base = with_scale(1333, 800)
    for data in ({"multi_scale": (480, 800)}, {"canvases": ((800, 1344),)}):
        assert _scale(variant(base, data=data), split).suggestion.flag == ""


def test_objects_without_positives_are_counted(tmp_path):
    """Squares of 3 pixels hold no centre of a cell, all of which lie at multiples of 8."""
    experiment = with_scale(320, 320)
    images = {"a.jpg": (320, 320, [("no", 17.0, 17.0, 20.0, 20.0), ("no", 99.0, 99, 199.0, 199)])}
    split = split_of(tmp_path, images)
    counts = positives(experiment, split, experiment.data)
    assert counts[0] == 0
    assert counts[1] > 0
    fixed = variant(experiment, data={"canvases": ((320, 320),)})
    (said,) = [s.reason for s in suggestions(fixed, split) if "positives" in s.reason]
    assert "50.0% of 2 objects at 320 x 320" in said
    assert "the others are not learned" in said


@pytest.mark.parametrize(("count", "flag"), [(100, ""), (101, "150"), (150, "150"), (151, "200")])
def test_as_many_detections_as_objects(tmp_path, count, flag):
    side = [("no", 40.0, 40.0, 140.0, 140.0)] * count
    split = split_of(tmp_path, {"a.jpg": (480, 640, side)})
    said = flags(with_scale(640, 480, epochs=900), split)
    assert said == (flag and f"--detector.inference.max-per-image {flag}")


def test_a_schedule_is_long_enough_and_its_warmup_ends(tmp_path, capsys):
    split = split_of(tmp_path, squares(40))  # 8 images: 2 steps an epoch
    short = with_scale(640, 480, epochs=12, milestones=(8, 11), warmup_steps=500)
    said = flags(short, split)
    assert said == ("--train.epochs 400 --train.milestones 267 367 --train.warmup-steps 53")
    default = TrainCommand("gfl_r50_fpn_1x_coco", short)
    arguments = ["gfl_r50_fpn_1x_coco", *said.split()]
    train = parse_command(default, arguments, "gfl-jax train", None).experiment.train
    assert (train.epochs, train.milestones, train.warmup_steps) == (400, (267, 367), 53)
    assert with_warmup_that_ends(train, 2) == train
    assert capsys.readouterr().out == ""


def test_suggestions_need_something_to_train_on(tmp_path):
    split = split_of(tmp_path, {"a.jpg": (48, 64, [])})
    with pytest.raises(InputError, match="no image can be trained on"):
        suggestions(Experiment(data=Data()), split)


def test_every_class_is_on_the_sheet_as_far_as_it_goes(tmp_path):
    images = {f"{i}.png": (48, 64, [("no", 1.0, 1.0, 30.0, 30.0)]) for i in range(40)}
    for name, label in (("7.png", "été"), ("23.png", "007")):
        images[name] = (48, 64, [(label, 1.0, 1.0, 30.0, 30.0)])
    split = split_of(tmp_path, images)
    for count in (2, 3, 12):
        shown = _showing_all_classes(split, count)
        assert len(shown) == len(set(shown)) == count
        assert {7, 23} <= set(shown)
    assert _showing_all_classes(split, 100) == list(range(40))


PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def commands_in_docs():
    """(form, command) of each `gfl-jax prepare` line in the page's sections."""
    sections = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.M)
    return [
        (section.partition("\n")[0], line.strip())
        for section in sections
        for line in re.findall(r"^    (gfl-jax prepare .*)$", section, re.M)
    ]


def test_the_page_has_a_command_for_each_form():
    forms = {form.split(",")[0] for form in written.WRITERS}
    assert forms <= {form for form, _ in commands_in_docs()}


@pytest.mark.parametrize(("section", "command"), commands_in_docs())
def test_commands_of_the_page_run(tmp_path, capsys, monkeypatch, section, command):
    monkeypatch.chdir(tmp_path)
    _, _, source, *flags = command.split()
    lists = section == "Training and evaluation"
    form = section if section in written.WRITERS else "Pascal VOC" if lists else "COCO"
    images = written.random_set(4)
    written.WRITERS[form](tmp_path / source, images)
    stems = [name.rpartition(".")[0] for name in images]
    if lists:
        sets = tmp_path / source / "ImageSets" / "Main"
        sets.mkdir(parents=True)
        (sets / "trainval.txt").write_text("\n".join(stems[:2]), "utf-8")
        (sets / "test.txt").write_text("\n".join(stems[2:]), "utf-8")
    if "--train-annotations" in flags:
        (tmp_path / source / "images").rename(tmp_path / source / "photos")
        text = (tmp_path / source / "result.json").read_text().replace("images\\\\", "")
        for name in ("train.json", "val.json"):
            (tmp_path / source / name).write_text(text)
    status, said, errors = run(capsys, source, *flags, "--config", "gfl_r18_fpn_shapes")
    assert status == 0, errors
    assert "train with --data.prepared DST" in said
    assert len(Prepared("DST").open("train").source) >= 1
