"""Sizes, names and state of the whole network; real ones are only built abstractly."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from gfl_jax.detectors.dense import Detector
from gfl_jax.interop.pretrained import load_pretrained
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import DenseHead, Head, OutputSpec
from gfl_jax.models.network import Backbone, Model, Network, Variables
from gfl_jax.models.resnet import ResNet, _Block

CLASSES, BOX_CHANNELS = 3, 20
# Programs compiled for one run: quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0}


@functools.cache
def tiny(norm="frozen_bn", dtype="float32", width=8, **backbone):
    """A network of 64 x 64 pixels that is compiled in seconds."""
    backbone = Backbone(depth=18, width=width, norm=norm, **backbone)
    model = Model(backbone, Neck(32), Head(width=32, stacked_convs=1), dtype=dtype)
    return Network(model, OutputSpec(CLASSES, BOX_CHANNELS))


@functools.cache
def abstract(network) -> Variables:
    return jax.eval_shape(lambda: network.init(0))


def random_variables(network, seed=0) -> Variables:
    """Numbers for all arrays, without compiling the initialisers."""
    rng = np.random.default_rng(seed)

    def draw(path, array):
        values = rng.normal(size=array.shape) * (0.1 if path[-1].key.endswith("kernel") else 1)
        return (np.abs(values) if path[-1].key.endswith("var") else values).astype(array.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract(network))


def images(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (2, 64, 64, 3), np.uint8)


SIZES = np.array([(64, 50), (40, 64)], np.int32)


def constant(name):
    """Whether an array is a statistic of a BatchNorm."""
    return name.endswith((".mean", ".var"))


def count(arrays):
    return sum(math.prod(array.shape) for array in arrays.values())


# The reference's network.


@functools.cache
def gfl_r50() -> Variables:
    return abstract(Network(Model(), Detector().predicts(80)))


def test_gfl_r50_has_the_parameters_of_the_reference():
    variables = gfl_r50()
    assert count(variables.params) == 32_215_193
    parameters = {name: array for name, array in variables.frozen.items() if not constant(name)}
    assert count(variables.params | parameters) == 32_440_537
    assert {array.dtype for part in variables for array in part.values()} == {jnp.dtype("float32")}


def reference_names():
    """Section 14 of the specification: names of mmdet's checkpoint of GFL with ResNet-50."""

    def batch_norm(name):
        return {f"{name}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")}

    names = {"backbone.conv1.weight"} | batch_norm("backbone.bn1")
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            prefix = f"backbone.layer{stage}.{block}"
            for i in (1, 2, 3):
                names |= {f"{prefix}.conv{i}.weight"} | batch_norm(f"{prefix}.bn{i}")
        names |= {f"backbone.layer{stage}.0.downsample.0.weight"}
        names |= batch_norm(f"backbone.layer{stage}.0.downsample.1")
    for convs, levels in (("lateral_convs", 3), ("fpn_convs", 5)):
        for i in range(levels):
            names |= {f"neck.{convs}.{i}.conv.weight", f"neck.{convs}.{i}.conv.bias"}
    for tower in ("cls_convs", "reg_convs"):
        for i in range(4):
            leaves = ("conv.weight", "gn.weight", "gn.bias")
            names |= {f"bbox_head.{tower}.{i}.{leaf}" for leaf in leaves}
    for branch in ("gfl_cls", "gfl_reg"):
        names |= {f"bbox_head.{branch}.weight", f"bbox_head.{branch}.bias"}
    return names | {f"bbox_head.scales.{i}.scale" for i in range(5)}


def in_torch(name):
    modules, leaf = name.rsplit(".", 1)
    if leaf == "scale" and ".scales." in name:
        return name
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    return f"{modules}.{leaves.get(leaf, leaf)}"


def test_names_are_those_of_the_reference():
    ours = [name for part in gfl_r50() for name in part]
    assert sorted(map(in_torch, ours)) == sorted(reference_names())
    assert set(ours) >= {
        "backbone.conv1.kernel",
        "backbone.layer1.0.downsample.0.kernel",
        "backbone.layer1.0.downsample.1.mean",
        "neck.fpn_convs.4.conv.bias",
        "bbox_head.cls_convs.3.gn.scale",
        "bbox_head.gfl_cls.kernel",
        "bbox_head.scales.0.scale",
    }


def test_shapes_are_those_of_the_reference():
    params = gfl_r50().params
    for name, shape in {
        "backbone.layer2.0.conv2.kernel": (3, 3, 128, 128),
        "backbone.layer4.2.conv3.kernel": (1, 1, 512, 2048),
        "neck.lateral_convs.2.conv.kernel": (1, 1, 2048, 256),
        "neck.fpn_convs.3.conv.kernel": (3, 3, 256, 256),  # P6 comes from P5, not from C5
        "bbox_head.gfl_cls.kernel": (3, 3, 256, 80),
        "bbox_head.gfl_reg.kernel": (3, 3, 256, 68),
        "bbox_head.scales.0.scale": (),
    }.items():
        assert params[name].shape == shape


@pytest.mark.parametrize(
    ("depth", "channels", "parameters"),
    [  # of torchvision's classifiers, without the last layer
        (18, (64, 128, 256, 512), 11_176_512),
        (34, (64, 128, 256, 512), 21_284_672),
        (101, (256, 512, 1024, 2048), 42_500_160),
    ],
)
def test_backbones_have_the_channels_and_parameters_of_the_paper(depth, channels, parameters):
    def build_and_run(x):
        network = ResNet(depth, rngs=nnx.Rngs(0))
        params = nnx.to_flat_state(nnx.state(network, nnx.Param))
        return network(x), [array[...] for _, array in params]

    x = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    features, params = jax.eval_shape(build_and_run, x)
    expected = [
        (1, 64 // stride, 96 // stride, c)
        for stride, c in zip((4, 8, 16, 32), channels, strict=True)
    ]
    assert [feature.shape for feature in features] == expected
    assert sum(math.prod(array.shape) for array in params) == parameters


@pytest.mark.parametrize(("bottleneck", "caffe"), [(True, True), (True, False), (False, True)])
def test_bottlenecks_of_caffe_see_every_second_pixel(bottleneck, caffe):
    """They stride on their first convolution, a 1x1; the others on a 3x3."""
    block = _Block(
        6,
        4,
        8,
        2,
        bottleneck=bottleneck,
        caffe=caffe,
        norm="frozen_bn",
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    last = block.bn3 if bottleneck else block.bn2
    last.scale[...] = jnp.ones(8)
    gradient = jax.jit(jax.grad(lambda x: block(x).sum()), compiler_options=QUICKLY)
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 6)).astype(np.float32)
    assert block(x).shape == (1, 4, 4, 8)
    seen = np.asarray(gradient(x)).any((0, 3))
    assert seen[::2, ::2].all()
    assert seen[1::2].any() == seen[:, 1::2].any() == (not (bottleneck and caffe))


@pytest.mark.parametrize("caffe", [False, True])
def test_backbones_of_caffe_have_the_same_sizes_and_stride_elsewhere(caffe):
    network = nnx.eval_shape(lambda: ResNet(50, caffe=caffe, rngs=nnx.Rngs(0)))
    strides = {
        f"layer{stage}.{i}": (block.conv1.strides, block.conv2.strides)
        for stage in (1, 2, 3, 4)
        for i, block in enumerate(getattr(network, f"layer{stage}"))
    }
    assert len(strides) == 16
    striding = {f"layer{stage}.0" for stage in (2, 3, 4)}
    for name, found in strides.items():
        here = ((2, 2), (1, 1)) if caffe else ((1, 1), (2, 2))
        assert found == (here if name in striding else ((1, 1), (1, 1)))
    arrays = abstract(Network(Model(Backbone(caffe=caffe)), Detector().predicts(80)))
    assert arrays == gfl_r50()


def test_impossible_backbones_are_named():
    with pytest.raises(ValueError, match="depth 20 is unknown"):
        ResNet(20, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="frozen_stages is 5"):
        Backbone(frozen_stages=5)


def test_initial_head_is_that_of_the_reference():
    head = DenseHead(64, OutputSpec(64, 64), Head(width=64, stacked_convs=1), rngs=nnx.Rngs(0))
    for conv in (head.gfl_cls, head.gfl_reg, head.cls_convs[0].conv, head.reg_convs[0].conv):
        kernel = np.asarray(conv.kernel[...])
        assert abs(kernel.mean()) < 5e-4
        np.testing.assert_allclose(kernel.std(), 0.01, rtol=0.05)
    np.testing.assert_allclose(head.gfl_cls.bias[...], -4.595120, rtol=1e-6)
    assert not head.gfl_reg.bias[...].any()
    assert head.cls_convs[0].conv.bias is None
    assert [scale.scale[...].item() for scale in head.scales] == [1.0] * 5


# What is trained.


@pytest.mark.parametrize(
    ("stages", "prefixes"),
    [
        (-1, ()),
        (0, ("conv1", "bn1")),
        (1, ("conv1", "bn1", "layer1")),
        (3, ("conv1", "bn1", "layer1", "layer2", "layer3")),
    ],
)
def test_frozen_stages_are_not_trained(stages, prefixes):
    variables = abstract(tiny(frozen_stages=stages))
    frozen = tuple(f"backbone.{prefix}." for prefix in prefixes)
    parameters = {name for name in variables.frozen if not constant(name)}
    assert all(name.startswith(frozen) for name in parameters)
    assert not any(name.startswith(frozen) for name in variables.params)
    assert {name.split(".")[1] for name in parameters} == set(prefixes)
    whole = abstract(tiny(frozen_stages=-1))
    assert (variables.params | variables.frozen).keys() == (whole.params | whole.frozen).keys()


def test_statistics_of_frozen_norms_are_constants():
    """Nothing that a step would have to return or average; those that move are."""
    variables = gfl_r50()
    assert sum(map(constant, variables.frozen)) == 2 * 53
    assert not variables.stats
    moving = abstract(tiny("bn", frozen_stages=-1))
    assert len(moving.stats) == 2 * 20
    assert all(map(constant, moving.stats))
    assert not moving.frozen
    assert not abstract(tiny("gn", width=32, frozen_stages=-1)).frozen


@pytest.mark.parametrize("stages", [-1, 1])
def test_constant_norms_of_the_backbone_are_not_trained(stages):
    """Only they have scales and biases there, beside what is frozen anyway."""
    variables = abstract(tiny(frozen_stages=stages, train_norm=False))
    whole = abstract(tiny(frozen_stages=-1))
    norms = {
        name
        for name in whole.params
        if name.startswith("backbone.") and name.endswith((".scale", ".bias"))
    }
    assert {name.rsplit(".", 2)[1] for name in norms} == {"bn1", "bn2", "1"}  # downsample.1
    assert variables.frozen.keys() == norms | abstract(tiny(frozen_stages=stages)).frozen.keys()
    assert variables.params.keys() == whole.params.keys() - norms - variables.frozen.keys()
    assert "bbox_head.cls_convs.0.gn.scale" in variables.params


# The forward pass.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_are_float32_whatever_the_convolutions_are(dtype):
    network = tiny(dtype=dtype)
    jaxpr, (outputs, stats) = jax.make_jaxpr(
        lambda variables, images: network.apply(variables, images, SIZES, train=True),
        return_shape=True,
    )(abstract(network), images())
    sides = (8, 4, 2, 1, 1)
    assert [x.shape for x in outputs.cls_logits] == [(2, side, side, CLASSES) for side in sides]
    assert [x.shape for x in outputs.box_logits] == [
        (2, side, side, BOX_CHANNELS) for side in sides
    ]
    assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    assert stats == {}
    assert ("bf16" in str(jaxpr)) == (dtype == "bfloat16")


def test_padding_of_the_canvas_is_zero_for_the_network():
    pixels = images()
    expected = (pixels - np.array([123.675, 116.28, 103.53])) / [58.395, 57.12, 57.375]
    check_normalized(tiny(), pixels, expected)


def test_mean_and_std_are_in_the_order_of_the_channels():
    pixels = images()
    mean, std = (102.5, 115.25, 122.75), (1.0, 2.0, 4.0)
    model = Model(mean=mean, std=std, channel_order="bgr")
    network = Network(model, Detector().predicts(3))
    expected = np.empty(pixels.shape)
    for channel, colour in enumerate((2, 1, 0)):
        expected[..., channel] = (pixels[..., colour] - mean[channel]) / std[channel]
    check_normalized(network, pixels, expected)


def check_normalized(network, pixels, expected):
    found = np.asarray(network.normalize(pixels, SIZES))
    assert found.dtype == np.float32
    for i, (height, width) in enumerate(SIZES):
        np.testing.assert_allclose(
            found[i, :height, :width], expected[i, :height, :width], rtol=1e-5, atol=1e-6
        )
        assert not found[i, height:].any()
        assert not found[i, :, width:].any()


def test_batch_norm_statistics_move_in_training():
    network = tiny("bn", frozen_stages=-1)
    variables = random_variables(network)
    run = jax.jit(
        lambda variables, images: network.apply(variables, images, SIZES, train=True),
        compiler_options=QUICKLY,
    )
    outputs, stats = jax.tree.map(np.asarray, run(variables, images()))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((outputs, stats)))
    assert stats.keys() == variables.stats.keys()
    assert all((stats[name] != old).any() for name, old in variables.stats.items())
    x = jax.lax.conv_general_dilated(
        network.normalize(images(), SIZES),
        variables.params["backbone.conv1.kernel"],
        (2, 2),
        ((3, 3), (3, 3)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean, var = np.mean(x, (0, 1, 2)), np.var(x, (0, 1, 2))
    for name, new in (("mean", mean), ("var", var)):
        expected = 0.9 * variables.stats[f"backbone.bn1.{name}"] + 0.1 * new
        np.testing.assert_allclose(stats[f"backbone.bn1.{name}"], expected, rtol=1e-4, atol=1e-5)


def test_rematerialised_blocks_keep_less_and_change_nothing():
    plain, remat = (tiny("bn", frozen_stages=-1, remat=remat) for remat in (False, True))
    variables = jax.tree.map(jnp.asarray, random_variables(plain))

    def objective(network, params):
        outputs, stats = network.apply(
            variables._replace(params=params), images(), SIZES, train=True
        )
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(outputs)), stats

    kept, found = [], []
    for network in (plain, remat):
        f = functools.partial(objective, network)
        backward = jax.eval_shape(
            lambda params, f=f: jax.vjp(f, params, has_aux=True)[1], variables.params
        )
        kept.append(sum(math.prod(x.shape) for x in jax.tree.leaves(backward)))
        run = jax.jit(jax.grad(f, has_aux=True), compiler_options=QUICKLY)
        found.append(jax.device_get(run(variables.params)))
    assert kept[1] < 0.8 * kept[0]  # both keep parameters, neck and head
    (expected, stats), (gradient, own_stats) = found
    for name, value in expected.items():
        np.testing.assert_allclose(gradient[name], value, rtol=0, atol=1e-4 * np.abs(value).max())
    for name, value in stats.items():
        np.testing.assert_allclose(own_stats[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("norm", "train"), [("bn", False), ("frozen_bn", True)])
def test_statistics_stay_in_evaluation_and_when_frozen(norm, train):
    network = tiny(norm, frozen_stages=-1)
    variables = random_variables(network)
    # Without the outputs nothing is left to compute.
    run = jax.jit(lambda variables, images: network.apply(variables, images, SIZES, train=train)[1])
    jax.tree.map(np.testing.assert_array_equal, run(variables, images()), variables.stats)


# Pretrained backbones.


def torch_file(path, variables):
    """Writes the backbone as torchvision would."""
    arrays = {"fc.weight": np.zeros((10, 64), np.float32), "fc.bias": np.zeros(10, np.float32)}
    for name, array in (variables.params | variables.frozen | variables.stats).items():
        if name.startswith("backbone."):
            array = array.transpose(3, 2, 0, 1).copy() if array.ndim == 4 else array
            arrays[in_torch(name.removeprefix("backbone."))] = array
    save_file(arrays, path)
    return arrays


def test_pretrained_arrays_take_their_places(tmp_path):
    path = tmp_path / "resnet.safetensors"
    network = tiny(pretrained=str(path))
    theirs, ours = random_variables(network, seed=1), random_variables(network, seed=2)
    arrays = torch_file(path, theirs)
    assert arrays["conv1.weight"].shape == (8, 3, 7, 7)
    loaded = load_pretrained(network, ours)
    for part, expected, before in zip(loaded, theirs, ours, strict=True):
        assert part.keys() == before.keys()
        for name, array in part.items():
            source = expected if name.startswith("backbone.") else before
            np.testing.assert_array_equal(array, source[name], err_msg=name)
    assert any(name.startswith("backbone.") for name in loaded.frozen)
    assert any(name.startswith("backbone.") for name in loaded.params)


@pytest.mark.parametrize(("norm", "stages"), [("bn", -1), ("gn", -1), ("gn", 0), ("frozen_bn", -1)])
def test_without_a_pretrained_file_nothing_changes(norm, stages):
    network = tiny(norm, width=32, frozen_stages=stages)
    variables = abstract(network)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_pretrained(network, variables) == variables
    assert ["backbone is random" in str(warning.message) for warning in caught] == [True] * (
        norm == "frozen_bn" or stages >= 0
    )


def test_a_file_of_another_network_names_the_keys(tmp_path):
    path = tmp_path / "other.safetensors"
    network = tiny(pretrained=str(path))
    arrays = torch_file(path, random_variables(network))
    del arrays["layer4.1.bn2.running_var"]
    arrays["layer1.0.conv3.weight"] = np.zeros((1, 1, 1, 1), np.float32)
    arrays["layer2.0.downsample.0.weight"] = np.zeros((5, 8, 1, 1), np.float32)
    save_file(arrays, path)
    with pytest.raises(ValueError) as error:
        load_pretrained(network, abstract(network))
    for part in (
        "other.safetensors",
        "layer4.1.bn2.running_var",
        "layer1.0.conv3.weight",
        "layer2.0.downsample.0.weight: model (16, 8, 1, 1), file (5, 8, 1, 1)",
    ):
        assert part in str(error.value)


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    network = tiny(pretrained=str(tmp_path / "none.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_pretrained(network, abstract(network))
