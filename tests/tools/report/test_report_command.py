"""The command `report`: a run and its validation images to a page."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest

pytest.importorskip("hotcoco")

from gfl_jax.__main__ import main as front_door
from gfl_jax.coco_eval import evaluate, ground_truth
from gfl_jax.config import Data, Experiment
from gfl_jax.data.sources import Shapes
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.errors import InputError
from gfl_jax.interop.exported import write_exported
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.results import Result
from gfl_jax.run import describe, load
from gfl_jax.tools.report import gallery
from gfl_jax.tools.report.costs import costs
from gfl_jax.tools.report.detections import annotations_of, predicted, see, stored
from gfl_jax.tools.report.errors import Objects
from gfl_jax.tools.report.gallery import STATES, Pictures
from gfl_jax.tools.report.numbers import confusion, numbers_of
from gfl_jax.tools.report.page import page, report_sections

EXPERIMENT = Experiment(
    model=Model(
        Backbone(depth=18, width=8, norm="bn", frozen_stages=-1),
        Neck(32),
        Head(width=32, stacked_convs=1),
    ),
    detector=Detector(inference=Inference(score_threshold=0.0, nms_pre=60, max_per_image=9)),
    data=Data(source=Shapes(num_train=2, num_val=6, image_size=(64, 64)), scale=(64, 64)),
)


@dataclasses.dataclass
class Made:
    """An exported detector with random weights, its validation images and results for them."""

    folder: str
    split: object
    results: list


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    source = dataclasses.replace(EXPERIMENT.data.source, cache_dir=str(folder / "cache"))
    data = dataclasses.replace(EXPERIMENT.data, source=source)
    experiment = dataclasses.replace(EXPERIMENT, data=data)
    split = source.open("val")
    network = Network(experiment.model, experiment.detector.predicts(len(split.category_ids)))
    variables, rng = network.init(0), np.random.default_rng(0)
    params = {
        name: np.asarray(
            array + 0.3 * rng.normal(size=array.shape) * name.startswith("bbox_head"), np.float32
        )
        for name, array in variables.params.items()
    }
    other_ids = [100 + i for i in split.category_ids]
    about = describe(experiment, other_ids, split.category_names) | {"step": 5}
    write_exported(
        folder / "run", about, network, variables._replace(params=params), experiment.detector
    )
    return Made(str(folder / "run"), split, nearly_right(split))


def nearly_right(split, seed=0):
    """The objects moved, some renamed and some left out, as COCO results."""
    rng, results = np.random.default_rng(seed), []
    for entry in ground_truth(split).dataset["annotations"]:
        box = np.array(entry["bbox"]) + rng.normal(size=4) * 0.08 * entry["bbox"][2]
        category = entry["category_id"]
        if rng.random() < 0.3:
            category = int(rng.choice(split.category_ids))
        result = {"image_id": entry["image_id"], "category_id": category, "bbox": box.tolist()}
        if rng.random() < 0.8:
            results.append(result | {"score": float(rng.uniform(0.2, 1))})
    return results


def report(*arguments):
    """The status of the command."""
    with pytest.raises(SystemExit) as ended:
        front_door(["report", *map(str, arguments)])
    return ended.value.code or 0


def compare(*arguments):
    """The status of the command."""
    with pytest.raises(SystemExit) as ended:
        front_door(["compare", *map(str, arguments)])
    return ended.value.code or 0


def data_of(page):
    text = page.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def test_stored_results_are_reported_with_the_ap_of_pycocotools(tmp_path, made, capsys):
    file, page = tmp_path / "results.json", tmp_path / "new" / "report.html"
    file.write_text(json.dumps(made.results))
    assert report(made.folder, "--results", file, "-o", page) == 0
    expected = evaluate(made.results, ground_truth(made.split), made.split.image_ids.tolist())
    assert 0.05 < expected.metrics["AP"] < 0.9
    assert f"AP {expected.metrics['AP']:.3f} on 6 images" in capsys.readouterr().out
    text = page.read_text("utf-8")
    for value in expected.metrics.values():
        assert f"<dd>{value:.3f}</dd>" in text or value < 0
    for name in made.split.category_names:
        assert f'<th scope="row">{name}</th>' in text
    assert len(data_of(page)["images"]) == 6
    assert list(page.parent.iterdir()) == [page], "few pictures are in the page itself"


@pytest.mark.slow
def test_category_ids_are_those_of_the_data(made):
    (result,) = predicted(load(made.folder), made.split, range(1))
    assert len(result)
    assert set(result.category_ids) <= set(made.split.category_ids)
    assert [made.split.category_ids.index(i) for i in result.category_ids] == result.labels.tolist()


@pytest.mark.slow
def test_detections_are_predicted_with_the_distributions_of_their_sides(tmp_path, made):
    page = tmp_path / "report.html"
    assert report(made.folder, "-o", page, "--score-threshold", "0.01", "--limit", "3") == 0
    data = data_of(page)
    assert len(data["images"]) == 3
    assert any(image["versions"][0]["detections"] for image in data["images"])
    for image in data["images"]:
        image |= image["versions"][0]
        assert len(image["sides"]) == len(image["detections"])
        for (x1, y1, x2, y2, *_), (ends, spread, digits) in zip(
            image["detections"], image["sides"], strict=True
        ):
            assert len(digits) == 4 * (EXPERIMENT.detector.box.n + 1)
            assert min(spread) >= 0
            for side, position in enumerate((x1, y1, x2, y2)):
                low, high = sorted(ends[2 * side : 2 * side + 2])
                values = [data["digits"].index(c) for c in digits[17 * side : 17 * side + 17]]
                mean = np.average(np.linspace(*ends[2 * side : 2 * side + 2], 17), weights=values)
                # Boxes end at the image's edges, distributions do not.
                assert mean == pytest.approx(position, abs=0.02 * (high - low)) or position in (
                    0,
                    image["size"][side % 2],
                )


def test_nothing_is_fetched_and_names_are_text(tmp_path, made):
    evil = '</script><img src=x onerror="document.title=1">'
    names = [evil] * len(made.split.category_names)
    split = dataclasses.replace(made.split, category_names=names)
    truth, objects = annotations_of(split, split.image_ids.tolist())
    for category in truth["categories"]:
        category["name"] = evil
    pictures = Pictures(tmp_path / "r.html", [evil] * 6, 64)
    results = tmp_path / "results.json"
    results.write_text(json.dumps(made.results))
    found = stored(str(results), split, range(6))
    seen = see(found, split.image_ids.tolist(), objects, 0.3, pictures.keep)
    numbers, errors = numbers_of(truth, made.results), costs(seen.detected, len(names))
    confused = confusion(truth, seen.counted(), 0.3)
    sections = report_sections(numbers, errors, seen.detected, confused, names, 0.3)
    text = page(evil, {evil: evil}, sections, names, pictures.beside(seen.entries), 0.3, [evil])
    assert evil not in text
    assert text.count("</script>") == 2
    addresses = set(re.findall(r"https?://[^\s\"']*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_what_is_on_a_crowd_is_not_confused_with_background():
    box = [0.0, 0.0, 500.0, 500.0]
    crowd = {"id": 1, "image_id": 3, "category_id": 1, "bbox": box, "area": 2.5e5, "iscrowd": 1}
    truth = {"images": [{"id": 3}], "annotations": [crowd], "categories": [{"id": 1, "name": "a"}]}
    boxes = np.array([[10, 10, 90, 90], [700, 0, 800, 100]], np.float32)
    scores, labels = np.array([0.9, 0.8]), np.array([0, 0])
    image = np.zeros((600, 900, 3), np.uint8)
    result = Result("", image, boxes, scores, labels, ["a", "a"], [1, 1])
    objects = {3: Objects(np.array([[0, 0, 500, 500]]), np.array([0]), np.array([True]))}
    seen = see(iter([result]), [3], objects, 0.3)
    assert [round(found["score"], 1) for found in seen.counted()] == [0.8]
    assert confusion(truth, seen.counted(), 0.3).tolist() == [[0, 0], [1, 0]]


def test_many_pictures_lie_in_a_folder_beside_the_page(tmp_path, made, monkeypatch):
    monkeypatch.setattr(gallery, "EMBEDDED", 2)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(made.results))
    page = tmp_path / "report.html"
    assert report(made.folder, "--results", file, "-o", page, "--picture-size", "32") == 0
    for image in data_of(page)["images"]:
        assert (tmp_path / image["picture"]).read_bytes()[:2] == b"\xff\xd8"
    assert len(list((tmp_path / "report_pictures").iterdir())) == 6


@pytest.mark.parametrize(
    "content, said",
    [
        ("[", "not COCO results"),
        ('[{"image_id": 1}]', "not COCO results"),
        ('[{"image_id": 1, "category_id": 77, "bbox": [0, 0, 1, 1], "score": 1}]', "77"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1.5}]', "score 1.5"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, NaN, 1], "score": 1}]', "nan"),
        ('[{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]', "such as 99"),
    ],
)
def test_a_file_that_is_no_results_is_named(tmp_path, made, content, said):
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(InputError, match=said) as error:
        stored(str(file), made.split, range(6))
    assert str(file) in str(error.value)


def test_a_detector_that_finds_nothing_has_a_report(tmp_path, made, capsys):
    file, page = tmp_path / "results.json", tmp_path / "report.html"
    file.write_text("[]")
    assert report(made.folder, "--results", file, "-o", page) == 0
    assert "AP 0.000 on 6 images" in capsys.readouterr().out
    missed = [image["versions"][0]["objects"] for image in data_of(page)["images"]]
    assert {STATES[state] for objects in missed for *_, state, _ in objects} == {"missed"}


def test_a_missing_file_of_results_is_named(tmp_path, made, capsys):
    assert report(made.folder, "--results", tmp_path / "none.json") == 1
    assert "none.json: there is no such file" in capsys.readouterr().err


def test_without_hotcoco_the_extra_is_named(made, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert report(made.folder) == 1
    assert "gfl-jax[report]" in capsys.readouterr().err


def test_two_results_are_compared_on_one_page(tmp_path, made, capsys):
    one, other, page = (tmp_path / name for name in ("one.json", "other.json", "c.html"))
    one.write_text(json.dumps(made.results))
    other.write_text(json.dumps(made.results[::2]))
    named = [made.folder, other, "--results", one, "-o", page]
    assert compare(*named, "--resamples", "50") == 0
    printed = capsys.readouterr().out
    truth, ids = ground_truth(made.split), made.split.image_ids.tolist()
    aps = [evaluate(r, truth, ids).metrics["AP"] for r in (made.results, made.results[::2])]
    assert f"AP {aps[0]:.3f} and {aps[1]:.3f} on 6 images: {aps[1] - aps[0]:+.3f} [" in printed
    data = data_of(page)
    assert data["versions"] == [made.folder, str(other)]
    assert all(len(image["versions"]) == 2 for image in data["images"])
    assert f"<td>{aps[1]:.3f}</td><td>{aps[1] - aps[0]:+.3f}</td>" in page.read_text("utf-8")


def test_a_mistake_in_a_comparison_is_named(tmp_path, made, capsys):
    assert compare(made.folder, "x.json", "--resamples", "1") == 1
    assert "--resamples is 1" in capsys.readouterr().err
    assert compare(made.folder, tmp_path / "none.json", "--results", tmp_path / "none.json") == 1
    assert "none.json: there is no such file" in capsys.readouterr().err
    assert compare(made.folder) == 2
