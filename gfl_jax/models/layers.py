"""The few layers every network here is made of, with the reference's padding and eps."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gfl_jax.distributed import AXIS

Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]
"""frozen_bn: constant statistics of a pretrained network, trainable affine (norm_eval of mmdet).
bn: statistics of a device's images with running averages, for training from random weights.
sync_bn: of the images of all devices.  gn: GroupNorm."""

_NHWC = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv2d(x, kernel, strides: tuple[int, int], padding: tuple[tuple[int, int], ...]):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_NHWC)


def _conv2d_forward(x, kernel, strides, padding):
    return _conv2d(x, kernel, strides, padding), (x, kernel)


def _conv2d_backward(strides, padding, residuals, gradient):
    x, kernel = residuals

    def conv(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_NHWC)

    (dx,) = jax.vjp(lambda x: conv(x, kernel), x)[1](gradient)

    def as_convolution(x, gradient):
        return jax.vjp(lambda kernel: conv(x, kernel), kernel)[1](gradient)[0]

    def as_products(x, gradient):
        """A few wide matrix products, up to five times the speed of XLA's own form on CPUs.

        The taps along a kernel row lie side by side in the channels of x, those along a column in
        the channels of the gradient, so that one product holds them all; for stride s, s products.
        """
        kh, kw, c_in, c_out = kernel.shape
        (sy, sx), (h, w) = strides, gradient.shape[1:3]
        if c_out < 16:  # too thin for a product
            return as_convolution(x, gradient)
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        rows: dict[int, Array] = {}
        for phase in range(min(sy, kh)):
            taps = range(phase, kh, sy)
            more = len(taps) - 1
            x_rows = x[:, phase : phase + (h + more - 1) * sy + 1 : sy]
            x_taps = [x_rows[:, :, j : j + (w - 1) * sx + 1 : sx] for j in range(kw)]
            g_taps = [
                jnp.pad(gradient, ((0, 0), (t, more - t), (0, 0), (0, 0))) for t in range(more + 1)
            ]
            product = lax.dot_general(
                jnp.concatenate(x_taps, axis=-1).reshape(-1, kw * c_in),
                jnp.concatenate(g_taps, axis=-1).reshape(-1, len(taps) * c_out),
                (((0,), (0,)), ((), ())),
            ).reshape(kw, c_in, len(taps), c_out)
            rows |= {i: product[:, :, t] for t, i in enumerate(taps)}
        return jnp.stack([rows[i] for i in range(kh)]).astype(kernel.dtype)

    dkernel = lax.platform_dependent(x, gradient, cpu=as_products, default=as_convolution)
    return dx, dkernel


_conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _conv_general_dilated(x, kernel, strides, padding, **_):
    return _conv2d(x, kernel, tuple(strides), tuple(map(tuple, padding)))


def conv2d(
    in_features: int,
    out_features: int,
    kernel_size: int,
    *,
    stride: int = 1,
    bias: bool = True,
    kernel_init: jax.nn.initializers.Initializer,
    bias_init: jax.nn.initializers.Initializer = nnx.initializers.zeros,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution padded by (k-1)//2 on *both* sides, as in PyTorch.

    XLA's 'SAME' pads stride-2 convolutions of even inputs at the bottom and right only, which
    shifts every feature by a pixel against weights trained elsewhere.
    """
    pad = (kernel_size - 1) // 2
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        conv_general_dilated=_conv_general_dilated,
        dtype=dtype,
        rngs=rngs,
    )


class FrozenBatchNorm(nnx.Module):
    """BatchNorm whose statistics are constants: one multiply-add per element.

    y = x * s + (bias - mean * s) with s = scale / sqrt(var + 1e-5).
    """

    def __init__(self, features: int, *, dtype: DTypeLike, scale_init=nnx.initializers.ones):
        self.scale = nnx.Param(scale_init(jax.random.key(0), (features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        scale = self.scale[...] * lax.rsqrt(self.var[...] + 1e-5)
        shift = self.bias[...] - self.mean[...] * scale
        return x.astype(self.dtype) * scale.astype(self.dtype) + shift.astype(self.dtype)


def normalization(
    kind: Norm,
    features: int,
    *,
    groups: int = 32,
    scale_init=nnx.initializers.ones,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """The norm layer named by `kind`; statistics in float32, eps 1e-5 as in PyTorch."""
    if kind == "frozen_bn":
        return FrozenBatchNorm(features, dtype=dtype, scale_init=scale_init)
    if kind in ("bn", "sync_bn"):
        # momentum 0.9 here is PyTorch's 0.1: the weight of the old average.
        return nnx.BatchNorm(
            features,
            momentum=0.9,
            epsilon=1e-5,
            axis_name=AXIS if kind == "sync_bn" else None,
            scale_init=scale_init,
            dtype=dtype,
            rngs=rngs,
        )
    if kind == "gn":
        if features % groups:
            raise ValueError(f"{groups} groups of GroupNorm cannot share {features} channels")
        # Two passes (mean, then squared deviations): E[x^2] - E[x]^2 loses digits of the reference.
        return nnx.GroupNorm(
            features,
            groups,
            epsilon=1e-5,
            use_fast_variance=False,
            scale_init=scale_init,
            dtype=dtype,
            rngs=rngs,
        )
    raise ValueError(f"norm {kind!r} is unknown; use 'frozen_bn', 'bn', 'sync_bn' or 'gn'")


class ConvModule(nnx.Module):
    """Convolution, then optionally GroupNorm and ReLU, named as in the reference's ConvModule.

    bias: of the convolution; None: unless a norm follows.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        stride: int = 1,
        bias: bool | None = None,
        norm_groups: int = 0,
        relu: bool = False,
        kernel_init: jax.nn.initializers.Initializer,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = conv2d(
            in_features,
            out_features,
            kernel_size,
            stride=stride,
            bias=not norm_groups if bias is None else bias,
            kernel_init=kernel_init,
            dtype=dtype,
            rngs=rngs,
        )
        if norm_groups:
            self.gn = normalization("gn", out_features, groups=norm_groups, dtype=dtype, rngs=rngs)
        self.has_norm, self.relu = bool(norm_groups), relu

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b ho wo co"]:
        x = self.conv(x)
        if self.has_norm:
            x = self.gn(x)
        return jax.nn.relu(x) if self.relu else x


def max_pool(
    x: Float[Array, "b h w c"],
    window: int = 3,
    stride: int = 2,
    padding: tuple[int, int] = (1, 1),
) -> Float[Array, "b ho wo c"]:
    """Max-pooling padded with -inf (before, after) on both axes, as PyTorch does; ResNet's stem's.

    As maxima of slices: the gradient of XLA's window reduction takes twice the time on CPUs.
    """
    h, w = ((side + sum(padding) - window) // stride * stride + 1 for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)), constant_values=-jnp.inf)
    x = functools.reduce(jnp.maximum, [x[:, i : i + h : stride] for i in range(window)])
    return functools.reduce(jnp.maximum, [x[:, :, j : j + w : stride] for j in range(window)])


def upsample_nearest(x: Float[Array, "b h w c"], size: Sequence[int]) -> Float[Array, "b ho wo c"]:
    """Nearest neighbour with source index floor(i * in / out), as PyTorch's 'nearest'."""
    h, w = x.shape[1:3]
    if (size[0], size[1]) == (2 * h, 2 * w):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    rows = jnp.arange(size[0]) * h // size[0]
    columns = jnp.arange(size[1]) * w // size[1]
    return x[:, rows][:, :, columns]
