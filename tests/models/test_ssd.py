"""SSD's sizes, names and start, and its forward pass against PyTorch's layers."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gfl_jax import systems
from gfl_jax.detectors.classification import Focal, QualityFocal, SoftmaxMining
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.quality import NoQuality
from gfl_jax.models.heads import OutputSpec
from gfl_jax.models.network import Network
from gfl_jax.models.ssd import L2Norm, SSDHead, SSDModel
from gfl_jax.priors import SSDBoxes

SMALL = SSDModel(width=4, extra_levels=3)  # of 128 x 128 pixels
SMALL_PREDICTS = OutputSpec(cls=5, box=4, per_cell=(4, 6, 6, 4, 4))


@functools.cache
def abstract(network):
    return jax.eval_shape(lambda: network.init(0))


def random_arrays(network, seed=0):
    """Numbers for all arrays; those of a kernel shrink with its inputs."""
    rng = np.random.default_rng(seed)

    def draw(array):
        scale = np.sqrt(2 / np.prod(array.shape[:-1])) if array.ndim > 1 else 1.0
        return rng.normal(0, scale, array.shape).astype(array.dtype)

    return jax.tree.map(draw, abstract(network))


def shapes(model, predicts, pixels):
    """Shapes of the backbone's features, the pyramid, class and box outputs."""
    network = Network(model, predicts)

    def run(variables, images):
        module = network.module(variables, train=False)
        features = module.backbone(images)
        pyramid = module.neck(features)
        return features, pyramid, module.bbox_head(pyramid)

    images = jax.ShapeDtypeStruct((2, pixels, pixels, 3), jnp.float32)
    features, pyramid, outputs = jax.eval_shape(run, abstract(network), images)
    return [
        [x.shape for x in part]
        for part in (features, pyramid, outputs.cls_logits, outputs.box_logits)
    ]


def test_ssd512_has_the_levels_of_the_paper():
    detector = systems.ssd512.detector
    features, pyramid, cls, box = shapes(SSDModel(), detector.predicts(80), 512)
    sides, channels = (64, 32, 16, 8, 4, 2, 1), (512, 1024, 512, 256, 256, 256, 256)
    assert features == [(2, 64, 64, 512), (2, 32, 32, 1024)]
    assert pyramid == [(2, s, s, c) for s, c in zip(sides, channels, strict=True)]
    boxes = (4, 6, 6, 6, 6, 4, 4)
    assert cls == [(2, s, s, 81 * n) for s, n in zip(sides, boxes, strict=True)]
    assert box == [(2, s, s, 4 * n) for s, n in zip(sides, boxes, strict=True)]
    priors = detector.priors([(s, s) for s in sides])
    assert len(priors.boxes) == sum(s * s * n for s, n in zip(sides, boxes, strict=True)) == 24564


def test_a_narrow_ssd_with_fewer_levels_is_for_fewer_pixels():
    features, pyramid, cls, box = shapes(SMALL, SMALL_PREDICTS, 128)
    assert features == [(2, 16, 16, 32), (2, 8, 8, 64)]
    assert [x[1:] for x in pyramid] == [
        (16, 16, 32),
        (8, 8, 64),
        (4, 4, 32),
        (2, 2, 16),
        (1, 1, 16),
    ]
    for per_prior, outputs in ((5, cls), (4, box)):
        channels = [n * per_prior for n in SMALL_PREDICTS.per_cell]
        assert outputs == [(*x[:3], c) for x, c in zip(pyramid, channels, strict=True)]


def test_ssd_has_the_parameters_of_torchvisions():
    """Of ssd300_vgg16, whose last convolution is 3 x 3 and not 4 x 4."""
    predicts = OutputSpec(cls=91, box=4, per_cell=(4, 6, 6, 6, 4, 4))
    params, frozen, stats = abstract(Network(SSDModel(extra_levels=4), predicts))
    found = sum(math.prod(array.shape) for array in params.values())
    assert found - 128 * 256 * (16 - 9) == 35_641_826
    assert not frozen
    assert not stats


def test_names_are_those_of_the_reference():
    convs = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)
    modules = {f"backbone.features.{i}" for i in convs}
    modules |= {f"neck.extra_layers.{i}.{j}.conv" for i in range(5) for j in (0, 1)}
    modules |= {f"bbox_head.{b}_convs.{i}.0" for b in ("cls", "reg") for i in range(7)}
    expected = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    expected |= {"neck.l2_norm.weight"}
    params = abstract(Network(SSDModel(), systems.ssd512.detector.predicts(80))).params
    assert {re.sub(r"\.(kernel|scale)$", ".weight", name) for name in params} == expected
    assert params["backbone.features.31.kernel"].shape == (3, 3, 512, 1024)
    assert params["backbone.features.33.kernel"].shape == (1, 1, 1024, 1024)
    assert params["neck.extra_layers.0.1.conv.kernel"].shape == (3, 3, 256, 512)
    assert params["neck.extra_layers.4.1.conv.kernel"].shape == (4, 4, 128, 256)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_are_float32_whatever_the_convolutions_are(dtype):
    network = Network(SSDModel(4, 3, dtype=dtype), SMALL_PREDICTS)
    images, sizes = np.zeros((1, 128, 128, 3), np.uint8), np.array([[128, 128]])
    jaxpr, (outputs, stats) = jax.make_jaxpr(
        lambda variables: network.apply(variables, images, sizes, train=True), return_shape=True
    )(abstract(network))
    assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    assert outputs.quality_logits == ()
    assert stats == {}
    assert ("bf16" in str(jaxpr)) == (dtype == "bfloat16")


def test_logits_of_bfloat16_networks_are_not_rounded_to_it():
    head = SSDHead((8, 16), OutputSpec(5, 4, per_cell=(4, 4)), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    levels = [jnp.asarray(rng.normal(size=(2, 4, 4, c)), jnp.bfloat16) for c in (8, 16)]
    for x in jax.tree.leaves(head(levels)):
        assert x.dtype == jnp.float32
        assert (x.astype(jnp.bfloat16).astype(jnp.float32) != x).mean() > 0.5


@pytest.mark.parametrize("pixels", [128, 100])
def test_forward_pass_is_that_of_pytorchs_layers(pixels):
    """With 100 pixels some sides are odd: their last row and column are pooled alone."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    network = Network(SMALL, SMALL_PREDICTS)
    variables = random_arrays(network)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (1, pixels, pixels, 3), np.uint8)
    run = jax.jit(functools.partial(network.apply, train=True))
    outputs, _ = run(variables, images, np.array([[pixels, pixels]]))

    def conv(x, module, **options):
        kernel, bias = (variables.params[f"{module}.{leaf}"] for leaf in ("kernel", "bias"))
        weight = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
        return functional.conv2d(x, weight, torch.tensor(bias), **options)

    x = torch.tensor(images.transpose(0, 3, 1, 2).copy()).float()
    x -= torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    index, levels = 0, []
    for block, count in enumerate((2, 2, 3, 3, 3)):
        for _ in range(count):
            x = conv(x, f"backbone.features.{index}", padding=1).relu()
            index += 2
        if block == 3:
            scale = torch.tensor(variables.params["neck.l2_norm.scale"])[:, None, None]
            levels.append(functional.normalize(x, dim=1) * scale)
        window = (2, 2) if block < 4 else (3, 1, 1)
        x = functional.max_pool2d(x, *window, ceil_mode=True)
        index += 1
    assert index == 31
    x = conv(x, "backbone.features.31", padding=6, dilation=6).relu()
    x = conv(x, "backbone.features.33").relu()
    levels.append(x)
    for i, options in enumerate(2 * [{"stride": 2, "padding": 1}] + [{"padding": 1}]):
        x = conv(x, f"neck.extra_layers.{i}.0.conv").relu()
        x = conv(x, f"neck.extra_layers.{i}.1.conv", **options).relu()
        levels.append(x)
    assert levels[-1].shape[2:] == (1, 1)
    for branch, found in (("cls", outputs.cls_logits), ("reg", outputs.box_logits)):
        for i, (level, ours) in enumerate(zip(levels, found, strict=True)):
            theirs = conv(level, f"bbox_head.{branch}_convs.{i}.0", padding=1)
            theirs = theirs.permute(0, 2, 3, 1).numpy()
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


# The normalised level.


def test_l2_norm_gives_every_pixel_the_length_of_its_scale():
    norm = L2Norm(6)
    np.testing.assert_array_equal(norm.scale[...], np.full(6, 20.0))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 6)).astype(np.float32) * 10.0 ** rng.integers(-6, 6, (2, 3, 4, 1))
    np.testing.assert_allclose(np.linalg.norm(norm(x), axis=-1), 20, rtol=1e-3)
    norm.scale[...] = scale = rng.normal(size=6).astype(np.float32)
    expected = scale * x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-3, atol=1e-6)


def test_l2_norm_of_a_pixel_without_features_is_zero_with_a_finite_gradient():
    norm = L2Norm(3)
    x = jnp.array([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]]).reshape(1, 1, 2, 3)
    value, pull = jax.vjp(norm, x)
    np.testing.assert_allclose(value[0, 0], [[0, 0, 0], [12, 0, 16]], rtol=1e-6)
    (gradient,) = pull(jnp.ones_like(x))
    assert np.isfinite(gradient).all()
    # Of 20 x / |x|: the part of the gradient across x, 20 / 5 times (1, 1, 1) - 7/5 (3, 0, 4)/5.
    np.testing.assert_allclose(gradient[0, 0, 1], [0.64, 4.0, -0.48], rtol=1e-5)
    to_scale = nnx.grad(lambda norm: norm(x).sum())(norm).scale[...]
    np.testing.assert_allclose(to_scale, [0.6, 0, 0.8], rtol=1e-6)


# The head.


@pytest.mark.parametrize(
    ("classification", "outputs", "bias"),
    [(SoftmaxMining(), 4, 0.0), (Focal(), 3, -4.595120), (QualityFocal(), 3, -4.595120)],
    ids=["softmax", "focal", "qfl"],
)
def test_a_sigmoid_classification_starts_at_a_score_of_a_hundredth(classification, outputs, bias):
    quality = {} if classification.soft else {"quality": NoQuality()}
    priors = SSDBoxes(ratios=((2,), (2, 3), (2,)), strides=(8, 16, 32))
    detector = Detector(priors=priors, classification=classification, **quality)
    predicts = detector.predicts(3)
    head = SSDHead((8, 16, 8), predicts, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for (cls,), (reg,), boxes in zip(head.cls_convs, head.reg_convs, (4, 6, 4), strict=True):
        assert cls.bias[...].shape == (boxes * outputs,)
        np.testing.assert_allclose(cls.bias[...], bias, rtol=1e-6)
        assert not reg.bias[...].any()


def test_kernels_of_the_head_are_xaviers():
    head = SSDHead(
        (64, 64), OutputSpec(16, 4, per_cell=(4, 4)), dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    for (conv,) in head.cls_convs:
        kernel, limit = np.asarray(conv.kernel[...]), math.sqrt(6 / (9 * (64 + 64)))
        assert np.abs(kernel).max() <= limit
        np.testing.assert_allclose(kernel.std(), limit / math.sqrt(3), rtol=0.02)


@pytest.mark.parametrize(
    ("predicts", "message"),
    [
        (SMALL_PREDICTS._replace(per_cell=(4, 4, 4, 4)), "5 levels, but detector.priors has 4"),
        (SMALL_PREDICTS._replace(quality="iou"), "no quality branch"),
    ],
)
def test_what_ssd_cannot_predict_is_named(predicts, message):
    with pytest.raises(ValueError, match=message):
        Network(SMALL, predicts)
