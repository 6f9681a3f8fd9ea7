"""What is said of a data set that is not what it seems."""

import cv2
import pytest
from test_prepare import annotation, entry, make
from tiny_experiment import prepare

from gfl_jax.data.plan import train_plan
from gfl_jax.data.sources import CocoFolder, Data, open_split
from gfl_jax.data.suspicions import suspicion
from gfl_jax.errors import InputError

BOXES = [[4.5, 5.25, 10.5, 8.0], [25.0, 2.0, 12.0, 20.5], [1.0, 1.0, 30.0, 30.0], [30, 9, 15, 20]]


def opened(root, changes=lambda box: {}, images=None):
    annotations = [
        annotation(id=i, image_id=10 * i, bbox=list(box)) | changes(box)
        for i, box in enumerate(BOXES, start=1)
    ]
    return prepare(make(root, annotations, images), root / "cache")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda box: {"iscrowd": 1}, "not trained on: 4 crowds; iscrowd 1 marks"),
        (lambda box: {"ignore": True}, "not trained on: 4 flagged `ignore`; remove"),
        (lambda box: {"area": 0}, "not trained on: 4 area 0; without the field `area`"),
        (lambda box: {"bbox": [*box[:2], 0.9, 5]}, "not trained on: 4 under 1 pixel wide or high"),
        (lambda box: {"bbox": [x / 48 for x in box]}, "between 0 and 1: .*shares of the image"),
        (lambda box: {"bbox": [0.9, 0.8, 0.4, 0.6]}, "between 0 and 1: .*shares of the image"),
        (
            lambda box: {"iscrowd": int(box[0] < 5), "area": 0},
            "of 4 images 0 have .* under 32 pixels; of 4 objects .*: 2 crowds, 2 area 0",
        ),
    ],
)
def test_if_nothing_can_be_trained_on_every_rule_says_how_much_it_leaves_out(
    tmp_path, changes, said
):
    with pytest.raises(InputError, match=said):
        train_plan(Data(), opened(tmp_path, changes), 2, 0)


def test_small_images_are_counted_apart(tmp_path):
    images = [entry(i, height=31) for i in range(1, 5)]
    raw = make(tmp_path, images=images)
    for file in raw.images.iterdir():
        cv2.imwrite(str(file), cv2.imread(str(file))[:31])
    with pytest.raises(InputError, match=r"of 4 images 4 have .* 32 pixels; of 4 .* none is left"):
        train_plan(Data(), prepare(raw, tmp_path / "cache"), 2, 0)


def corners(box):
    x, y, w, h = box
    return {"bbox": [x, y, x + w, y + h]}


def test_corners_are_told_from_sizes(tmp_path, capsys):
    assert suspicion(opened(tmp_path / "right").table) == ""
    make(tmp_path / "wrong", [annotation(id=i) | corners(b) for i, b in enumerate(BOXES)])
    files = dict.fromkeys(("train_annotations", "val_annotations"), "a.json")
    folders = dict.fromkeys(("train_images", "val_images"), "images")
    cache = str(tmp_path / "cache")
    source = CocoFolder(str(tmp_path / "wrong"), **files, **folders, cache_dir=cache)
    open_split(Data(source), "train")
    assert "warning: train: 2 of 4 boxes extend far beyond" in capsys.readouterr().out


def test_boxes_that_extend_beyond_their_image_need_not_be_corners(tmp_path):
    split = opened(tmp_path, lambda box: {"bbox": [40, box[1], 20, 10]})
    assert suspicion(split.table) == ""
