"""The layers against their definitions in numpy, XLA's own and, where installed, PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from numpy.lib.stride_tricks import sliding_window_view

from gfl_jax.models import conv_grad, layers


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def conv_by_hand(x, kernel, stride, pad):
    x = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = sliding_window_view(x, kernel.shape[:2], axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel.astype(np.float64))


@pytest.mark.parametrize(
    ("size", "stride", "height", "width", "channels", "out"),
    [
        (3, 1, 6, 7, 5, 16),
        (3, 2, 8, 8, 5, 16),
        (3, 2, 7, 6, 5, 17),
        (3, 2, 1, 1, 4, 16),
        (3, 2, 2, 3, 4, 16),
        (1, 1, 5, 4, 6, 24),
        (1, 2, 5, 4, 6, 24),
        (7, 2, 12, 9, 3, 16),
        (5, 3, 11, 9, 3, 16),
        (3, 1, 5, 6, 4, 15),  # too thin for products
        (3, 2, 5, 6, 20, 3),
    ],
)
def test_convolution_and_its_gradients_are_xlas_own(size, stride, height, width, channels, out):
    pad = (size - 1) // 2
    strides, padding = (stride, stride), ((pad, pad), (pad, pad))

    def reference(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

    x, kernel = draw(2, height, width, channels), draw(size, size, channels, out, seed=1)
    expected = conv_by_hand(x, kernel, stride, pad)
    gradient = draw(*expected.shape, seed=2)

    @jax.jit
    def run(x, kernel, gradient):
        value, vjp = jax.vjp(lambda *args: conv_grad.plain_conv(*args, strides, padding), x, kernel)
        return value, vjp(gradient), jax.vjp(reference, x, kernel)[1](gradient)

    value, found, theirs = run(x, kernel, gradient)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)
    for ours, other in zip(found, theirs, strict=True):
        assert ours.dtype == other.dtype
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-4)


def test_convolution_in_bfloat16_has_bfloat16_gradients():
    strides, padding = (2, 2), ((1, 1), (1, 1))
    x, kernel = draw(2, 7, 6, 5), draw(3, 3, 5, 16, seed=1)

    @jax.jit
    def gradients(x, kernel):
        return jax.grad(lambda *a: conv_grad.plain_conv(*a, strides, padding).sum(), (0, 1))(
            x, kernel
        )

    exact = gradients(x, kernel)
    rounded = gradients(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    for ours, other in zip(rounded, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(ours), other, rtol=0.05, atol=0.3)


@pytest.mark.parametrize(("size", "stride"), [(3, 2), (7, 2)])
def test_conv2d_pads_both_sides_alike(size, stride):
    """Even inputs: 'SAME' would pad a stride of 2 at the bottom and right only."""
    conv = layers.conv2d(
        2,
        3,
        size,
        stride=stride,
        kernel_init=nnx.initializers.normal(1.0),
        bias_init=nnx.initializers.normal(1.0),
        rngs=nnx.Rngs(0),
    )
    x = draw(2, 8, 6, 2)
    expected = conv_by_hand(x, np.asarray(conv.kernel[...]), stride, (size - 1) // 2)
    np.testing.assert_allclose(conv(x), expected + np.asarray(conv.bias[...]), rtol=1e-4, atol=1e-5)


OPTIONS = [
    {},
    {"kernel_dilation": (2, 2)},
    {"kernel_dilation": (2, 1), "strides": (2, 2)},
    {"feature_group_count": 4},
    {"input_dilation": (2, 2)},
    {"precision": "highest"},
    {"preferred_element_type": jnp.float32},
    {"padding": "SAME", "strides": (2, 2)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_given_to_nnx_conv_reaches_xla(options):
    """Value and gradient, and that each option makes a difference to this input at all."""
    dtype = jnp.bfloat16 if "preferred_element_type" in options else jnp.float32
    x = jnp.asarray(draw(2, 10, 9, 8), dtype)

    def run(options, convolve):
        options = {"padding": ((1, 1), (1, 1)), **options}
        conv = nnx.Conv(
            8, 16, (3, 3), dtype=dtype, rngs=nnx.Rngs(0), **options, conv_general_dilated=convolve
        )
        graph, params = nnx.split(conv)

        def objective(x, params):
            y = nnx.merge(graph, params)(x)
            return jnp.sin(y.astype(jnp.float32)).sum(), y

        grad = jax.jit(jax.grad(objective, (0, 1), has_aux=True))
        gradients, y = grad(x, params)
        return y, *jax.tree.leaves(gradients)

    found, theirs = (
        run(options, convolve)
        for convolve in (conv_grad.conv_general_dilated, lax.conv_general_dilated)
    )
    for ours, other in zip(found, theirs, strict=True):
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[0], theirs[0])
    if options and "precision" not in options:  # which is not seen on a CPU
        plain = run({}, lax.conv_general_dilated)[0]
        assert plain.shape != found[0].shape or (plain != found[0]).any()


def test_a_precision_is_passed_on():
    x, kernel = jnp.zeros((1, 4, 4, 3)), jnp.zeros((3, 3, 3, 8))

    def run(precision):
        return jax.make_jaxpr(
            lambda x, kernel: conv_grad.conv_general_dilated(
                x,
                kernel,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,
            )
        )(x, kernel)

    assert "HIGHEST" in str(run(lax.Precision.HIGHEST))
    assert "HIGHEST" not in str(run(None))


@pytest.mark.parametrize(("size", "stride", "dilation", "groups"), [(3, 1, 6, 1), (3, 2, 2, 4)])
def test_dilated_and_grouped_convolutions_are_pytorchs(size, stride, dilation, groups):
    torch = pytest.importorskip("torch")
    conv = layers.conv2d(
        8,
        16,
        size,
        stride=stride,
        dilation=dilation,
        groups=groups,
        kernel_init=nnx.initializers.normal(1.0),
        rngs=nnx.Rngs(0),
    )
    x, kernel = draw(2, 13, 10, 8), np.asarray(conv.kernel[...])
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
        torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()),
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
    )
    np.testing.assert_allclose(
        conv(x), expected.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4
    )


def test_a_wider_output_is_not_rounded():
    """Sums stay in float32, and so does the bias, of which bfloat16 keeps three digits."""
    options = {"kernel_init": nnx.initializers.normal(1.0), "rngs": nnx.Rngs(0)}
    conv = layers.conv2d(8, 16, 3, dtype=jnp.bfloat16, out_dtype=jnp.float32, **options)
    x = jnp.asarray(draw(2, 5, 6, 8), jnp.bfloat16)
    kernel = np.asarray(conv.kernel[...].astype(jnp.bfloat16), np.float32)
    expected = conv_by_hand(np.float32(x), kernel, 1, 1)
    np.testing.assert_allclose(conv(x), expected, rtol=1e-5, atol=1e-5)
    conv.bias[...] = bias = np.full(16, -4.595120, np.float32)
    np.testing.assert_array_equal(conv(jnp.zeros((1, 2, 2, 8)))[0, 0, 0], bias)
    assert conv(x).dtype == jnp.float32


def test_a_wider_output_has_the_gradient_of_float32_within_the_digits_of_its_operands():
    def gradients(dtype):
        conv = layers.conv2d(
            8,
            16,
            3,
            dtype=dtype,
            out_dtype=jnp.float32,
            kernel_init=nnx.initializers.normal(1.0),
            rngs=nnx.Rngs(0),
        )
        graph, params = nnx.split(conv)
        run = jax.grad(lambda x, p: jnp.cos(0.1 * nnx.merge(graph, p)(x)).sum(), (0, 1))
        return jax.tree.leaves(jax.jit(run)(jnp.asarray(draw(2, 5, 6, 8)), params))

    for rounded, exact in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert rounded.dtype == exact.dtype == jnp.float32
        np.testing.assert_allclose(rounded, exact, rtol=0, atol=0.02 * np.abs(exact).max())


SHAPES = [(2, 8, 6, 3), (1, 7, 5, 2), (1, 1, 1, 2), (1, 2, 9, 2)]


POOLINGS = [(3, 2, (1, 1)), (2, 2, (0, 1)), (3, 1, (1, 1))]  # of ResNet, then of VGG


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "stride", "pad"), POOLINGS)
def test_max_pool_and_its_gradient_are_those_of_a_padded_window(shape, size, stride, pad):
    x = np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(np.float32)
    x -= 2 * x.size  # all negative: padding by zero would show
    check_pool(x, size, stride, pad)


@pytest.mark.parametrize(("size", "stride", "pad"), POOLINGS)
def test_of_equal_maxima_the_first_takes_the_gradient_on_every_platform(size, stride, pad):
    check_pool(np.random.default_rng(0).integers(-3, 0, (2, 9, 8, 3)), size, stride, pad)


def check_pool(x, size, stride, pad):
    """What CPUs compute against what other platforms do, through the public function too."""
    options = {"window": size, "stride": stride, "padding": pad}
    pools = (
        lambda x: layers.max_pool(x, size, stride, pad),
        lambda x: layers._pool_slices(x, **options),
        lambda x: layers._pool_windows(x, **options),
    )

    def run(x):
        outcome = []
        for pool in pools:
            value, pull = jax.vjp(pool, x)
            # Whole numbers, all different: their sums don't depend on the order.
            outcome.append(
                (value, *pull(jnp.arange(value.size, dtype=x.dtype).reshape(value.shape)))
            )
        return outcome

    ours, slices, windows = jax.jit(run)(x.astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, ours, slices)
    jax.tree.map(np.testing.assert_array_equal, slices, windows)


@pytest.mark.parametrize(("size", "stride", "pad"), POOLINGS)
def test_the_gradient_of_max_pool_is_pytorchs_with_equal_maxima_too(size, stride, pad):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(-3, 0, (2, 9, 8, 3)).astype(np.float32)
    value, pull = jax.vjp(lambda x: layers.max_pool(x, size, stride, pad), x)
    weights = np.arange(value.size, dtype=np.float32).reshape(value.shape)
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(theirs, size, stride, pad[0], ceil_mode=size == 2)
    (pooled * torch.from_numpy(weights.transpose(0, 3, 1, 2).copy())).sum().backward()
    np.testing.assert_array_equal(pull(weights)[0], theirs.grad.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("size", [(6, 10), (5, 9), (7, 10), (3, 5), (6, 7), (2, 1)])
def test_upsampling_takes_the_pixel_of_the_rounded_down_index(size):
    x = draw(2, 3, 5, 2)
    rows = [i * 3 // size[0] for i in range(size[0])]
    columns = [j * 5 // size[1] for j in range(size[1])]
    np.testing.assert_array_equal(layers.upsample_nearest(x, size), x[:, rows][:, :, columns])


def normalize_by_hand(x, mean, var, scale, bias):
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


@pytest.mark.parametrize(("offset", "spread"), [(0, 1), (1000, 1), (0, 1e-3)])
def test_group_norm(offset, spread):
    """A large mean takes the digits of E[x^2] - E[x]^2; a small spread shows eps."""
    norm = layers.normalization("gn", 8, groups=4, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = draw(8, seed=1), draw(8, seed=2)
    x = (offset + spread * draw(2, 5, 6, 8)).astype(np.float32)
    groups = x.astype(np.float64).reshape(2, 30, 4, 2)
    mean, var = groups.mean((1, 3)), groups.var((1, 3))
    mean, var = (np.repeat(s, 2, axis=1)[:, None, None] for s in (mean, var))
    expected = normalize_by_hand(x, mean, var, draw(8, seed=1), draw(8, seed=2))
    np.testing.assert_allclose(norm(x), expected, atol=1e-3 if offset else 1e-5)


def batch_norm(kind):
    norm = layers.normalization(kind, 6, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...], norm.mean[...] = (draw(6, seed=i) for i in range(1, 4))
    norm.var[...] = draw(6, seed=4) ** 2 * np.float32([1, 1, 1, 1, 1e-6, 0])  # shows eps
    return norm, [np.asarray(v[...]) for v in (norm.mean, norm.var, norm.scale, norm.bias)]


@pytest.mark.parametrize("kind", ["frozen_bn", "bn"])
def test_batch_norm_by_running_statistics(kind):
    norm, arrays = batch_norm(kind)
    norm.eval()
    x = draw(2, 3, 4, 6)
    np.testing.assert_allclose(norm(x), normalize_by_hand(x, *arrays), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(norm.mean[...], arrays[0])
    np.testing.assert_array_equal(norm.var[...], arrays[1])


def test_frozen_batch_norm_is_the_same_in_training():
    norm, arrays = batch_norm("frozen_bn")
    norm.train()
    x = draw(2, 3, 4, 6)
    np.testing.assert_allclose(norm(x), normalize_by_hand(x, *arrays), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(norm.mean[...], arrays[0])


def test_batch_norm_in_training_uses_the_batch_and_moves_a_tenth_of_the_way():
    norm, (mean, var, scale, bias) = batch_norm("bn")
    norm.train()
    x = draw(2, 3, 4, 6)
    of_batch = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = normalize_by_hand(x, *of_batch, scale, bias)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.9 * mean + 0.1 * of_batch[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.9 * var + 0.1 * of_batch[1], rtol=1e-5)


def test_frozen_batch_norm_rounds_to_bfloat16_once():
    """Multiplied and added in float32: the error is that of the result's last digit."""
    norm, (mean, var, scale, bias) = batch_norm("frozen_bn")
    norm.dtype = jnp.bfloat16
    x = jnp.asarray(draw(20, 20, 6), jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    expected = normalize_by_hand(np.float64(x), mean, var, scale, bias)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(expected))) - 7)
    assert (np.abs(np.float64(y) - expected) <= 0.51 * spacing + 1e-4).all()


def test_impossible_norms_are_named():
    with pytest.raises(ValueError, match="GroupNorm cannot split 48 channels"):
        layers.normalization("gn", 48, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'ln' is unknown"):
        layers.normalization("ln", 32, rngs=nnx.Rngs(0))


def test_layers_agree_with_pytorch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    def nchw(x):
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))

    def nhwc(x):
        return np.moveaxis(x.numpy(), 1, -1)

    x = draw(2, 7, 6, 64)
    np.testing.assert_array_equal(layers.max_pool(x), nhwc(functional.max_pool2d(nchw(x), 3, 2, 1)))
    for sides in ((7, 6), (6, 5), (1, 2)):
        some = x[:, : sides[0], : sides[1]]
        halved = functional.max_pool2d(nchw(some), 2, 2, ceil_mode=True)
        np.testing.assert_array_equal(layers.max_pool(some, 2, 2, (0, 1)), nhwc(halved))
        kept = functional.max_pool2d(nchw(some), 3, 1, 1)
        np.testing.assert_array_equal(layers.max_pool(some, 3, 1, (1, 1)), nhwc(kept))
    expected = functional.interpolate(nchw(x), (15, 11), mode="nearest")
    np.testing.assert_array_equal(layers.upsample_nearest(x, (15, 11)), nhwc(expected))
    kernel = draw(3, 3, 64, 16, seed=1) / 10
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    expected = functional.conv2d(nchw(x), weight, stride=2, padding=1)
    found = conv_grad.plain_conv(x, kernel, (2, 2), ((1, 1), (1, 1)))
    np.testing.assert_allclose(found, nhwc(expected), rtol=1e-4, atol=1e-4)
    norm = layers.normalization("gn", 64, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(x), nhwc(functional.group_norm(nchw(x), 32)), atol=1e-5)
