"""The comparison of two programs: that it agrees where it should, and sees where it should not."""

import cv2
import numpy as np
import pytest
from safetensors.numpy import save_file

from gfl_jax.detectors.dense import Detector, GeneralDistribution
from gfl_jax.detectors.postprocess import Inference
from gfl_jax.interop import convert, crosscheck
from gfl_jax.models.network import Backbone, Model, Network


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of a small detector that detects much, and two images."""
    folder = tmp_path_factory.mktemp("crosscheck")
    detector = Detector(box=GeneralDistribution(6))
    model = Model(Backbone(18, 16), 32, 32, 1)
    network = Network(model, 5, detector.box.channels)
    variables, rng = network.init(3), np.random.default_rng(0)

    def random(path, array):
        kind = path[-1]
        if kind == "kernel":
            noise = rng.normal(size=array.shape)
            noise -= noise.mean((0, 1, 2))  # else every output is nearly constant
            gain = 2.0 if path[-2] == "gfl_cls" else 1.5
            return noise * gain / np.sqrt(np.prod(array.shape[:3]))
        if kind == "bias":
            return rng.normal(size=array.shape) * 0.1 - 3.0 * (path[-2] == "gfl_cls")
        return np.exp(rng.normal(size=array.shape) * 0.1) if kind != "mean" else array

    by_path = network.by_path(variables)
    arrays = {path: np.float32(random(path, np.asarray(a))) for path, a in by_path.items()}
    variables = network.replaced(variables, arrays)
    save_file(convert.state_dict(network, variables, detector), folder / "x.safetensors")
    images = []
    for i, (height, width) in enumerate([(96, 128), (120, 80)]):
        noise = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        images.append(folder / f"{i}.png")
        cv2.imwrite(str(images[-1]), image)
    return tuple(images), folder / "x.safetensors"


def test_the_plain_model_agrees_stage_by_stage(files, capsys):
    pytest.importorskip("torch")
    images, checkpoint = files
    assert crosscheck.main(images, checkpoint, scale=(160, 128)) == 0
    printed = capsys.readouterr().out
    assert "all stages agree" in printed
    stages = ["input", "C2", "C5", "P3", "P7", "P3 cls_logits", "P7 box_logits"]
    stages += ["loss_cls", "loss_bbox", "loss_dfl"]
    for stage in [*stages, "detections of image 1"]:
        assert f"\n{stage} " in printed


@pytest.mark.parametrize(
    ("field", "value", "stage"),
    [
        ("std", (58.0, 57.12, 57.375), "input"),
        ("dfl_weight", 0.26, "loss_dfl"),
        ("topk", 8, "loss_cls"),
        ("nms_iou", 0.4, "detections of image 0"),
    ],
)
def test_a_difference_is_found_where_it_begins(files, capsys, monkeypatch, field, value, stage):
    pytest.importorskip("torch")
    images, checkpoint = files
    settings = crosscheck.settings
    monkeypatch.setattr(crosscheck, "settings", lambda *args: settings(*args) | {field: value})
    assert crosscheck.main(images, checkpoint, scale=(160, 128)) == 1
    assert f"first difference: {stage}" in capsys.readouterr().out


def detections(scores, shift=0.0, labels=None):
    count = len(scores)
    boxes = np.arange(count)[:, None] * 10.0 + np.array([0, 0, 8, 8.0]) + shift
    labels = np.zeros(count, int) if labels is None else np.array(labels)
    found = {"boxes": boxes, "scores": np.array(scores), "labels": labels}
    return {f"det.{part}.0": array for part, array in found.items()}


@pytest.mark.parametrize(
    ("ours", "differs"),
    [
        (detections([0.9, 0.5, 0.3]), False),
        (detections([0.9, 0.5, 0.3], shift=0.04), False),
        (detections([0.9, 0.5, 0.3], shift=0.06), True),
        (detections([0.9, 0.50005, 0.3]), False),
        (detections([0.9, 0.5002, 0.3]), True),
        (detections([0.9, 0.5, 0.3], labels=[0, 1, 0]), True),
        (detections([0.9, 0.5]), True),
        (detections([0.9, 0.5, 0.3, 0.2]), True),
        (detections([0.9, 0.5, 0.3, 0.050005]), False),
        (detections([]), True),
    ],
)
def test_detections_are_compared_one_to_one(ours, differs):
    rows = crosscheck.compare(ours, detections([0.9, 0.5, 0.3]), Inference(0.05))
    assert [bool(row.where) for row in rows] == [differs]


def test_of_a_full_list_the_last_may_differ():
    theirs = detections([0.9, 0.5, 0.3])
    ours = detections([0.9, 0.5, 0.300005], labels=[0, 0, 1])
    (row,) = crosscheck.compare(ours, theirs, Inference(0.05, max_per_image=3))
    assert not row.where


@pytest.mark.parametrize("value", [1e-3, np.nan])
def test_the_first_element_out_of_tolerance_is_named(value):
    theirs = {"feature.P3": np.ones((1, 2, 3, 4))}
    ours = {"feature.P3": np.ones((1, 2, 3, 4))}
    ours["feature.P3"][0, 1, 2, 0] += value
    (row,) = crosscheck.compare(ours, theirs, Inference())
    assert row.where.startswith("[0, 1, 2, 0]: ")
    (row,) = crosscheck.compare({"feature.P3": np.ones(3)}, theirs, Inference())
    assert "shape (3,)" in row.where


def test_nothing_to_compare_with_is_an_error(files, monkeypatch, tmp_path):
    images, checkpoint = files
    monkeypatch.setattr(crosscheck, "PLAIN", tmp_path / "none.py")
    with pytest.raises(RuntimeError, match="mmdetection is not installed"):
        crosscheck.main(images[:1], checkpoint, scale=(160, 128))
    with pytest.raises(ValueError, match="at least one image"):
        crosscheck.main((), checkpoint)
