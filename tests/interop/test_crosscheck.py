"""The comparison of two programs: that it agrees where it should, and sees where it should not."""

import json
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gfl_jax import assign, systems
from gfl_jax.detectors.box import Distances, GeneralDistribution, Overlap
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.detectors.quality import QualityBranch
from gfl_jax.errors import UsageError
from gfl_jax.interop import convert, crosscheck, mmdet_config, mmdet_stages
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of a small detector that detects much, and two images."""
    folder = tmp_path_factory.mktemp("crosscheck")
    detector = Detector(box=GeneralDistribution(6))
    model = Model(Backbone(18, 16), Neck(32), Head(width=32, stacked_convs=1))
    network = Network(model, detector.predicts(5))
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
        ("model.std", (58.0, 57.12, 57.375), "input"),
        ("detector.dfl_weight", 0.26, "loss_dfl"),
        ("detector.assigner.topk", 8, "loss_cls"),
        ("detector.inference.nms_iou", 0.4, "detections of image 0"),
    ],
)
def test_a_difference_is_found_where_it_begins(files, capsys, monkeypatch, field, value, stage):
    pytest.importorskip("torch")
    images, checkpoint = files
    settings = crosscheck.settings

    def changed(*args):
        config = part = settings(*args)
        *parts, name = field.split(".")
        for p in parts:
            part = part[p]
        assert name in part
        part[name] = value
        return config

    monkeypatch.setattr(crosscheck, "settings", changed)
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


def test_without_images_the_usage_is_wrong(files):
    with pytest.raises(UsageError, match="at least one image"):
        crosscheck.main((), files[1])


# ---------------------------------------------------------------------------- mmdetection's words

CONFIGS = {
    "gfl": {"bbox_head.type": "GFLHead", "bbox_head.reg_max": 16, "train_cfg.assigner.topk": 9},
    "atss": {
        "bbox_head.type": "ATSSHead",
        "bbox_head.bbox_coder.target_stds": [0.1, 0.1, 0.2, 0.2],
        "bbox_head.anchor_generator.octave_base_scale": 8,
        "bbox_head.loss_bbox.type": "GIoULoss",
        "neck.add_extra_convs": "on_output",
    },
    "fcos": {
        "bbox_head.type": "FCOSHead",
        "bbox_head.norm_on_bbox": False,
        "bbox_head.centerness_on_reg": False,
        "bbox_head.center_sampling": False,
        "bbox_head.conv_bias": "auto",
        "bbox_head.loss_bbox.type": "IoULoss",
        "backbone.style": "caffe",
        "neck.relu_before_extra_convs": True,
        "data_preprocessor.bgr_to_rgb": False,
    },
    "fcos_center": {"bbox_head.center_sampling": True, "bbox_head.center_sample_radius": 1.5},
    "fcos_improved": {
        "bbox_head.norm_on_bbox": True,
        "bbox_head.centerness_on_reg": True,
        "bbox_head.center_sampling": True,
        "bbox_head.conv_bias": True,
        "bbox_head.loss_bbox.type": "GIoULoss",
        "test_cfg.nms.iou_threshold": 0.6,
    },
    "retinanet": {
        "bbox_head.type": "RetinaHead",
        "bbox_head.norm_cfg": None,
        "bbox_head.anchor_generator.scales_per_octave": 3,
        "bbox_head.loss_bbox.type": "L1Loss",
        "train_cfg.assigner.neg_iou_thr": 0.4,
        "train_cfg.assigner.gt_max_assign_all": True,
        "neck.add_extra_convs": "on_input",
    },
    "foveabox": {
        "bbox_head.type": "FoveaHead",
        "bbox_head.base_edge_list": [16, 32, 64, 128, 256],
        "bbox_head.sigma": 0.4,
        "bbox_head.loss_bbox.beta": 0.11,
        "bbox_head.loss_cls.gamma": 1.5,
        "neck.add_extra_convs": "on_input",
    },
    "ssd512": {
        "bbox_head.type": "SSDHead",
        "bbox_head.in_channels": (512, 1024, 512, 256, 256, 256, 256),
        "bbox_head.anchor_generator.basesize_ratio_range": (0.1, 0.9),
        "neck.level_strides": (2, 2, 2, 2, 1),
        "train_cfg.assigner.gt_max_assign_all": False,
        "train_cfg.neg_pos_ratio": 3,
        "test_cfg.max_per_img": 200,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_system_has_its_config_in_mmdetection(name):
    config = mmdet_config.model_config(crosscheck.settings(getattr(systems, name), 80))
    found = {}
    for field in CONFIGS[name]:
        value = config
        for part in field.split("."):
            value = value[part]
        found[field] = value
    assert found == CONFIGS[name]
    # FoveaBox alone keeps boxes without area.
    assert ("min_bbox_size" in config["test_cfg"]) == (name != "foveabox")


@pytest.mark.parametrize(
    ("system", "change", "messages"),
    [
        ("atss", {"quality": QualityBranch("iou")}, ["ATSSHead", "QualityBranch(measure=iou)"]),
        ("atss", {"box": GeneralDistribution()}, ["GeneralDistribution(n=16, delta=1.0)"]),
        ("gfl", {"box": GeneralDistribution(delta=0.5)}, ["detector.box.delta 0.5 (only 1)"]),
        ("gfl", {"min_weight": 0.5, "counting": "batch"}, ["min_weight 0.5", "counting batch"]),
        ("fcos", {"box": Distances("relu", "pixels")}, ["activation=relu, unit=pixels"]),
        ("retinanet", {"box_loss": Overlap()}, ["RetinaHead", "detector.box_loss Overlap"]),
        ("foveabox", {"assigner": assign.ATSS()}, ["detector.assigner ATSS(topk=9) (only Fovea"]),
    ],
)
def test_choices_without_counterpart_are_named(system, change, messages):
    experiment = systems.variant(getattr(systems, system), detector=change)
    with pytest.raises(ValueError) as error:
        mmdet_config.model_config(crosscheck.settings(experiment, 80))
    for message in ["no counterpart for", *messages]:
        assert message in str(error.value)


def test_the_script_for_mmdetection_needs_no_jax(tmp_path):
    """It runs up to the missing mmdetection, without jax and without this package."""
    (tmp_path / "blocked").mkdir()
    for name in ("jax", "gfl_jax", "mmdet"):
        (tmp_path / "blocked" / f"{name}.py").write_text("raise ImportError('blocked')")
    done = subprocess.run(
        [sys.executable, mmdet_stages.__file__, "job.npz", "out.npz"],
        env={"PYTHONPATH": str(tmp_path / "blocked")},
        check=False,
    )
    assert done.returncode == mmdet_stages.MISSING


@pytest.fixture
def interpreter(tmp_path):
    """interpreter(status): stands for a python that says 'hello' and ends with this status."""

    def make(status):
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\necho hello\nexit {status}\n")
        file.chmod(0o755)
        return str(file)

    return make


def test_how_the_other_program_ends(interpreter):
    job = {"config": json.dumps(crosscheck.settings(systems.gfl, 80))}
    with pytest.raises(ValueError, match=r"^hello$"):
        crosscheck.run_reference(job, interpreter(mmdet_stages.REFUSED))
    with pytest.raises(RuntimeError, match=r"failed:\nhello"):
        crosscheck.run_reference(job, interpreter(1))


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (systems.atss, "detector.box Deltas"),
        (systems.fcos, "detector.priors Points"),
        (systems.ssd512, "detector.priors SSDBoxes"),
        (systems.variant(systems.gfl, model={"channel_order": "bgr"}), "channel_order bgr"),
        (systems.variant(systems.gfl, model={"backbone": Backbone(caffe=True)}), "caffe True"),
    ],
)
def test_the_plain_model_is_a_gfl_only(interpreter, experiment, message):
    job = {"config": json.dumps(crosscheck.settings(experiment, 80))}
    with pytest.raises(RuntimeError, match=rf"mmdetection is not installed .* --python.*{message}"):
        crosscheck.run_reference(job, interpreter(mmdet_stages.MISSING))


def test_ssd_sees_images_of_its_own_size_only(tmp_path, files):
    experiment = systems.variant(systems.ssd512, model={"width": 4})
    network = Network(experiment.model, experiment.detector.predicts(5))
    variables = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(lambda: network.init(0))
    )
    arrays = convert.state_dict(network, variables, experiment.detector)
    save_file(arrays, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"--scale is \(640, 512\).*\(512, 512\)"):
        crosscheck.main(files[0], tmp_path / "x.safetensors", scale=(640, 512))


def test_stages_have_the_names_that_people_use():
    names = ["backbone.0", "feature.P3", "head.quality.P3", "loss.loss_iou", "input"]
    titles = ["C2", "P3", "P3 quality_logits", "loss_iou", "input"]
    assert [crosscheck.title(name) for name in names] == titles
    assert [crosscheck.title(f"backbone.{i}", ssd=True) for i in (0, 1)] == ["conv4_3", "fc7"]


def test_a_loss_that_is_left_out_counts_as_zero():
    rows = crosscheck.compare({}, {"loss.loss_bbox": np.array(0.0)}, Inference())
    assert not rows[0].where
    rows = crosscheck.compare({}, {"loss.loss_bbox": np.array(0.1)}, Inference())
    assert rows[0].where
