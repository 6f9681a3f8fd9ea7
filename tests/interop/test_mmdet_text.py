"""What mmdetection's config in a checkpoint says is done, or refused with what would be right."""

import dataclasses
import warnings

import pytest

from gfl_jax import systems
from gfl_jax.interop.mmdet_text import (
    as_said,
    checked,
    config_in,
    contradictions,
    fields_said,
    pixel_contradictions,
)

CAFFE_2 = """
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='Normalize', **img_norm_cfg)]
model = dict(
    type='RetinaNet',
    backbone=dict(
        type='ResNet', depth=50, frozen_stages=1, norm_cfg=dict(type='BN', requires_grad=False),
        style='caffe'),
    neck=dict(type='FPN', add_extra_convs='on_input', num_outs=5),
    bbox_head=dict(
        type='RetinaHead', num_classes=80,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[1.0, 1.0, 1.0, 1.0])),
    test_cfg=dict(nms_pre=1000, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6),
                  max_per_img=300))
"""
CAFFE_3 = """
model = dict(
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675],
                           std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(type='ResNet', norm_cfg=dict(requires_grad=False), style='caffe'),
    test_cfg=dict(nms=dict(iou_threshold=0.6, type='nms'), max_per_img=300))
"""


@pytest.mark.parametrize("meta", [{"config": CAFFE_2}, {"cfg": CAFFE_3}], ids=["2.x", "3.x"])
def test_a_checkpoint_of_caffes_style_is_one(meta):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checked(systems.retinanet, meta, "x.pth", named=False)
    model = found.model
    assert (model.mean, model.std) == ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
    assert model.channel_order == "bgr"
    assert model.backbone.caffe and not model.backbone.train_norm
    assert (found.detector.inference.nms_iou, found.detector.inference.max_per_image) == (0.6, 300)
    backbone = dataclasses.replace(model.backbone, caffe=False, train_norm=True)
    pixels = {name: getattr(systems.gfl.model, name) for name in ("mean", "std", "channel_order")}
    again = systems.variant(found, model=pixels | {"backbone": backbone})
    assert again.model == systems.retinanet.model  # and nothing else has changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model = dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2])))",
            r"x.pth says .*target_stds \[0.1, .* 0.2\], here \[1.0, .* 1.0\].*--config",
        ),
        ("model = dict(bbox_head=dict(anchor_generator=dict(center_offset=0.5)))", "offset 0.5"),
        ("model = dict(neck=dict(add_extra_convs='on_output'))", "on_output, here on_input"),
        ("test_cfg = dict(nms=dict(type='soft_nms'))", "soft_nms, here nms"),
        (
            "a = dict(mean=[1, 2, 3], std=[1, 1, 1])\nb = dict(mean=[1, 2, 4], std=[1, 1, 1])",
            "than",
        ),
        ("model = dict(test_cfg=dict(max_per_img=3.5))", "3.5 where .*max_per_image is 100"),
    ],
    ids=["stds", "offset", "neck", "nms", "pixels", "kind"],
)
def test_what_contradicts_the_arrays_is_refused_and_of_a_named_config_a_warning(text, message):
    with pytest.raises(ValueError, match=message):
        checked(systems.retinanet, {"cfg": text}, "x.pth", named=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert checked(systems.retinanet, {"cfg": text}, "x.pth", named=True) == systems.retinanet
    assert [w for w in caught if "x.pth says of itself" in str(w.message)] == caught


def test_without_a_config_it_is_said_what_is_assumed():
    with pytest.warns(UserWarning, match=r"--model.mean 123.675 .* --model.backbone.no-caffe\. If"):
        assert checked(systems.gfl, {}, "x.pth", named=False) == systems.gfl
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(systems.gfl, {}, "x.pth", named=True)


def test_a_config_that_is_no_python_counts_as_none():
    deep = "a = " + "[" * 5000 + "]" * 5000
    for text in ("model = dict(", "\0", deep, "a = 1 + 1\nb, c = 1, 2\nimport os"):
        assert set(config_in({"cfg": text})) <= {"a"}
    assert config_in(
        {"config": "n = -3\na = dict(b=n, **dict(c=(1, 2)))\nd = {'e': f(1), **a}"}
    ) == {
        "n": -3,
        "a": {"b": -3, "c": [1, 2]},
        "d": {"e": None, "b": -3, "c": [1, 2]},
    }


def test_bgr_pixels_are_refused_where_the_model_has_none():
    text = "model = dict(data_preprocessor=dict(mean=[1, 2, 3], std=[1, 1, 1], bgr_to_rgb=False))"
    said = fields_said(config_in({"cfg": text}))
    with pytest.raises(ValueError, match="BGR pixels; this project's SSDModel takes RGB"):
        as_said(systems.ssd512, said)
    flags = ["--model.mean 1.0 2.0 3.0", "--model.channel-order bgr"]
    assert pixel_contradictions(systems.ssd512.model, said) == flags


@pytest.mark.parametrize("name", ["gfl", "atss", "fcos", "fcos_improved", "foveabox", "retinanet"])
def test_a_system_does_not_contradict_mmdetections_words_for_it(name):
    from gfl_jax.config import to_dict
    from gfl_jax.interop.mmdet_config import model_config

    system = getattr(systems, name)
    config = {"model": model_config(to_dict(system) | {"num_classes": 80})}
    assert contradictions(system, config) == ([], [])
    assert checked(system, {"cfg": f"model = {config['model']!r}"}, "x", named=False) == system


def test_what_is_of_training_alone_is_a_warning():
    text = "model = dict(bbox_head=dict(center_sampling=True))"
    with pytest.warns(UserWarning, match="center_sampling True, here False"):
        checked(systems.fcos, {"cfg": text}, "x.pth", named=False)
