"""A new run begins with the weights of another detector, of this project or mmdetection's."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gfl_jax import systems
from gfl_jax.config import Experiment
from gfl_jax.interop import convert
from gfl_jax.interop.classes import class_outputs
from gfl_jax.interop.initial import initial_weights
from gfl_jax.interop.names import torch_name
from gfl_jax.models.network import Network
from gfl_jax.models.ssd import SSDModel
from gfl_jax.run import describe
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.step import TrainState

OLD = ["person", "dog", "car"]
NEW = ["bolt", "dog", "nut", "person"]
SYSTEMS = ["gfl", "atss", "fcos", "fcos_improved", "foveabox", "retinanet", "ssd512"]


def small(name, width=8):
    system = getattr(systems, name)
    if isinstance(system.model, SSDModel):
        return systems.variant(system, model={"width": 4})
    parts = {
        "backbone": dataclasses.replace(system.model.backbone, depth=18, width=width),
        "neck": dataclasses.replace(system.model.neck, width=16),
        "head": dataclasses.replace(system.model.head, width=32, stacked_convs=1),
    }
    return systems.variant(system, model=parts)


def network_of(experiment: Experiment, names):
    return Network(experiment.model, experiment.detector.predicts(len(names)))


def numbers(network, seed):
    """Variables in which no two numbers are the same."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(lambda: network.init(0))
    return network.replaced(
        abstract,
        {p: rng.normal(size=x.shape).astype("f4") for p, x in network.by_path(abstract).items()},
    )


def in_torch(experiment, network, variables):
    return convert.state_dict(network, variables, experiment.detector)


def run_of(folder, experiment, names, seed=1):
    """A work directory with a checkpoint, and its arrays."""
    network = network_of(experiment, names)
    variables = numbers(network, seed)
    state = TrainState(np.int32(3), variables, (), {})
    with Checkpoints(folder / "checkpoints") as checkpoints:
        about = describe(experiment, range(1, len(names) + 1), names)
        checkpoints.save(3, jax.tree.map(np.asarray, state).items(), about)
    return in_torch(experiment, network, variables)


def begun(experiment, source, names, monkeypatch):
    """The arrays that a run with `init_from` begins with, and those it has at random."""
    experiment = systems.variant(experiment, model={"init_from": str(source)})
    network = network_of(experiment, names)
    random = numbers(network, 2)
    monkeypatch.setattr(network, "init", lambda seed: random)
    found = initial_weights(experiment, network, names)
    return in_torch(experiment, network, found), in_torch(experiment, network, random)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_detector_takes_all_but_the_outputs_of_other_classes(
    tmp_path, monkeypatch, capsys, name
):
    experiment = small(name)
    old = run_of(tmp_path, experiment, OLD)
    found, random = begun(experiment, tmp_path, NEW, monkeypatch)
    outputs = class_outputs(experiment)
    assert outputs.keys() <= found.keys()
    for array in found.keys() - outputs.keys():
        np.testing.assert_array_equal(found[array], old[array], err_msg=array)
    background = experiment.detector.classification.channels(0)
    assert background == (name == "ssd512")
    for array, per_cell in outputs.items():
        rows = [x[array].reshape(per_cell, -1, *x[array].shape[1:]) for x in (found, random, old)]
        for label, of in enumerate(NEW):
            expected = rows[2][:, OLD.index(of)] if of in OLD else rows[1][:, label]
            np.testing.assert_array_equal(rows[0][:, label], expected)
        if background:
            np.testing.assert_array_equal(rows[0][:, -1], rows[2][:, -1])
    said = capsys.readouterr().out
    assert "classes taken over: dog, person; new: bolt, nut" in said
    assert "random: none" in said and len(said.splitlines()) == 4


def test_a_file_of_mmdetection_is_as_good_as_a_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    experiment = small("retinanet")
    old = run_of(tmp_path / "run", experiment, OLD)
    found = [begun(experiment, tmp_path / "run", NEW, monkeypatch)[0]]
    convert.main(tmp_path / "run", tmp_path / "x.pth")
    found.append(begun(experiment, tmp_path / "x.pth", NEW, monkeypatch)[0])
    for name in found[0]:
        np.testing.assert_array_equal(found[1][name], found[0][name])
    capsys.readouterr()
    save_file({"module." + k: v for k, v in old.items()}, tmp_path / "x.safetensors")
    nameless, random = begun(experiment, tmp_path / "x.safetensors", NEW, monkeypatch)
    np.testing.assert_array_equal(
        nameless["bbox_head.retina_cls.weight"], random["bbox_head.retina_cls.weight"]
    )
    np.testing.assert_array_equal(
        nameless["neck.fpn_convs.0.conv.weight"], old["neck.fpn_convs.0.conv.weight"]
    )
    said = capsys.readouterr().out
    assert "classes taken over: none" in said
    assert "does not say on what pixels it was trained" in said


def test_what_does_not_fit_is_named_in_few_lines(tmp_path, monkeypatch, capsys):
    old = run_of(tmp_path, small("gfl"), OLD)
    found, random = begun(small("atss"), tmp_path, OLD, monkeypatch)
    said = capsys.readouterr().out
    # Its class outputs play the same part under another name.
    assert "classes taken over: person, dog, car; new: none" in said
    assert "bbox_head.atss_centerness (2 names), bbox_head.atss_reg (2 names)\n" in said
    assert "left out: bbox_head.gfl_reg (2 names)\n" in said
    assert len(said.splitlines()) == 4
    for leaf in ("weight", "bias"):
        np.testing.assert_array_equal(
            found[f"bbox_head.atss_cls.{leaf}"], old[f"bbox_head.gfl_cls.{leaf}"]
        )
    np.testing.assert_array_equal(
        found["bbox_head.atss_reg.weight"], random["bbox_head.atss_reg.weight"]
    )


def test_class_outputs_of_another_width_are_left_out_as_a_whole(tmp_path, monkeypatch, capsys):
    run_of(tmp_path, small("gfl"), OLD)
    wide = dataclasses.replace(small("gfl").model.head, width=64)
    found, random = begun(
        systems.variant(small("gfl"), model={"head": wide}), tmp_path, OLD, monkeypatch
    )
    assert "class outputs are not like this model's (width, priors" in capsys.readouterr().out
    for leaf in ("weight", "bias"):
        np.testing.assert_array_equal(
            found[f"bbox_head.gfl_cls.{leaf}"], random[f"bbox_head.gfl_cls.{leaf}"]
        )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ssd512", "gfl", r"has a VGG of width 4, this model has a ResNet.* another kind of netw"),
        ("gfl", "ssd512", r"has a ResNet.*, this model has a VGG of width 4.* another kind of net"),
    ],
)
def test_another_kind_of_network_is_said_before_its_pixels(
    tmp_path, monkeypatch, old, new, message
):
    run_of(tmp_path, small(old), OLD)
    with pytest.raises(ValueError, match=message):
        begun(small(new), tmp_path, OLD, monkeypatch)


def test_the_flag_of_the_backbone_is_the_models_own(tmp_path, monkeypatch):
    run_of(tmp_path, small("ssd512"), OLD)
    wider = systems.variant(small("ssd512"), model={"width": 8})
    with pytest.raises(ValueError, match=r"make --model.width like the checkpoint's"):
        begun(wider, tmp_path, OLD, monkeypatch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (1.0, 2.0, 3.0)}, r"other pixels .* --model.mean 123.675 116.28 103.53$"),
        ({"channel_order": "bgr"}, r"--model.channel-order rgb$"),
        (
            {"backbone": dataclasses.replace(small("gfl", 16).model.backbone)},
            r"has a ResNet-18 of width 8, this model has a ResNet-18 of width 16: make",
        ),
        (
            {"backbone": dataclasses.replace(small("gfl").model.backbone, caffe=True)},
            r"--model.backbone.no-caffe$",
        ),
    ],
    ids=["mean", "bgr", "width", "caffe"],
)
def test_another_backbone_or_other_pixels_are_refused(tmp_path, monkeypatch, change, message):
    run_of(tmp_path, small("gfl"), OLD)
    experiment = systems.variant(small("gfl"), model=change)
    with pytest.raises(ValueError, match=message):
        begun(experiment, tmp_path, NEW, monkeypatch)


def test_what_is_not_there_or_no_detector_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"--model.init-from .*none: there is no such work"):
        begun(small("gfl"), tmp_path / "none", NEW, monkeypatch)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        begun(small("gfl"), tmp_path / "empty", NEW, monkeypatch)
    save_file({"layer1.0.conv1.weight": np.zeros(3, "f4")}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"no detector, .*--model.backbone.pretrained"):
        begun(small("gfl"), tmp_path / "x.safetensors", NEW, monkeypatch)


def test_a_name_that_stands_twice_takes_no_row(tmp_path, monkeypatch):
    experiment = small("gfl")
    run_of(tmp_path, experiment, ["dog", "dog", "car"])
    found, random = begun(experiment, tmp_path, ["dog", "bolt"], monkeypatch)
    np.testing.assert_array_equal(
        found["bbox_head.gfl_cls.weight"], random["bbox_head.gfl_cls.weight"]
    )
    assert torch_name(("bbox_head", "gfl_cls", "kernel")) in found
