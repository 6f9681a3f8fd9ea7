import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
from tiny_experiment import prepare

from gfl_jax.data.prepare import RawSplit
from gfl_jax.errors import MissingExtraError
from gfl_jax.visualize import contact_sheet, finish, new_figure, plot_run, save_figure

SIZES = {1: (60, 60), 2: (60, 60), 3: (60, 40), 4: (30, 60), 5: (60, 60)}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Grey images; the last one has no object, the first one a crowd."""
    root = tmp_path_factory.mktemp("report")
    (root / "images").mkdir()
    images, annotations = [], []
    for i, (height, width) in SIZES.items():
        cv2.imwrite(str(root / "images" / f"{i}.png"), np.full((height, width, 3), 128, np.uint8))
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        if i != 5:
            box = {"bbox": [5.0, 6.0, 20.0, 18.0], "area": 360.0}
            annotations.append({"id": i, "image_id": i, "category_id": 4 + i % 2, **box})
    crowd = {"bbox": [30.0, 30.0, 20.0, 20.0], "area": 400.0, "iscrowd": 1}
    annotations.append({"id": 9, "image_id": 1, "category_id": 4, **crowd})
    categories = [{"id": 4, "name": "cat"}, {"id": 5, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "a.json").write_text(json.dumps(content))
    return prepare(RawSplit(root / "a.json", root / "images"), root / "cache")


def results_of(split, score=0.9):
    box = {"bbox": [22.0, 8.0, 15.0, 20.0], "score": score, "category_id": 5}
    return [{"image_id": int(image_id), **box} for image_id in split.image_ids]


def sheet(file, split, results, **options):
    contact_sheet(file, split, results, **options)
    image = cv2.imread(str(file))
    assert image is not None
    return image


def test_a_sheet_has_a_tile_for_each_image_in_rows_of_three(tmp_path, split):
    # A tile: a caption of 22 rows above two images with 4 pixels between; 8 and 12 around it.
    pair = (22 + 100 + 8, 100 + 4 + 100 + 12)
    for count, (rows, columns) in {1: (1, 1), 2: (2, 1), 3: (1, 3), 4: (2, 3)}.items():
        image = sheet(tmp_path / "s.png", split, results_of(split), count=count, tile=100)
        assert image.shape == (rows * pair[0], columns * pair[1], 3)


def test_truth_is_drawn_left_and_detections_right(tmp_path, split):
    drawn = sheet(tmp_path / "a.png", split, results_of(split), count=1, tile=120)
    weak = sheet(tmp_path / "b.png", split, results_of(split, score=0.1), count=1, tile=120)
    below_caption, left, right = slice(22, 142), slice(0, 120), slice(124, 244)
    np.testing.assert_array_equal(drawn[below_caption, left], weak[below_caption, left])
    assert (weak[below_caption, right] == 128).all(), "weak detections are not drawn"
    # The outlines: the true box at twice its size on the left, the detection on the right.
    assert (drawn[22 + 30 : 22 + 40, 10] != 128).any(-1).all()
    assert (drawn[22 + 30 : 22 + 40, 124 + 44] != 128).any(-1).all()
    assert (drawn[below_caption, right] != drawn[below_caption, left]).any()


def test_classes_have_colours_of_their_own(tmp_path, split):
    dogs = results_of(split)
    cats = [result | {"category_id": 4} for result in dogs]
    images = [sheet(tmp_path / "c.png", split, r, count=1, tile=120) for r in (dogs, cats)]
    edges = [image[22 + 30, 124 + 44] for image in images]
    assert (edges[0] != edges[1]).any()


def test_without_detections_the_sheet_still_shows_the_truth(tmp_path, split):
    image = sheet(tmp_path / "s.png", split, [], tile=100)
    assert image.shape[0] == 2 * 130  # five images
    assert (image[22:122, :100] != 128).any()
    assert (image[22:122, 104:204] == 128).all()


def test_images_of_the_sheet_are_among_those_evaluated(tmp_path, split):
    only = [result for result in results_of(split) if result["image_id"] in (2, 4)]
    one = sheet(tmp_path / "s.png", split, only, tile=100)
    assert one.shape[:2] == (2 * 130, 216)


def metrics(workdir, train, val):
    losses = {"loss": 1.5, "loss_cls": 0.5, "loss_bbox": 0.8, "loss_dfl": 0.2, "lr": 0.01}
    entries = [{"kind": "train", "step": i + 1, **losses} for i in range(train)]
    ap = {"AP": 0.25, "AP50": 0.5, "AP75": 0.2}
    entries += [{"kind": "val", "step": i + 1, **ap} for i in range(val)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


@pytest.mark.parametrize(("train", "val"), [(50, 3), (1, 1), (1, 0), (0, 1), (0, 0)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_curves_are_drawn_from_any_number_of_entries(tmp_path, train, val):
    metrics(tmp_path, train, val)
    plot_run(tmp_path)
    image = cv2.imread(str(tmp_path / "curves.png"))
    assert image.shape == (400, 1500, 3)
    assert image.std() > 5


def test_curves_follow_the_entries(tmp_path):
    pictures = []
    for train in (2, 40):
        metrics(tmp_path, train, 1)
        plot_run(tmp_path)
        pictures.append(cv2.imread(str(tmp_path / "curves.png")))
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("found", [True, False], ids=["detections", "no detections"])
def test_a_finished_run_says_where_everything_is(tmp_path, split, capsys, found):
    metrics(tmp_path, 1, 1)
    (tmp_path / "results.json").write_text(json.dumps(results_of(split) if found else []))
    finish(tmp_path, split, seconds=90.0)
    printed = capsys.readouterr().out
    assert "AP 0.250" in printed
    assert "AP50 0.500" in printed
    assert "1.5 minutes" in printed
    assert f"python -m gfl_jax eval {tmp_path}" in printed
    for name in ("detections.png", "curves.png"):
        assert str(tmp_path / name) in printed
        assert cv2.imread(str(tmp_path / name)).std() > 5


def test_without_matplotlib_a_run_finishes_and_says_what_is_missing(
    tmp_path, split, capsys, monkeypatch
):
    metrics(tmp_path, 1, 1)
    (tmp_path / "results.json").write_text(json.dumps(results_of(split)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    finish(tmp_path, split, seconds=90.0)
    assert "not drawn: matplotlib" in (printed := capsys.readouterr().out)
    assert "gfl-jax[plotting]" in printed
    assert (tmp_path / "detections.png").is_file()
    assert not (tmp_path / "curves.png").exists()


def test_the_library_draws_only_when_asked_to():
    program = (
        "import sys, gfl_jax.visualize, gfl_jax.tools.tables; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_without_matplotlib_the_extra_that_has_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"gfl-jax\[plotting\]"):
        new_figure(1, 1)


def test_a_figure_has_the_format_of_its_name(tmp_path):
    figure = new_figure(1, 1)
    save_figure(figure, tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").read_bytes()[:2] == b"\xff\xd8"
    save_figure(figure, str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
