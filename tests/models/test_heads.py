"""What the shared head predicts and from where, for every system."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gfl_jax import systems
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import DenseHead, Head, OutputSpec
from gfl_jax.models.network import Model, Network

LEVELS = ((8, 6), (4, 3), (2, 2), (1, 1), (1, 1))


def levels(channels=8):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, *side, channels)), jnp.float32) for side in LEVELS]


def build(predicts, head):
    """A head with numbers that show in its outputs."""
    built, rng = DenseHead(8, predicts, head, rngs=nnx.Rngs(0)), np.random.default_rng(1)
    state = nnx.state(built)
    draw = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), state)
    nnx.update(built, draw)
    return built


def tower(convs, x):
    for conv in convs:
        x = conv(x)
    return x


@pytest.mark.parametrize(
    ("quality_on", "scales", "norm", "boxes"),
    [
        ("reg", True, "gn", 1),
        ("cls", True, "gn", 3),
        ("reg", False, "gn", 1),
        ("cls", False, "none", 1),
        ("reg", True, "none", 3),
    ],
)
def test_branches_end_the_towers_they_are_on(quality_on, scales, norm, boxes):
    predicts = OutputSpec(cls=5, box=4, quality="iou", per_cell=(boxes,) * 5)
    head = Head("conv", 32, 2, norm=norm, quality_on=quality_on, scales=scales)
    built = build(predicts, head)
    assert len(built.scales) == (5 if scales else 0)
    outputs = built(levels())
    for part, channels in zip(outputs, (5, 4, 1), strict=True):
        assert [x.shape for x in part] == [(2, *side, boxes * channels) for side in LEVELS]
    for i, x in enumerate(levels()):
        towers = {"cls": tower(built.cls_convs, x), "reg": tower(built.reg_convs, x)}
        factor = built.scales[i].scale[...] if scales else 1.0
        for found, expected in (
            (outputs.cls_logits, built.conv_cls(towers["cls"])),
            (outputs.box_logits, built.conv_reg(towers["reg"]) * factor),
            (outputs.quality_logits, built.conv_iou(towers[quality_on])),
        ):
            np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


def test_without_a_norm_towers_are_biased_convolutions():
    built = build(OutputSpec(5, 4), Head("retina", 6, 2, norm="none"))  # 32 groups do not fit in 6
    for convs in (built.cls_convs, built.reg_convs):
        x = levels()[0]
        for module in convs:
            assert not hasattr(module, "gn")
            y = module.conv(x)
            assert (np.asarray(y) < 0).any()
            np.testing.assert_array_equal(module(x), np.maximum(y, 0))
            assert module.conv.bias[...].any()
            x = module(x)


@pytest.mark.parametrize("conv_bias", [False, True])
def test_before_a_norm_convolutions_have_biases_if_told_to(conv_bias):
    built = build(OutputSpec(5, 4), Head("conv", 32, 1, conv_bias=conv_bias))
    (module,) = built.cls_convs
    assert (module.conv.bias is not None) == conv_bias
    x = module.conv(levels()[0])
    np.testing.assert_allclose(
        module(levels()[0]), np.maximum(module.gn(x), 0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bias", [None, 0.0, -2.0])
def test_initial_head_with_a_quality_branch(bias):
    predicts = OutputSpec(8, 4, quality="centerness", per_cell=(9,) * 5)
    predicts = predicts if bias is None else predicts._replace(cls_bias=bias)
    head = DenseHead(32, predicts, Head("atss", 32, 1), rngs=nnx.Rngs(0))
    for conv in (head.atss_cls, head.atss_reg, head.atss_centerness):
        kernel = np.asarray(conv.kernel[...])
        np.testing.assert_allclose(kernel.std(), 0.01, rtol=0.1)
    expected = -4.595120 if bias is None else bias
    np.testing.assert_allclose(head.atss_cls.bias[...], np.full(72, expected), rtol=1e-6)
    assert not head.atss_reg.bias[...].any()
    assert not head.atss_centerness.bias[...].any()


def test_a_shared_head_needs_as_many_priors_on_every_level():
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 1, 1\) priors"):
        DenseHead(8, OutputSpec(5, 4, per_cell=(1, 1, 3, 1, 1)), Head(width=32), rngs=nnx.Rngs(0))


def test_logits_of_bfloat16_networks_are_not_rounded_to_it():
    predicts = OutputSpec(cls=5, box=4, quality="iou", per_cell=(2,) * 5)
    head = DenseHead(8, predicts, Head("conv", 32, 1), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    for part in head([x.astype(jnp.bfloat16) for x in levels()]):
        x = np.concatenate([np.ravel(level) for level in part])
        assert x.dtype == np.float32
        assert (x.astype(jnp.bfloat16).astype(np.float32) != x).mean() > 0.5


# The reference's heads.


def arrays(model, predicts):
    variables = jax.eval_shape(lambda: Network(model, predicts).init(0))
    return variables.params | variables.frozen


@pytest.mark.parametrize(
    ("name", "last", "norm", "bias", "scales"),
    [
        ("gfl", {"gfl_cls": 80, "gfl_reg": 68}, True, False, True),
        ("atss", {"atss_cls": 80, "atss_reg": 4, "atss_centerness": 1}, True, False, True),
        ("fcos", {"conv_cls": 80, "conv_reg": 4, "conv_centerness": 1}, True, False, True),
        ("fcos_improved", {"conv_cls": 80, "conv_reg": 4, "conv_centerness": 1}, True, True, True),
        ("retinanet", {"retina_cls": 720, "retina_reg": 36}, False, True, False),
        ("foveabox", {"conv_cls": 80, "conv_reg": 4}, False, True, False),
    ],
)
def test_heads_have_the_names_and_sizes_of_the_reference(name, last, norm, bias, scales):
    system = getattr(systems, name)
    head = {
        name.removeprefix("bbox_head."): array.shape
        for name, array in arrays(system.model, system.detector.predicts(80)).items()
        if name.startswith("bbox_head.")
    }
    expected = {}
    for branch, channels in last.items():
        expected |= {f"{branch}.kernel": (3, 3, 256, channels), f"{branch}.bias": (channels,)}
    for i in range(4):
        for tower in (f"cls_convs.{i}", f"reg_convs.{i}"):
            expected[f"{tower}.conv.kernel"] = (3, 3, 256, 256)
            expected |= {f"{tower}.conv.bias": (256,)} if bias else {}
            if norm:
                expected |= {f"{tower}.gn.scale": (256,), f"{tower}.gn.bias": (256,)}
    if scales:
        expected |= {f"scales.{i}.scale": () for i in range(5)}
    assert head == expected


@pytest.mark.parametrize(
    ("head", "predicts", "parameters"),
    [
        (
            Head("retina", norm="none", scales=False),
            OutputSpec(91, 4, per_cell=(9,) * 5),
            34_014_999,
        ),
        (Head("conv", conv_bias=True, scales=False), OutputSpec(91, 4, "centerness"), 32_269_600),
    ],
    ids=["retinanet_resnet50_fpn", "fcos_resnet50_fpn"],
)
def test_networks_have_the_parameters_of_torchvisions(head, predicts, parameters):
    """Whose backbone has constant norms and whose P6 is made of P5."""
    params = arrays(Model(neck=Neck(), head=head), predicts)
    assert parameters == sum(
        math.prod(array.shape)
        for name, array in params.items()
        if not name.startswith("backbone.") or name.endswith(".kernel")
    )
