"""SSD (Liu et al., arXiv 1512.02325): VGG-16, extra levels, two output convolutions per level.

Names are those of the reference: backbone.features.N, neck.extra_layers, bbox_head.cls_convs, ...
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gfl_jax.errors import InputError
from gfl_jax.models.heads import Outputs, OutputSpec
from gfl_jax.models.layers import ConvModule, conv2d, max_pool
from gfl_jax.priors import SSDBoxes

_xavier = nnx.initializers.xavier_uniform()
_kaiming = nnx.initializers.he_normal()
BLOCKS = (2, 2, 3, 3, 3)
"""Convolutions of each block of VGG-16; all but the last end in a 2x2 max-pooling."""


@dataclasses.dataclass(frozen=True)
class SSDModel:
    """The network of SSD.

    Attributes:
        width: Channels of VGG's first block; 64 in the paper.
        extra_levels: Pyramid levels after the two of VGG; 5 for 512 pixels. The last one is a 4x4
            convolution from 2x2 to 1x1: the sides of the input are 2^(extra_levels + 4).
        pretrained: File of a VGG-16 with fc6 and fc7 as convolutions (31 and 33). Empty for random
            weights.
        dtype: Of convolutions and activations. Parameters and the head's outputs are always
            float32.
        mean: Of the RGB pixels (0 to 255).
        std: Of the RGB pixels (0 to 255).
        init_from: Trained detector that a new run begins with: a work directory or folder of
            checkpoints, local or gs://, or a .pth or .safetensors file in mmdetection's names. All
            but its class outputs are taken over, and of these the classes that have the same name.
    """

    width: int = 64
    extra_levels: int = 5
    pretrained: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    init_from: str = ""

    channel_order = "rgb"
    backbone_flag = "--model.width"

    @property
    def cls_convs(self) -> list[str]:
        """Paths within `bbox_head` of the convolutions that predict class logits, by level."""
        return [f"cls_convs.{level}.0" for level in range(self.extra_levels + 2)]

    def build(self, predicts: OutputSpec, *, rngs: nnx.Rngs) -> "SSD":
        """The network, with random weights."""
        return SSD(self, predicts, rngs=rngs)

    def with_pretrained(self, source: str) -> "SSDModel":
        """The same model with a pretrained VGG from a file."""
        return dataclasses.replace(self, pretrained=source)

    def is_frozen(self, name: str) -> bool:
        """False: no parameter is frozen."""
        return False

    def random_backbone_problem(self) -> str:
        """Empty: no choice of fields rules out random weights."""
        return ""

    def small(self, side: int) -> tuple["SSDModel", dict[str, Any]]:
        """A VGG of a quarter of the width, with levels and boxes down to one cell."""
        levels = (side // 8).bit_length()
        ratios = ((2,), *((2, 3),) * (levels - 3), (2,), (2,))
        strides = tuple(8 * 2**level for level in range(levels))
        model = SSDModel(width=16, extra_levels=levels - 2)
        return model, {"priors": SSDBoxes(side, ratios=ratios, strides=strides)}


class VGG(nnx.Module):
    """Maps images to conv4_3 (stride 8) and to fc7 as a convolution (stride 16)."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        convs: dict[str, nnx.Conv] = {}
        index, c_in = 0, 3
        for block, count in enumerate(BLOCKS):
            c_out = width * min(2**block, 8)
            for _ in range(count):
                convs[str(index)] = conv2d(
                    c_in, c_out, 3, kernel_init=_kaiming, dtype=dtype, rngs=rngs
                )
                index, c_in = index + 2, c_out  # with a ReLU in between
            index += 1  # the pooling
        # VGG's fc6: 7x7 subsampled to 3x3 with dilation 6.
        convs[str(index)] = conv2d(
            c_in, 16 * width, 3, dilation=6, kernel_init=_kaiming, dtype=dtype, rngs=rngs
        )
        convs[str(index + 2)] = conv2d(
            16 * width, 16 * width, 1, kernel_init=_kaiming, dtype=dtype, rngs=rngs
        )
        self.features = nnx.Dict(convs)

    @jax.named_scope("backbone")
    def __call__(self, x: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        convs = (self.features[name] for name in sorted(self.features, key=int))
        taken = []
        for block, count in enumerate(BLOCKS):
            for _ in range(count):
                x = jax.nn.relu(next(convs)(x))
            if block == 3:
                taken.append(x)
            if block < 4:
                x = max_pool(x, 2, 2, (0, 1))  # an odd last row is pooled on its own
        x = max_pool(x, 3, 1, (1, 1))
        for conv in convs:
            x = jax.nn.relu(conv(x))
        return [*taken, x]


class L2Norm(nnx.Module):
    """Scales each pixel's channels to length 1, then each channel by a learnable factor."""

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.full((features,), 20.0))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = x.astype(jnp.float32)
        squared = (x**2).sum(-1, keepdims=True)
        length = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))  # finite gradient at 0 too
        return self.scale[...] * x / (jnp.where(squared > 0, length, 0.0) + 1e-10)


class SSDNeck(nnx.Module):
    """The two features of VGG, the first one normalised, and the extra levels."""

    def __init__(self, width: int, extra_levels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def conv(c_in, c_out, kernel_size, stride, padding):
            module = ConvModule(
                c_in,
                c_out,
                kernel_size,
                stride=stride,
                relu=True,
                kernel_init=_xavier,
                dtype=dtype,
                rngs=rngs,
            )
            module.conv.padding = ((padding, padding), (padding, padding))
            return module

        self.l2_norm = L2Norm(8 * width)
        layers, c_in = [], 16 * width
        for level in range(extra_levels):
            c_out = width * (8 if level == 0 else 4)
            kernel_size, stride = (4, 1) if level == extra_levels - 1 else (3, 2)
            layers.append(
                nnx.List(
                    [
                        conv(c_in, c_out // 2, 1, 1, 0),
                        conv(c_out // 2, c_out, kernel_size, stride, 1),
                    ]
                )
            )
            c_in = c_out
        self.extra_layers = nnx.List(layers)

    @jax.named_scope("neck")
    def __call__(
        self, features: Sequence[Float[Array, "b _ _ _"]]
    ) -> list[Float[Array, "b _ _ _"]]:
        first, x = features
        levels = [self.l2_norm(first).astype(x.dtype), x]
        for narrow, conv in self.extra_layers:
            x = conv(narrow(x))
            levels.append(x)
        return levels


class SSDHead(nnx.Module):
    """One convolution for classes and one for boxes at each level."""

    def __init__(
        self, in_features: Sequence[int], predicts: OutputSpec, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        if len(in_features) != len(predicts.per_cell):
            raise InputError(
                f"model.extra_levels makes {len(in_features)} levels, but detector.priors has "
                f"{len(predicts.per_cell)}"
            )
        if predicts.quality:
            raise InputError("SSD has no quality branch; choose another detector.quality")

        def convs(channels, bias):
            bias_init = nnx.initializers.constant(bias)
            return nnx.List(
                nnx.List(
                    [
                        conv2d(
                            c,
                            n * channels,
                            3,
                            kernel_init=_xavier,
                            bias_init=bias_init,
                            dtype=dtype,
                            out_dtype=jnp.float32,
                            rngs=rngs,
                        )
                    ]
                )
                for c, n in zip(in_features, predicts.per_cell, strict=True)
            )

        self.cls_convs = convs(predicts.cls, predicts.cls_bias)
        self.reg_convs = convs(predicts.box, 0.0)

    @jax.named_scope("bbox_head")
    def __call__(self, levels: Sequence[Float[Array, "b _ _ _"]]) -> Outputs:
        def all_levels(convs):
            pairs = zip(convs, levels, strict=True)
            return [conv(x) for (conv,), x in pairs]

        return Outputs(all_levels(self.cls_convs), all_levels(self.reg_convs))


class SSD(nnx.Module):
    """Backbone, neck and head, for normalised images."""

    def __init__(self, model: SSDModel, predicts: OutputSpec, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(model.dtype), model.width
        features = [8 * width, 16 * width, 8 * width] + [4 * width] * (model.extra_levels - 1)
        self.backbone = VGG(width, dtype=dtype, rngs=rngs)
        self.neck = SSDNeck(width, model.extra_levels, dtype=dtype, rngs=rngs)
        self.bbox_head = SSDHead(features, predicts, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Outputs:
        return self.bbox_head(self.neck(self.backbone(images)))
