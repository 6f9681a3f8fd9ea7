"""The layers that every network here is built from, with the reference's padding and eps."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gfl_jax.distributed import AXIS
from gfl_jax.errors import InputError
from gfl_jax.models.conv_grad import conv_general_dilated

Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]
"""Kinds of norm layers:

* frozen_bn: BatchNorm with a pretrained network's statistics, held constant, and trainable scale
  and bias (mmdetection's norm_eval);
* bn: BatchNorm over each device's images with running averages, to train from random weights;
* sync_bn: BatchNorm over the images of all devices;
* gn: GroupNorm.
"""


def conv2d(
    in_features: int,
    out_features: int,
    kernel_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
    kernel_init: jax.nn.initializers.Initializer,
    bias_init: jax.nn.initializers.Initializer = nnx.initializers.zeros,
    dtype: DTypeLike = jnp.float32,
    out_dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution padded on *both* sides to keep the size at stride 1, as in PyTorch.

    XLA's 'SAME' pads stride-2 convolutions of even inputs at the bottom and right only, which
    shifts every feature by a pixel relative to weights trained elsewhere.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        kernel_size: Side of the kernel.
        stride: Distance between windows.
        dilation: Distance between taps of the kernel.
        groups: Groups of channels that are convolved separately.
        bias: Whether a bias is added.
        kernel_init: Initial kernel [kernel_size, kernel_size, in_features / groups, out_features].
        bias_init: Initial bias [out_features].
        dtype: Of the operands; parameters are float32.
        out_dtype: Of the output, if wider than `dtype`: sums are not rounded to `dtype`, and
            the bias is added in `out_dtype`.
        rngs: Source of the initial weights.
    """
    pad = dilation * (kernel_size - 1) // 2
    wider: dict[str, Any] = {}
    if out_dtype is not None and jnp.dtype(out_dtype) != jnp.dtype(dtype):
        wider = {"preferred_element_type": out_dtype, "promote_dtype": _cast_operands}
    return nnx.Conv(
        in_features,
        out_features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=(dilation, dilation),
        feature_group_count=groups,
        use_bias=bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        conv_general_dilated=conv_general_dilated,
        dtype=dtype,
        rngs=rngs,
        **wider,
    )


def _cast_operands(args, *, dtype):
    x, kernel, bias = args
    return x.astype(dtype), kernel.astype(dtype), bias


class Constant(nnx.Variable):
    """An array that is loaded and never changes: neither trained nor a running statistic."""


class FrozenBatchNorm(nnx.Module):
    """BatchNorm whose statistics are constants: one multiply-add per element, in float32.

    y = x * s + (bias - mean * s) with s = scale / sqrt(var + 1e-5), rounded to `dtype` at the end.
    """

    def __init__(self, features: int, *, dtype: DTypeLike, scale_init=nnx.initializers.ones):
        self.scale = nnx.Param(scale_init(jax.random.key(0), (features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean = Constant(jnp.zeros(features))
        self.var = Constant(jnp.ones(features))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
        scale = self.scale[...] * lax.rsqrt(self.var[...] + 1e-5)
        shift = self.bias[...] - self.mean[...] * scale
        return (x.astype(jnp.float32) * scale + shift).astype(self.dtype)


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
        # Flax's momentum weights the old average: 0.9 is PyTorch's 0.1.
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
            raise InputError(f"GroupNorm cannot split {features} channels into {groups} groups")
        # Two passes (mean, then squared deviations): E[x^2] - E[x]^2 would lose digits.
        return nnx.GroupNorm(
            features,
            groups,
            epsilon=1e-5,
            use_fast_variance=False,
            scale_init=scale_init,
            dtype=dtype,
            rngs=rngs,
        )
    raise InputError(f"norm {kind!r} is unknown; use 'frozen_bn', 'bn', 'sync_bn' or 'gn'")


class ConvModule(nnx.Module):
    """Convolution, then optionally GroupNorm and ReLU, named as in the reference's ConvModule."""

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
        """Build with random weights.

        Args:
            in_features: Channels of the input.
            out_features: Channels of the output.
            kernel_size: Side of the kernel.
            stride: Distance between windows.
            bias: Whether the convolution has one; None: only if no norm follows.
            norm_groups: Groups of the GroupNorm; 0 for no norm.
            relu: Whether a ReLU comes last.
            kernel_init: Initial kernel.
            dtype: Of the activations; parameters are float32.
            rngs: Source of the initial weights.
        """
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
    """PyTorch's max-pooling, padded with -inf (before, after) on both axes; by default ResNet's.

    The first of equal maxima in reading order gets the whole gradient, as in PyTorch. On CPUs it
    is built from slices: the gradient of XLA's window reduction, which other platforms use, takes
    3 to 13 times as long there.
    """
    return lax.platform_dependent(
        x,
        cpu=functools.partial(_pool_slices, window=window, stride=stride, padding=padding),
        default=functools.partial(_pool_windows, window=window, stride=stride, padding=padding),
    )


def _pool_windows(x: Float[Array, "b h w c"], *, window, stride, padding):
    sizes, strides = (1, window, window, 1), (1, stride, stride, 1)
    pads = ((0, 0), padding, padding, (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, strides, pads)


def _pool_slices(x: Float[Array, "b h w c"], *, window, stride, padding):
    def larger(first, second):
        return jnp.where((second > first) | jnp.isnan(second), second, first)

    h, w = ((side + sum(padding) - window) // stride * stride + 1 for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), padding, padding, (0, 0)), constant_values=-jnp.inf)
    # Along rows first, so that the first of equal maxima in reading order wins.
    x = functools.reduce(larger, [x[:, :, j : j + w : stride] for j in range(window)])
    return functools.reduce(larger, [x[:, i : i + h : stride] for i in range(window)])


def upsample_nearest(x: Float[Array, "b h w c"], size: Sequence[int]) -> Float[Array, "b ho wo c"]:
    """Nearest neighbour with source index floor(i * in / out), like PyTorch's 'nearest'."""
    h, w = x.shape[1:3]
    if (size[0], size[1]) == (2 * h, 2 * w):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    rows = jnp.arange(size[0]) * h // size[0]
    columns = jnp.arange(size[1]) * w // size[1]
    return x[:, rows][:, :, columns]
