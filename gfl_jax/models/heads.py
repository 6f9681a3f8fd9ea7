"""Dense heads: two towers shared by all pyramid levels, and what they predict per cell."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gfl_jax.models.layers import ConvModule, conv2d

_normal = nnx.initializers.normal(0.01)
# Every class starts at score 0.01: the focal-type losses then start small.
_prior_bias = nnx.initializers.constant(-math.log((1 - 0.01) / 0.01))


class Outputs(NamedTuple):
    """What a head predicts, level by level (P3 first), float32.

    cls_logits: logits, not scores; joint with the IoU in GFL.
    box_logits: regression channels after the level's Scale, side-major (l, t, r, b) times bins.
    """

    cls_logits: list[Float[Array, "b _ _ classes"]]
    box_logits: list[Float[Array, "b _ _ channels"]]


class Scale(nnx.Module):
    """A learnable factor, one per level."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return x * self.scale[...]


class GFLHead(nnx.Module):
    """The head of GFL: classification-IoU logits and one distribution of n+1 bins per box side."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        box_channels: int,
        *,
        width: int = 256,
        stacked_convs: int = 4,
        num_levels: int = 5,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build with the reference's initial weights: N(0, 0.01), biases 0, class bias -4.595.

        Args:
            in_features: channels of the pyramid.
            num_classes: outputs of the classification branch.
            box_channels: outputs of the regression branch, 4 * (n + 1) for GFL.
            width: channels of the towers; a multiple of 32 (GroupNorm has 32 groups).
            stacked_convs: convolutions per tower.
            num_levels: pyramid levels, one Scale each.
            dtype: of the convolutions; outputs are float32.
            rngs: source of the initial weights.
        """

        def tower():
            return nnx.List(
                ConvModule(
                    in_features if i == 0 else width,
                    width,
                    3,
                    norm_groups=32,
                    relu=True,
                    kernel_init=_normal,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(stacked_convs)
            )

        self.cls_convs, self.reg_convs = tower(), tower()
        c_in = width if stacked_convs else in_features
        self.gfl_cls = conv2d(
            c_in, num_classes, 3, kernel_init=_normal, bias_init=_prior_bias, dtype=dtype, rngs=rngs
        )
        self.gfl_reg = conv2d(c_in, box_channels, 3, kernel_init=_normal, dtype=dtype, rngs=rngs)
        self.scales = nnx.List(Scale() for _ in range(num_levels))

    def __call__(self, levels: Sequence[Float[Array, "b _ _ c"]]) -> Outputs:
        cls_logits, box_logits = [], []
        for x, scale in zip(levels, self.scales, strict=True):
            cls, reg = x, x
            for conv in self.cls_convs:
                cls = conv(cls)
            for conv in self.reg_convs:
                reg = conv(reg)
            cls_logits.append(self.gfl_cls(cls).astype(jnp.float32))
            box_logits.append(scale(self.gfl_reg(reg).astype(jnp.float32)))
        return Outputs(cls_logits, box_logits)
