"""Evaluation against pycocotools called directly, and against cases worked out by hand."""

import contextlib
import dataclasses
import io
import json

import cv2
import jax
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_experiment import prepare

from gfl_jax.coco_eval import METRICS, evaluate, ground_truth
from gfl_jax.config import Data
from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import eval_plan
from gfl_jax.data.prepare import RawSplit
from gfl_jax.detectors.inference import Detections, Inference
from gfl_jax.distributed import SHARDED, Pmap, ShardMap
from gfl_jax.errors import InputError
from gfl_jax.training import evaluator
from gfl_jax.training.evaluator import predict_all

CATEGORIES = [{"id": 90, "name": "bird"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
NAMES = {category["id"]: category["name"] for category in CATEGORIES}
# Portrait and landscape images, ids out of order and with gaps.
SIZES = {
    12: (48, 64),
    5: (64, 48),
    7: (48, 64),
    30: (64, 40),
    9: (48, 64),
    41: (48, 64),
    8: (40, 64),
}


def annotation(number, image_id, category_id, bbox, **more):
    w, h = bbox[2:]
    entry = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox}
    return entry | {"area": w * h, "iscrowd": 0} | more


def write(root, annotations, images=None, categories=CATEGORIES):
    rng = np.random.default_rng(0)
    listed = []
    for image_id, (height, width) in SIZES.items():
        name = f"{image_id}.png"
        (root / "images").mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (height, width, 3), np.uint8)
        cv2.imwrite(str(root / "images" / name), noise)
        listed.append({"id": image_id, "file_name": name, "height": height, "width": width})
    content = {"images": images or listed, "annotations": annotations, "categories": categories}
    (root / "truth.json").write_text(json.dumps(content))
    return RawSplit(root / "truth.json", root / "images")


def opened(root, annotations, on_error="raise", **content):
    return prepare(write(root, annotations, **content), root / "cache", on_error)


def random_annotations(seed=0, categories=(3, 7)):
    rng = np.random.default_rng(seed)
    found = []
    for image_id, (height, width) in SIZES.items():
        for _ in range(rng.integers(1, 5)):
            size = rng.uniform(8, 36, 2)
            corner = rng.uniform(0, np.array([width, height]) - size)
            bbox = np.round([*corner, *size], 2).tolist()
            category_id = int(rng.choice(categories))
            found.append(annotation(len(found) + 1, image_id, category_id, bbox))
    return found


def perfect(annotations, score=0.9):
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": list(a["bbox"]),
            "score": score,
        }
        for a in annotations
    ]


def imperfect(annotations, seed=0):
    """Moved boxes, some missing, some doubled, some of another class, some of nothing."""
    rng = np.random.default_rng(seed)
    results = []
    for result in perfect(annotations) * 2:
        if rng.random() < 0.2:
            continue
        moved = np.array(result["bbox"]) + rng.normal(0, 1.5, 4)
        category_id = int(rng.choice([3, 7, 90])) if rng.random() < 0.2 else result["category_id"]
        results.append(
            result | {"bbox": moved.tolist(), "score": rng.random(), "category_id": category_id}
        )
    for image_id in SIZES:
        bbox = [*rng.uniform(0, 20, 2).tolist(), 10.0, 10.0]
        results.append(
            {"image_id": image_id, "category_id": 7, "bbox": bbox, "score": rng.random()}
        )
    return results


def judged_by_pycocotools(file, results, image_ids, category_ids=None):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        judge = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
        judge.params.imgIds = sorted(image_ids)
        if category_ids:
            judge.params.catIds = category_ids
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("evaluation"), random_annotations())


@pytest.fixture(scope="module")
def truth(split):
    return ground_truth(split)


def test_perfect_detections_have_ap_1(truth):
    evaluation = evaluate(perfect(random_annotations()), truth, SIZES)
    assert tuple(evaluation.metrics) == METRICS
    for name in ("AP", "AP50", "AP75", "AR100"):
        assert evaluation.metrics[name] == pytest.approx(1.0)
    assert evaluation.per_class[3] == ("cat", 1, 1)
    assert evaluation.per_class[7] == ("dog", 1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_pycocotools_called_directly(split, truth, seed):
    results = imperfect(random_annotations(), seed)
    evaluation = evaluate([dict(result) for result in results], truth, SIZES)
    expected = judged_by_pycocotools(split.annotations, results, SIZES)
    assert 0.1 < evaluation.metrics["AP"] < 0.9
    assert list(evaluation.metrics.values()) == pytest.approx(expected.tolist())
    for category_id, name in NAMES.items():
        stats = judged_by_pycocotools(split.annotations, results, SIZES, [category_id])
        assert evaluation.per_class[category_id][1:] == pytest.approx((stats[0], stats[1]))
        assert evaluation.per_class[category_id].name == name


def test_only_the_images_asked_for_count(split, truth):
    results = imperfect(random_annotations())
    some = [5, 7, 30]
    evaluation = evaluate([r for r in results if r["image_id"] in some], truth, some)
    expected = judged_by_pycocotools(split.annotations, results, some)
    assert list(evaluation.metrics.values()) == pytest.approx(expected.tolist())


def test_average_precision_worked_out_by_hand(tmp_path):
    """Hit, miss, hit on two objects: precision 1 up to recall 1/2, then 2/3."""
    boxes = [[4.0, 4.0, 20.0, 12.0], [30.0, 20.0, 12.0, 16.0]]
    annotations = [annotation(i + 1, 12, 3, box) for i, box in enumerate(boxes)]
    results = perfect(annotations)
    results[1]["score"] = 0.7
    nothing = {"image_id": 12, "category_id": 3, "bbox": [40.0, 1.0, 9.0, 9.0], "score": 0.8}
    split = opened(tmp_path, annotations)
    evaluation = evaluate([*results, nothing], ground_truth(split), SIZES)
    # pycocotools reads precision at the recalls 0, 0.01, ..., 1.
    expected = (51 * 1 + 50 * 2 / 3) / 101
    for name in ("AP", "AP50", "AP75", "APS"):
        assert evaluation.metrics[name] == pytest.approx(expected)
    assert evaluation.metrics["AR1"] == pytest.approx(0.5)
    assert evaluation.metrics["AR10"] == evaluation.metrics["AR100"] == 1.0
    assert evaluation.metrics["APL"] == -1  # no large object
    assert evaluation.per_class[3][1:] == pytest.approx((expected, expected))
    assert evaluation.per_class[7][1:] == evaluation.per_class[90][1:] == (-1.0, -1.0)


def test_no_detections_are_no_error(truth):
    evaluation = evaluate([], truth, SIZES)
    for name in ("AP", "AP50", "AP75", "AR1", "AR10", "AR100"):
        assert evaluation.metrics[name] == 0
    assert evaluation.per_class == {3: ("cat", 0, 0), 7: ("dog", 0, 0), 90: ("bird", -1, -1)}


def test_evaluating_twice_gives_the_same(truth):
    results = imperfect(random_annotations())
    first = evaluate([dict(result) for result in results], truth, SIZES)
    evaluate([], truth, [5])
    assert evaluate([dict(result) for result in results], truth, SIZES) == first


def test_results_stay_as_they_were(truth):
    results = imperfect(random_annotations())
    copies = [dict(result) for result in results]
    evaluate(results, truth, SIZES)
    assert results == copies


def test_detections_in_a_crowd_are_no_mistakes(tmp_path):
    single = annotation(1, 12, 3, [2.0, 2.0, 12.0, 12.0])
    crowd = annotation(2, 12, 3, [20.0, 4.0, 40.0, 40.0], iscrowd=1)
    inside = [
        {"image_id": 12, "category_id": 3, "bbox": [x, 6.0, 8.0, 8.0], "score": 0.95}
        for x in (22.0, 34.0, 46.0)
    ]
    results = [*perfect([single]), *inside]
    split = opened(tmp_path / "crowd", [single, crowd])
    assert evaluate(results, ground_truth(split), SIZES).metrics["AP"] == pytest.approx(1)
    split = opened(tmp_path / "none", [single])
    assert evaluate(results, ground_truth(split), SIZES).metrics["AP"] == pytest.approx(0.25)


def test_annotations_without_area_or_crowd_mean_the_box_and_no_crowd(tmp_path, truth):
    bare = [
        {k: v for k, v in a.items() if k not in ("area", "iscrowd")} for a in random_annotations()
    ]
    split = opened(tmp_path, bare)
    results = imperfect(random_annotations())
    expected = evaluate([dict(result) for result in results], truth, SIZES)
    assert evaluate(results, ground_truth(split), SIZES) == expected


def test_areas_are_those_of_the_json_not_of_the_boxes(tmp_path):
    """A thin object in a large box is small: COCO's areas are those of the masks."""
    annotations = [annotation(1, 12, 3, [2.0, 2.0, 40.0, 40.0], area=100.0)]
    evaluation = evaluate(perfect(annotations), ground_truth(opened(tmp_path, annotations)), SIZES)
    assert evaluation.metrics["APS"] == pytest.approx(1)
    assert evaluation.metrics["APM"] == -1.0


def test_without_a_json_the_records_are_the_truth(split, truth):
    recorded = ground_truth(dataclasses.replace(split, annotations=None))
    results = imperfect(random_annotations())
    expected = evaluate([dict(result) for result in results], truth, SIZES)
    found = evaluate(results, recorded, SIZES)
    assert list(found.metrics.values()) == pytest.approx(list(expected.metrics.values()))
    assert found.per_class.keys() == expected.per_class.keys()


@pytest.mark.parametrize(
    "changes",
    [
        lambda i: {"id": i},
        lambda i: {"id": -i},
        lambda i: {"iscrowd": None, "ignore": None, "area": None},
        lambda i: {"iscrowd": False, "ignore": False},
        lambda i: {"ignore": 0, "area": 1},
    ],
)
def test_perfect_detections_have_ap_1_however_flags_and_ids_are_written(tmp_path, changes):
    """pycocotools takes a match with id 0 for none, and None for no number."""
    good = random_annotations()
    written = [entry | changes(i) for i, entry in enumerate(good)]
    split = opened(tmp_path, written)
    assert split.num_boxes.sum() == len(good)
    evaluation = evaluate(perfect(good), ground_truth(split), SIZES)
    assert evaluation.metrics["AP"] == evaluation.metrics["AR100"] == pytest.approx(1)


def test_objects_flagged_ignore_are_neither_demanded_nor_mistakes(tmp_path):
    good = random_annotations()
    ignored = [entry | {"ignore": True} if i % 3 == 0 else entry for i, entry in enumerate(good)]
    split = opened(tmp_path, ignored)
    truth = ground_truth(split)
    trained_on = [entry for i, entry in enumerate(good) if i % 3]
    assert split.num_boxes.sum() == len(trained_on)
    for results in (perfect(trained_on), perfect(good)):
        assert evaluate(results, truth, SIZES).metrics["AP"] == pytest.approx(1)
    recorded = ground_truth(dataclasses.replace(split, annotations=None))
    assert evaluate(perfect(trained_on), recorded, SIZES).metrics["AP"] == pytest.approx(1)


def test_a_damaged_copy_of_the_annotations_is_named(tmp_path):
    split = opened(tmp_path, random_annotations())
    split.annotations.write_text(split.annotations.read_text()[:-9])
    with pytest.raises(InputError, match=r"annotations\.json is damaged"):
        ground_truth(split)


def test_two_classes_of_one_name_have_a_line_each(tmp_path):
    """Some exporters write a root category without boxes that is called like a real one."""
    categories = [{"id": 0, "name": "cat"}, {"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    good = random_annotations()
    split = opened(tmp_path, good, categories=categories)
    evaluation = evaluate(perfect(good), ground_truth(split), SIZES)
    table = [line.split() for line in evaluation.class_table().splitlines()]
    assert ["cat", "(id", "3)", "1.000", "1.000"] in table
    assert ["cat", "(id", "0)", "-", "-"] in table
    assert ["dog", "1.000", "1.000"] in table


@pytest.mark.parametrize(("objects", "limit"), [(120, 300), (120, 100), (100, 300)])
def test_more_objects_of_a_class_than_coco_counts_are_reported(tmp_path, objects, limit):
    corners = [(3.0 * (i % 20), 7.0 * (i // 20)) for i in range(objects)]
    dense = [annotation(i + 1, 12, 3, [*corner, 3.0, 7.0]) for i, corner in enumerate(corners)]
    truth = ground_truth(opened(tmp_path, dense))
    evaluation = evaluate(perfect(dense)[:limit], truth, SIZES, limit)
    expected = judged_by_pycocotools(tmp_path / "truth.json", perfect(dense)[:limit], SIZES)
    assert list(evaluation.metrics.values()) == pytest.approx(expected.tolist())
    assert evaluation.metrics["AP"] == pytest.approx({120: 84 / 101, 100: 1.0}[objects])
    assert evaluation.per_class[3].ap == evaluation.metrics["AP"]
    if objects == 100:
        assert evaluation.note == ""
        return
    assert "image 12 has 120 of 'cat'" in evaluation.note
    assert str(evaluation).endswith(evaluation.note)
    assert ("max_per_image 300 AP is 1.000" in evaluation.note) == (limit == 300)


@pytest.mark.parametrize(("limit", "said"), [(100, "at most 100 detections: raise"), (120, "")])
def test_more_objects_of_all_classes_than_there_are_detections_are_reported(tmp_path, limit, said):
    corners = [(3.0 * (i % 20), 7.0 * (i // 20)) for i in range(120)]
    dense = [
        annotation(i + 1, 12, (3, 7)[i % 2], [*corner, 3.0, 7.0])
        for i, corner in enumerate(corners)
    ]
    truth = ground_truth(opened(tmp_path, dense))
    evaluation = evaluate(perfect(dense)[:limit], truth, SIZES, limit)
    assert (evaluation.metrics["AP"] == 1) == (limit == 120)
    assert said in evaluation.note and bool(said) == bool(evaluation.note)
    assert not said or evaluation.note.startswith("image 12 has 120 objects")


# ---------------------------------------------------------------------------- on_error='skip'


def test_what_was_skipped_is_not_asked_for(tmp_path):
    good = random_annotations()
    bad = [
        annotation(101, 12, 3, [1.0, 1.0, -4.0, 5.0]),
        annotation(102, 12, 55, [1.0, 1.0, 4.0, 5.0]),
        annotation(103, 99, 3, [1.0, 1.0, 4.0, 5.0]),
    ]
    folder = write(tmp_path, [*good, *bad])
    (folder.images / "7.png").write_bytes(b"no image")
    (folder.images / "9.png").unlink()
    split = prepare(folder, tmp_path / "cache", "skip")
    assert split.image_ids.tolist() == [5, 8, 12, 30, 41]
    truth = ground_truth(split)
    assert sorted(truth.getImgIds()) == [5, 8, 12, 30, 41]
    kept = [a for a in good if a["image_id"] not in (7, 9)]
    assert sorted(truth.getAnnIds()) == list(range(1, len(kept) + 1))
    evaluation = evaluate(perfect(kept), truth, split.image_ids.tolist())
    assert evaluation.metrics["AP"] == pytest.approx(1)
    assert evaluation.metrics["AR100"] == 1


FAULTS = {
    "no id": {"annotations": [{"image_id": 12, "category_id": 3, "bbox": [1.0, 1.0, 4.0, 5.0]}]},
    "no object": {"annotations": ["annotation"]},
    "taken id": {"annotations": [annotation(1, 12, 3, [1.0, 1.0, 4.0, 5.0])]},
    "no category name": {"categories": [{"id": 2}]},
    "taken category id": {"categories": [{"id": 3, "name": "lion"}]},
    "no image object": {"images": ["image"]},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_entries_that_were_skipped_do_not_stop_the_evaluation(tmp_path, fault):
    good = random_annotations()
    folder = write(tmp_path, good)
    content = json.loads(folder.annotations.read_text())
    for key, entries in FAULTS[fault].items():
        content[key] += entries
    folder.annotations.write_text(json.dumps(content))
    split = prepare(folder, tmp_path / "cache", "skip")
    evaluation = evaluate(perfect(good), ground_truth(split), split.image_ids.tolist())
    assert evaluation.metrics["AP"] == pytest.approx(1)
    assert evaluation.metrics["AR100"] == 1
    assert [entry.name for entry in evaluation.per_class.values()] == ["cat", "dog", "bird"]


def test_a_malformed_annotation_does_not_take_the_id_of_a_good_one(tmp_path):
    """Training and evaluation once decided this for themselves, and not alike."""
    good = random_annotations()
    split = opened(tmp_path, [good[0] | {"bbox": None}, *good], "skip")
    assert split.num_boxes.sum() == len(good)
    evaluation = evaluate(perfect(good), ground_truth(split), SIZES)
    assert evaluation.metrics["AP"] == evaluation.metrics["AR100"] == pytest.approx(1)


# ---------------------------------------------------------------------------- from predictions

MAPPINGS = {
    "pmap": lambda: Pmap(jax.local_devices()[:2]),
    "shard_map": lambda: ShardMap(jax.local_devices()[:2]),
}


def told(devices, per_slot=3):
    """A predictor that tells the size of each image: boxes of it in every class, one masked out."""

    def predict(variables, batch):
        height, width = (batch.sizes / batch.scales[:, ::-1]).T
        zero = 0 * width
        box = np.float32([0.25, 0.5, 0.75, 1.0]) * jax.numpy.stack(
            [width, height, width, height], -1
        )
        labels = jax.numpy.tile(jax.numpy.arange(per_slot), (len(box), 1))
        return Detections(
            boxes=jax.numpy.repeat(box[:, None], per_slot, 1),
            scores=zero[:, None] + jax.numpy.array([0.9, 0.8, 0.0]),
            labels=labels,
            mask=labels < 2,
        )

    return devices.map(predict, outputs=SHARDED)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("batch_size", [2, 4, 6])
@pytest.mark.parametrize("limit", [0, 4])
def test_every_image_gives_its_results_exactly_once(split, mapping, batch_size, limit):
    """Batches of both orientations are partly filled, whatever their size."""
    devices = MAPPINGS[mapping]()
    data = Data(scale=(96, 72), workers=0)
    plan = eval_plan(data, split, batch_size, limit)
    loaded = list(batches(plan, split, range(plan.steps_per_epoch), data))
    slots = sum(len(host.image_ids) for host in loaded)
    chosen = split.image_ids[: limit or None].tolist()
    assert slots > len(chosen), "some slots only fill"
    results = predict_all(told(devices), {}, loaded, devices, split, total=len(loaded))
    # Labels 0 and 1 of three classes by ascending id, 3, 7 and 90; label 2 is masked out.
    expected = [(image_id, category_id) for image_id in chosen for category_id in (3, 7)]
    assert sorted((r["image_id"], r["category_id"]) for r in results) == sorted(expected)
    for result in results:
        height, width = SIZES[result["image_id"]]
        x, y, w, h = result["bbox"]
        assert (x, y, w, h) == pytest.approx((width / 4, height / 2, width / 2, height / 2), 1e-5)
        assert result["score"] == pytest.approx(0.9 if result["category_id"] == 3 else 0.8)
    json.dumps(results)


def test_a_batch_is_dispatched_before_the_detections_of_the_one_before_are_fetched(
    split, monkeypatch
):
    devices, events = MAPPINGS["pmap"](), []
    data = Data(scale=(96, 72), workers=0)
    plan = eval_plan(data, split, 2)
    loaded = list(batches(plan, split, range(plan.steps_per_epoch), data))
    predict, fetch = told(devices), devices.fetch_local
    monkeypatch.setattr(devices, "fetch_local", lambda tree: events.append("fetch") or fetch(tree))

    def dispatch(variables, batch):
        events.append("dispatch")
        return predict(variables, batch)

    predict_all(dispatch, {}, loaded, devices, split, total=len(loaded))
    later = ["dispatch", "fetch"] * (len(loaded) - 1)
    assert len(loaded) > 2
    assert events == ["dispatch", *later, "fetch"]


class Everywhere:
    """Stands for a network and a detector: predicts the same of all images."""

    inference = Inference(max_per_image=1)

    def apply(self, variables, images, sizes, *, train):
        return sizes, {}

    def detections(self, outputs, sizes, scales):
        box = jax.numpy.tile(jax.numpy.array([0.0, 0.0, 20.0, 20.0]), (len(sizes), 1, 1))
        one = jax.numpy.ones((len(sizes), 1))
        return Detections(box, 0.5 * one, 0 * one.astype(int), one > 0)


def test_evaluations_share_their_workers_and_say_the_same(split, monkeypatch):
    made, original = [], evaluator.batches
    monkeypatch.setattr(evaluator, "batches", lambda *a: made.append(a) or original(*a))
    devices, double = MAPPINGS["pmap"](), Everywhere()
    data = Data(scale=(96, 72), workers=1)
    evaluate_twice = evaluator.Evaluator(double, double, data, devices, split, per_device=1)
    (first, results), (second, again) = (evaluate_twice({"x": np.zeros(2)}) for _ in range(2))
    evaluate_twice.close()
    assert len(made) == 1
    assert first == second
    assert results == again
    assert [r["image_id"] for r in results] == sorted(split.image_ids.tolist())
    assert first == evaluate(results, ground_truth(split), split.image_ids.tolist(), 1)


def test_category_ids_with_gaps_come_back_from_labels(split):
    assert split.category_ids == [3, 7, 90]
    assert split.category_names == ["cat", "dog", "bird"]


# ---------------------------------------------------------------------------- what people read


def test_class_table_lists_every_class_the_best_first(truth):
    annotations = random_annotations()
    dogs_only = perfect([a for a in annotations if a["category_id"] == 7])
    table = evaluate(dogs_only, truth, SIZES).class_table().splitlines()
    assert [line.split() for line in table] == [
        ["class", "AP", "AP50"],
        ["dog", "1.000", "1.000"],
        ["cat", "0.000", "0.000"],
        ["bird", "-", "-"],
    ]


def test_an_evaluation_prints_all_twelve_numbers(truth):
    printed = str(evaluate(perfect(random_annotations()), truth, SIZES))
    words = printed.split()
    assert words[::2] == list(METRICS)
    assert len([float(word) for word in words[1::2]]) == 12
