"""PyTorch checkpoints in and out, strictly and bit by bit."""

import dataclasses
import errno
import json
import pickle
import re
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gfl_jax import systems
from gfl_jax.config import Experiment
from gfl_jax.detectors.box import GeneralDistribution
from gfl_jax.detectors.classification import QualityFocal
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.quality import JointQuality, QualityBranch
from gfl_jax.interop import convert, recognize
from gfl_jax.interop.classes import class_outputs
from gfl_jax.interop.detector_file import read_detector, state_dict
from gfl_jax.interop.names import torch_name
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.models.ssd import SSDModel
from gfl_jax.paths import as_path
from gfl_jax.run import describe, experiment_of
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.step import TrainState, abstract_state, init_state, sgd

NAMES = ["cat", "dog", "owl"]


# One for each kind of checkpoint: FCOS with center sampling has the arrays of FCOS without.
SYSTEMS = ["gfl", "atss", "fcos", "fcos_improved", "foveabox", "retinanet", "ssd512"]


def small(depth=18, width=8, n=4, delta=1.0, stacked_convs=1):
    model = Model(Backbone(depth, width), Neck(32), Head(width=32, stacked_convs=stacked_convs))
    return Experiment(model, Detector(box=GeneralDistribution(n, delta)))


def small_system(name):
    """A system as small as it gets."""
    system = getattr(systems, name)
    if isinstance(system.model, SSDModel):
        return systems.variant(system, model={"width": 4})
    parts = {
        "backbone": dataclasses.replace(system.model.backbone, depth=18, width=8),
        "neck": dataclasses.replace(system.model.neck, width=16),
        "head": dataclasses.replace(system.model.head, width=32, stacked_convs=1),
    }
    return systems.variant(system, model=parts)


def zeros(experiment, classes):
    """A detector's state dict without any memory."""
    network = Network(experiment.model, experiment.detector.predicts(classes))
    abstract = jax.eval_shape(lambda: network.init(0))
    return {
        torch_name(path): np.broadcast_to(
            np.float32(0), (x.shape[3], x.shape[2], *x.shape[:2]) if len(x.shape) == 4 else x.shape
        )
        for path, x in network.by_path(abstract).items()
    }


def random_state_dict(experiment, seed=0):
    """A detector's state dict in torch's names and layout, in numbers of every kind."""
    network = Network(experiment.model, experiment.detector.predicts(len(NAMES)))
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(lambda: network.init(0))
    variables = network.replaced(
        abstract,
        {
            path: np.asarray(rng.normal(size=array.shape), np.float32)
            for path, array in network.by_path(abstract).items()
        },
    )
    return state_dict(network, variables, experiment.detector)


@pytest.fixture
def annotations(tmp_path):
    file = tmp_path / "instances.json"
    categories = [{"id": 9 - i, "name": name} for i, name in enumerate(reversed(NAMES))]
    file.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    return str(file)


def restored(folder):
    checkpoints = Checkpoints.find(folder)
    about = checkpoints.about()
    experiment = experiment_of(about)
    names = about["category_names"]
    network = Network(experiment.model, experiment.detector.predicts(len(names)))
    state = TrainState.from_items(
        checkpoints.restore(abstract_state(network, experiment.train).items())
    )
    return network, state, experiment, about


@pytest.mark.parametrize(
    "given",
    [small(), small(delta=0.5), *map(small_system, ["atss", "fcos_improved", "retinanet"])],
    ids=["gfl", "gfl_delta", "atss", "fcos_improved", "retinanet"],
)
def test_a_detector_becomes_a_checkpoint_of_step_0(tmp_path, annotations, given):
    expected = random_state_dict(given)
    save_file(expected, tmp_path / "x.safetensors")
    convert.main(tmp_path / "x.safetensors", tmp_path / "run", annotations=annotations)
    network, state, experiment, about = restored(tmp_path / "run")
    assert int(state.step) == 0
    assert experiment == given
    assert about == describe(experiment, [7, 8, 9], NAMES)
    found = state_dict(network, state.variables, experiment.detector)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    for momentum in jax.tree.leaves(state.optimizer):
        assert not np.any(momentum)


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_sizes_are_told_from_the_arrays(depth):
    experiment = small(depth, width=16, n=7, delta=2.0, stacked_convs=3)
    arrays = zeros(experiment, len(NAMES)) | {"bbox_head.integral.project": 2.0 * np.arange(8)}
    assert recognize.infer_experiment(arrays) == experiment
    assert recognize.count_classes(arrays, experiment) == len(NAMES)


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_are_told_from_their_names(name):
    system = getattr(systems, name)
    arrays = zeros(system, 80)
    assert recognize.infer_experiment(arrays) == system
    assert recognize.count_classes(arrays, system) == 80
    assert recognize.modern_names(arrays).keys() == arrays.keys()


def test_classes_are_counted_without_background_where_there_is_one():
    quality = {"classification": QualityFocal(), "quality": JointQuality()}
    joint = systems.variant(systems.ssd512, detector=quality)
    assert recognize.count_classes(zeros(joint, 80), joint) == 80
    message = r"retina_cls.weight has 80 channels, not a multiple of the 9 priors"
    arrays = {"bbox_head.retina_cls.weight": np.zeros((80, 8, 3, 3))}
    with pytest.raises(ValueError, match=message):
        recognize.count_classes(arrays, systems.retinanet)
    with pytest.raises(ValueError, match=r"bbox_head.cls_convs.0.0.weight is missing"):
        recognize.count_classes(arrays, systems.ssd512)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["vfnet_cls", "vfnet_reg"], "vfnet_cls, vfnet_reg"),
        (["atss_cls", "atss_reg", "atss_iou"], "atss_cls, atss_iou, atss_reg"),
        (["cls_convs.0.gn", "conv_cls", "conv_reg"], "cls_convs, conv_cls, conv_reg"),
        ([], "nothing"),
    ],
)
def test_unknown_heads_are_named(names, found):
    arrays = {f"bbox_head.{name}.weight": np.zeros(3) for name in names}
    with pytest.raises(
        ValueError, match=f"not a detector .*: its bbox_head has {found}; there are"
    ):
        recognize.infer_experiment(arrays)


def test_only_what_a_detector_has_is_written():
    for name in ("gfl", "ssd512"):
        arrays = random_state_dict(small_system(name))
        assert ("bbox_head.integral.project" in arrays) == (name == "gfl")
        batch_norms = [n for n in arrays if n.endswith("num_batches_tracked")]
        assert len(batch_norms) == (0 if name == "ssd512" else 20)
    box = {"box": GeneralDistribution(4)}
    variant = systems.variant(small_system("atss"), detector=box)
    assert random_state_dict(variant)["bbox_head.integral.project"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("neck.fpn_convs.3.conv.bias"), r"missing.*\n.*neck.fpn_convs.3.conv.bias"),
        (lambda a: a.update({"more.w": np.zeros(3)}), r"unexpected.*\n.*more.w"),
        (
            lambda a: a.update({"backbone.bn1.bias": np.zeros(5, np.float32)}),
            r"shape.*\n.*backbone.bn1.bias: model \(8,\), file \(5,\)",
        ),
        (lambda a: a.pop("bbox_head.gfl_reg.weight"), "gfl_reg.weight is missing"),
        (lambda a: a.pop("bbox_head.gfl_cls.weight"), "not a detector this project knows"),
        (lambda a: a.pop("backbone.layer3.1.conv1.weight"), "layer3.1.conv1.weight"),
        (
            lambda a: [a.pop(k) for k in list(a) if k.startswith("backbone.layer4.1.")],
            r"stages of \[2, 2, 2, 1\] blocks",
        ),
    ],
)
def test_every_difference_is_named_and_nothing_is_written(tmp_path, annotations, change, message):
    arrays = random_state_dict(small())
    change(arrays)
    save_file(arrays, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        convert.main(tmp_path / "x.safetensors", tmp_path / "run", annotations=annotations)
    assert not (tmp_path / "run").exists()


def test_names_of_old_versions():
    old = ["fcos_cls.weight", "fcos_reg.bias", "fcos_centerness.weight", "fovea_cls.bias"]
    new = ["conv_cls.weight", "conv_reg.bias", "conv_centerness.weight", "conv_cls.bias"]
    array = np.zeros(1)
    for before, after in zip(old, new, strict=True):
        assert list(recognize.modern_names({f"bbox_head.{before}": array})) == [
            f"bbox_head.{after}"
        ]
    for place in ("backbone", "bbox_head"):
        assert list(recognize.modern_names({f"{place}.l2_norm.weight": array})) == [
            "neck.l2_norm.weight"
        ]
    arrays = random_state_dict(small())
    assert recognize.modern_names(arrays).keys() == arrays.keys()


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("fcos", {r"bbox_head\.conv_": "bbox_head.fcos_"}),
        ("foveabox", {r"bbox_head\.conv_": "bbox_head.fovea_"}),
        (
            "ssd512",
            {
                r"neck\.l2_norm": "backbone.l2_norm",
                r"neck\.extra_layers\.(\d)\.(\d)\.conv": lambda match: (
                    f"backbone.extra.{2 * int(match[1]) + int(match[2])}"
                ),
                r"bbox_head\.(cls|reg)_convs\.(\d)\.0": r"bbox_head.\1_convs.\2",
            },
        ),
    ],
)
def test_files_of_old_versions_are_read(tmp_path, name, renamed):
    arrays, old = random_state_dict(small_system(name)), {}
    for new_name, array in arrays.items():
        for new, before in renamed.items():
            new_name = re.sub(new, before, new_name)
        old[new_name] = array
    assert old.keys() != arrays.keys()
    save_file(old, tmp_path / "x.safetensors")
    experiment, classes, network, variables, *_ = read_detector(tmp_path / "x.safetensors")
    assert (experiment, classes) == (small_system(name), len(NAMES))
    found = state_dict(network, variables, experiment.detector)
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, strict=True)


def test_a_backbone_gets_a_random_neck_and_head(tmp_path, annotations):
    arrays = {
        name.removeprefix("backbone."): array
        for name, array in random_state_dict(small(width=64)).items()
        if name.startswith("backbone.")
    }
    arrays |= {"fc.weight": np.zeros((10, 512), np.float32), "fc.bias": np.zeros(10, np.float32)}
    save_file(arrays, tmp_path / "r18.safetensors")
    config = tmp_path / "config.py"
    config.write_text(
        "import dataclasses\nfrom gfl_jax.config import Experiment\n"
        "from gfl_jax.models.fpn import Neck\nfrom gfl_jax.models.heads import Head\n"
        "from gfl_jax.models.network import Backbone, Model\n"
        "experiment = Experiment(Model(Backbone(18), Neck(32), Head(width=32, stacked_convs=1)))\n"
    )
    convert.main(
        tmp_path / "r18.safetensors", tmp_path / "run", str(config), annotations=annotations
    )
    network, state, experiment, _ = restored(tmp_path / "run")
    assert experiment.model == small(width=64).model
    found = state_dict(network, state.variables, experiment.detector)
    for name, array in arrays.items():
        if not name.startswith("fc."):
            np.testing.assert_array_equal(found[f"backbone.{name}"], array)
    kernel = found["bbox_head.gfl_reg.weight"]
    assert 0.005 < kernel.std() < 0.02


def test_a_vgg_becomes_an_ssd(tmp_path, annotations):
    arrays = {
        name.removeprefix("backbone."): array
        for name, array in random_state_dict(small_system("ssd512")).items()
        if name.startswith("backbone.")
    }
    save_file(arrays | {"classifier.6.bias": np.zeros(9)}, tmp_path / "vgg.safetensors")
    convert.main(tmp_path / "vgg.safetensors", tmp_path / "run", annotations=annotations)
    network, state, experiment, _ = restored(tmp_path / "run")
    assert experiment == small_system("ssd512")
    found = state_dict(network, state.variables, experiment.detector)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[f"backbone.{name}"], array)


def test_classes_must_be_known_and_as_many(tmp_path, annotations):
    save_file(random_state_dict(small()), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="--annotations"):
        convert.main(tmp_path / "x.safetensors", tmp_path / "run")
    two = json.loads((tmp_path / "instances.json").read_text())
    two["categories"].pop()
    (tmp_path / "instances.json").write_text(json.dumps(two))
    with pytest.raises(ValueError, match=r"outputs for 3 classes, but .*json names 2"):
        convert.main(tmp_path / "x.safetensors", tmp_path / "run", annotations=annotations)


def written(file, arrays, **meta):
    torch = pytest.importorskip("torch")
    state_dict = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save({"state_dict": state_dict, "meta": meta}, file)
    return file


@pytest.mark.parametrize(
    ("name", "key"),
    [("gfl", "CLASSES"), ("retinanet", "dataset_meta"), ("ssd512", "dataset_meta")],
)
def test_labels_are_mapped_by_name_to_those_of_the_annotations(tmp_path, annotations, name, key):
    given = small_system(name)
    arrays, labels = random_state_dict(given), ["owl", "cat", "dog"]
    meta = {key: labels if key == "CLASSES" else {"classes": labels}}
    file = written(tmp_path / "x.pth", arrays, **meta)
    convert.main(file, tmp_path / "run", annotations=annotations)
    network, state, experiment, about = restored(tmp_path / "run")
    assert (about["category_ids"], about["category_names"]) == ([7, 8, 9], NAMES)
    found = state_dict(network, state.variables, experiment.detector)
    outputs = class_outputs(experiment)
    for array, expected in arrays.items():
        order = [1, 2, 0, 3]
        if n := outputs.get(array):
            channels = len(expected) // n
            rows = expected.reshape(n, channels, *expected.shape[1:])[:, order[:channels]]
            expected = rows.reshape(expected.shape)
        np.testing.assert_array_equal(found[array], expected)


def test_other_classes_than_the_file_names_are_refused(tmp_path, annotations):
    file = written(tmp_path / "x.pth", random_state_dict(small()), CLASSES=("bolt", "nut", "cat"))
    with pytest.raises(
        ValueError, match=r"bolt, nut, cat, .* has cat, dog, owl: .*--model.init-from"
    ):
        convert.main(file, tmp_path / "run", annotations=annotations)
    file = written(tmp_path / "y.pth", random_state_dict(small()), CLASSES=("bolt", "nut"))
    with pytest.raises(ValueError, match="outputs for 3 classes, but it names 2: bolt, nut"):
        convert.main(file, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_without_words_is_warned_of(tmp_path, annotations):
    save_file(random_state_dict(small()), tmp_path / "x.safetensors")
    with pytest.warns(UserWarning) as caught:
        convert.main(tmp_path / "x.safetensors", tmp_path / "run", annotations=annotations)
    said = " ".join(str(warning.message) for warning in caught)
    assert "does not name its classes: they are taken to be cat, dog, owl" in said
    assert "does not hold its config; it is taken to be trained with --model.mean" in said


def test_a_detector_of_caffes_style_is_converted_as_one(tmp_path):
    given = small_system("retinanet")
    text = (
        "img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)\n"
        "model = dict(backbone=dict(style='caffe'))"
    )
    file = written(tmp_path / "x.pth", random_state_dict(given), CLASSES=NAMES, config=text)
    convert.main(file, tmp_path / "run")
    model = restored(tmp_path / "run")[2].model
    assert (model.channel_order, model.std, model.backbone.caffe) == ("bgr", (1, 1, 1), True)


class Evil:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def test_a_file_that_holds_code_is_refused(tmp_path, annotations):
    with zipfile.ZipFile(tmp_path / "evil.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"state_dict": Evil(tmp_path / "executed")}))
    with pytest.raises(ValueError, match=r"rejected: it names the global '.*open'"):
        convert.main(tmp_path / "evil.pth", tmp_path / "run", annotations=annotations)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- with torch


@pytest.mark.parametrize(
    ("classes", "given"),
    [
        ("CLASSES", small()),
        ("dataset_meta", small()),
        ("dataset_meta", small_system("fcos_improved")),
        ("dataset_meta", small_system("ssd512")),
        *[
            pytest.param("dataset_meta", small_system(name), marks=pytest.mark.slow)
            for name in ("atss", "fcos", "foveabox", "retinanet")
        ],
    ],
    ids=["CLASSES", "gfl", "fcos_improved", "ssd512", "atss", "fcos", "foveabox", "retinanet"],
)
def test_a_round_trip_keeps_every_bit(tmp_path, classes, given):
    torch = pytest.importorskip("torch")
    expected = random_state_dict(given)
    meta = {"CLASSES": NAMES} if classes == "CLASSES" else {"dataset_meta": {"classes": NAMES}}
    state_dict = {k: torch.from_numpy(v) for k, v in expected.items()}
    torch.save({"state_dict": state_dict, "meta": meta}, tmp_path / "in.pth")
    convert.main(tmp_path / "in.pth", tmp_path / "run")
    convert.main(tmp_path / "run", tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written["state_dict"].keys() == expected.keys()
    for name, array in expected.items():
        found = written["state_dict"][name].numpy()
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
    assert written["meta"]["dataset_meta"]["classes"] == tuple(NAMES)

    # What was written comes in again with its experiment, whatever the arrays alone tell.
    convert.main(tmp_path / "out.pth", tmp_path / "again")
    assert restored(tmp_path / "again")[2:] == restored(tmp_path / "run")[2:]


def test_the_experiment_travels_with_the_file(tmp_path, annotations):
    pytest.importorskip("torch")
    experiment = small(delta=0.5)
    detector = dataclasses.replace(experiment.detector, dfl_weight=0.5)
    save_file(random_state_dict(experiment), tmp_path / "x.safetensors")
    config = tmp_path / "config.py"
    config.write_text(
        "from gfl_jax.config import *\nfrom gfl_jax.detectors.dense import *\n"
        "from gfl_jax.models.network import *\n"
        "model = Model(Backbone(18, 8), Neck(32), Head(width=32, stacked_convs=1))\n"
        "detector = Detector(box=GeneralDistribution(4, 0.5), dfl_weight=0.5)\n"
        "experiment = Experiment(model, detector)\n"
    )
    convert.main(tmp_path / "x.safetensors", tmp_path / "a", str(config), annotations)
    convert.main(tmp_path / "a", tmp_path / "x.pth")
    convert.main(tmp_path / "x.pth", tmp_path / "b")
    assert restored(tmp_path / "b")[2].detector == detector


@pytest.mark.parametrize(
    "change",
    [{"quality": QualityBranch("iou")}, {"box": GeneralDistribution(4)}],
    ids=["iou_branch", "distribution"],
)
def test_detectors_unknown_to_mmdetection_are_written_and_read(tmp_path, change):
    pytest.importorskip("torch")
    experiment = systems.variant(small_system("atss"), detector=change)
    network = Network(experiment.model, experiment.detector.predicts(len(NAMES)))
    state = init_state(network.init(1), sgd(experiment.train, lambda step: 0.0), experiment.train)
    checkpoints = Checkpoints(tmp_path / "a/checkpoints")
    about = describe(experiment, [7, 8, 9], NAMES)
    checkpoints.save(0, jax.tree.map(np.asarray, state).items(), about)
    checkpoints.close()
    convert.main(tmp_path / "a", tmp_path / "x.pth")
    convert.main(tmp_path / "x.pth", tmp_path / "b")
    _, found, *rest = restored(tmp_path / "b")
    assert rest == [experiment, about]
    jax.tree.map(np.testing.assert_array_equal, found.variables, state.variables)


def test_what_an_interrupted_conversion_left_is_no_checkpoint(tmp_path, annotations):
    save_file(random_state_dict(small()), tmp_path / "x.safetensors")
    (tmp_path / "run" / "checkpoints" / "0.orbax-checkpoint-tmp").mkdir(parents=True)
    convert.main(tmp_path / "x.safetensors", tmp_path / "run", annotations=annotations)
    assert restored(tmp_path / "run")


def test_a_file_that_could_not_be_written_leaves_nothing(tmp_path, annotations, monkeypatch):
    pytest.importorskip("torch")
    save_file(random_state_dict(small()), tmp_path / "x.safetensors")
    convert.main(tmp_path / "x.safetensors", tmp_path / "run", annotations=annotations)

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(as_path(tmp_path)), "write_bytes", full)
    with pytest.raises(
        OSError, match=r"y\.pth could not be written: No space left.*free some space"
    ):
        convert.main(tmp_path / "run", tmp_path / "y.pth")
    assert not list(tmp_path.glob("y.pth*"))


def test_nothing_is_overwritten(tmp_path, annotations):
    pytest.importorskip("torch")
    save_file(random_state_dict(small()), tmp_path / "x.safetensors")
    convert.main(tmp_path / "x.safetensors", tmp_path / "run", annotations=annotations)
    with pytest.raises(ValueError, match="already holds checkpoints"):
        convert.main(tmp_path / "x.safetensors", tmp_path / "run", annotations=annotations)
    (tmp_path / "mine.pth").write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        convert.main(tmp_path / "run", tmp_path / "mine.pth")
    assert (tmp_path / "mine.pth").read_text() == "precious"
    with pytest.raises(ValueError, match=r"DST must be a .pth"):
        convert.main(tmp_path / "run", tmp_path / "other")
