"""A detector or backbone is found whatever stands before the names of its arrays."""

import numpy as np
import pytest

from gfl_jax.interop.names import Mismatch, in_short
from gfl_jax.interop.parts import backbone_part, detector_part

BACKBONE = ["conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.1.bn2.weight"]
DETECTOR = [*(f"backbone.{name}" for name in BACKBONE), "neck.fpn_convs.0.conv.weight"]
DETECTOR += ["bbox_head.cls_convs.0.conv.weight", "bbox_head.gfl_cls.weight"]


def arrays(*names, first=0):
    return {name: np.array(first + i) for i, name in enumerate(names)}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "model.module.", "net."])
def test_what_all_names_begin_with_is_left_away(prefix):
    part = detector_part(arrays(*(prefix + name for name in DETECTOR)))
    assert part == ("detector", arrays(*DETECTOR), [])
    part = backbone_part(arrays(*(prefix + name for name in BACKBONE)))
    assert part == ("backbone", arrays(*BACKBONE), [])


def test_compiled_modules_inside_are_no_others():
    names = [name.replace("layer1", "layer1._orig_mod") for name in DETECTOR]
    assert detector_part(arrays(*names)).arrays == arrays(*DETECTOR)


@pytest.mark.parametrize(
    ("prefix", "others"),
    [
        ("", ["fc.weight"]),
        ("backbone.", ["head.fc.weight", "head.fc.bias"]),  # mmpretrain
        ("backbone.body.", ["backbone.fpn.x.weight", "head.classification_head.conv.0.weight"]),
        ("model.backbone.", ["model.roi_head.bbox_head.fc_cls.weight", "loss.weight"]),
    ],
    ids=["torchvision", "mmpretrain", "torchvision_detector", "two_stages"],
)
def test_the_backbone_of_a_classifier_or_detector_is_taken(prefix, others):
    given = arrays(*(prefix + name for name in BACKBONE), *others)
    assert detector_part(given) is None
    assert backbone_part(given) == ("backbone", arrays(*BACKBONE), others)


def test_the_vgg_of_a_classifier_is_taken():
    part = backbone_part(arrays("module.features.0.weight", "module.classifier.0.weight"))
    assert part == ("backbone", arrays("features.0.weight"), ["module.classifier.0.weight"])


@pytest.mark.parametrize(
    "twin",
    [
        lambda name: "ema_" + name.replace(".", "_"),  # mmdetection 2.x
        lambda name: f"ema_model.module.{name}",
        lambda name: f"model_ema.{name}",
        lambda name: f"ema.{name}",
    ],
)
def test_averaged_twins_are_left_or_taken(twin):
    averaged = [name for name in DETECTOR if "running" not in name]
    given = arrays(*DETECTOR) | arrays(*map(twin, averaged), first=100)
    part = detector_part(given)
    assert part.arrays == arrays(*DETECTOR)
    assert len(part.left_out) == len(averaged)
    taken = detector_part(given, ema=True)
    statistics = {"backbone.bn1.running_mean": np.array(1)}
    assert taken.arrays == statistics | arrays(*averaged, first=100)
    assert len(taken.left_out) == len(averaged)


def test_averages_are_taken_where_there_is_nothing_else_and_missed_where_there_are_none():
    part = detector_part(arrays(*(f"model_ema.module.{name}" for name in DETECTOR)))
    assert part.arrays == arrays(*DETECTOR)
    with pytest.raises(ValueError, match="no names of the file say that their arrays are averages"):
        detector_part(arrays(*DETECTOR), ema=True)


def test_two_detectors_are_one_too_many():
    given = arrays(*(f"{who}.{name}" for who in ("student", "teacher") for name in DETECTOR))
    with pytest.raises(
        ValueError, match=r"several networks, .* student\., teacher\.: save the one"
    ):
        detector_part(given)


def test_what_is_neither_says_what_its_names_begin_with():
    names = [f"model.{i}.conv.weight" for i in range(40)]
    with pytest.raises(
        ValueError, match=r"begin with model\.0 .* other beginnings|model\.0"
    ) as error:
        backbone_part(arrays(*(f"{name}.{k}" for name in names for k in range(3))))
    assert "model.0 (3 names), model.1 (3 names)" in str(error.value)
    assert len(str(error.value)) < 600


def test_no_message_has_hundreds_of_lines():
    names = tuple(f"backbone.layer{i % 4}.{i}.weight" for i in range(300))
    with pytest.raises(ValueError, match="does not fit the model") as error:
        Mismatch(names, names, tuple((name, (1,), (2,)) for name in names)).raise_if_any("x.pth")
    assert len(str(error.value).splitlines()) < 35
    assert in_short(names).count("(75 names)") == 4
    assert in_short([]) == "none"
