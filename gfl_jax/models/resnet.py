"""ResNet-18/34/50/101 (He et al., arXiv 1512.03385) in torchvision's layout and names."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gfl_jax.errors import InputError
from gfl_jax.models.layers import Norm, conv2d, max_pool, normalization

# Kaiming normal over the fan-out, as both torchvision and mmdet initialise ResNet convolutions.
_kaiming = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# Residual branches start at zero, so that random weights start as the identity.
_zeros = nnx.initializers.zeros

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def out_features(depth: int, width: int) -> tuple[int, int, int, int]:
    """Channels of C2..C5."""
    expansion = 4 if depth >= 50 else 1
    return tuple(width * 2**stage * expansion for stage in range(4))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The ResNet.

    Attributes:
        depth: Number of layers: 18, 34, 50 or 101.
        width: Channels of the first stage; 64 in the paper.
        norm: frozen_bn for pretrained weights; bn, sync_bn or gn for training from random ones.
        frozen_stages: -1: none, 0: the stem, 1: stem and first stage, ...; frozen ones have no
            gradient and no weight decay.
        pretrained: A .pth or .safetensors file, or a Hugging Face name such as
            timm/resnet50.tv_in1k. Empty for random weights.
        caffe: Whether bottlenecks stride on their first 1x1, as Detectron's weights expect.
        train_norm: Whether scales and biases of norm layers are trained.
        remat: Whether the backward pass recomputes the inside of each residual block: less memory,
            more time.
    """

    depth: int = 50
    width: int = 64
    norm: Norm = "frozen_bn"
    frozen_stages: int = 1
    pretrained: str = ""
    caffe: bool = False
    train_norm: bool = True
    remat: bool = False

    def __post_init__(self):
        if not -1 <= self.frozen_stages <= 4:
            raise InputError(f"backbone.frozen_stages is {self.frozen_stages}; it must be -1 to 4")
        if self.norm in ("bn", "sync_bn") and self.frozen_stages >= 0:
            raise InputError(
                f"backbone.norm {self.norm!r} trains the statistics of every stage; "
                f"backbone.frozen_stages is {self.frozen_stages}: set it to -1, or norm to "
                "'frozen_bn'"
            )


class _Block(nnx.Module):
    """Basic (two 3x3) or bottleneck (1x1, 3x3, 1x1) residual block.

    The stride is on the first 3x3 or, in caffe-style bottlenecks, on the first 1x1.
    """

    def __init__(
        self,
        c_in: int,
        width: int,
        c_out: int,
        stride: int,
        *,
        bottleneck: bool,
        caffe: bool,
        norm: Norm,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def conv(c_in, c_out, kernel_size, stride=1):
            return conv2d(
                c_in,
                c_out,
                kernel_size,
                stride=stride,
                bias=False,
                kernel_init=_kaiming,
                dtype=dtype,
                rngs=rngs,
            )

        def bn(features, scale_init=nnx.initializers.ones):
            return normalization(norm, features, scale_init=scale_init, dtype=dtype, rngs=rngs)

        if bottleneck:
            first, second = (stride, 1) if caffe else (1, stride)
            self.conv1, self.bn1 = conv(c_in, width, 1, first), bn(width)
            self.conv2, self.bn2 = conv(width, width, 3, second), bn(width)
            self.conv3, self.bn3 = conv(width, c_out, 1), bn(c_out, _zeros)
        else:
            self.conv1, self.bn1 = conv(c_in, width, 3, stride), bn(width)
            self.conv2, self.bn2 = conv(width, c_out, 3), bn(c_out, _zeros)
        projects = stride != 1 or c_in != c_out
        self.downsample = nnx.List([conv(c_in, c_out, 1, stride), bn(c_out)] if projects else [])
        self.bottleneck = bottleneck

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b ho wo c_out"]:
        shortcut = x
        for layer in self.downsample:
            shortcut = layer(shortcut)
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(jax.nn.relu(x)))
        return jax.nn.relu(x + shortcut)


class ResNet(nnx.Module):
    """Maps images to C2..C5 at strides 4, 8, 16, 32."""

    def __init__(
        self,
        depth: int,
        *,
        width: int = 64,
        norm: Norm = "frozen_bn",
        caffe: bool = False,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build with random weights.

        Args:
            depth: 18, 34, 50 or 101.
            width: Channels of the stem and of the first stage; 64 in the paper.
            norm: See `gfl_jax.models.layers.Norm`.
            caffe: Whether bottlenecks stride on their first 1x1, as Detectron's weights expect,
                instead of on the 3x3, as torchvision's do.
            remat: Whether the backward pass recomputes the inside of each block instead of
                keeping it.
            dtype: Of the activations; parameters are float32.
            rngs: Source of the initial weights.

        Raises:
            ValueError: The depth is not one of `BLOCKS`.
        """
        if depth not in BLOCKS:
            raise InputError(f"ResNet depth {depth} is unknown; use one of {sorted(BLOCKS)}")
        self.conv1 = conv2d(
            3, width, 7, stride=2, bias=False, kernel_init=_kaiming, dtype=dtype, rngs=rngs
        )
        self.bn1 = normalization(norm, width, dtype=dtype, rngs=rngs)
        self.remat = remat
        c_in = width
        for stage, (blocks, c_out) in enumerate(
            zip(BLOCKS[depth], out_features(depth, width), strict=True)
        ):
            layer = []
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layer.append(
                    _Block(
                        c_in,
                        width * 2**stage,
                        c_out,
                        stride,
                        bottleneck=depth >= 50,
                        caffe=caffe,
                        norm=norm,
                        dtype=dtype,
                        rngs=rngs,
                    )
                )
                c_in = c_out
            setattr(self, f"layer{stage + 1}", nnx.List(layer))

    @jax.named_scope("backbone")
    def __call__(self, x: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        """Features C2..C5 of normalised images."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        x = max_pool(x)
        apply = nnx.remat(_Block.__call__) if self.remat else _Block.__call__
        features = []
        for stage in range(4):
            for block in getattr(self, f"layer{stage + 1}"):
                x = apply(block, x)
            features.append(x)
        return features
