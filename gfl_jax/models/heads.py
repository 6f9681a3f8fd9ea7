"""Dense heads: two towers shared by all pyramid levels, and their outputs per cell."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gfl_jax.errors import InputError
from gfl_jax.models.layers import ConvModule, conv2d

_normal = nnx.initializers.normal(0.01)
PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)
"""Initial bias of class logits: scores start at 0.01, which keeps focal losses small."""


class Outputs(NamedTuple):
    """The outputs of a head, float32, one array per level (finest first).

    The channels of a cell list its priors one after another.

    Attributes:
        cls_logits: Logits, not scores; in GFL of the joint class and IoU score.
        box_logits: Regression channels after the level's Scale; in GFL sides (l, t, r, b) times
            bins.
        quality_logits: One per prior; empty without a quality branch.
    """

    cls_logits: list[Float[Array, "b _ _ classes"]]
    box_logits: list[Float[Array, "b _ _ channels"]]
    quality_logits: Sequence[Float[Array, "b _ _ priors"]] = ()


class OutputSpec(NamedTuple):
    """What a head has to predict.

    Attributes:
        cls: Class channels per prior.
        box: Regression channels per prior.
        quality: Name of the quality branch; empty for none.
        per_cell: Priors per cell of each level.
        cls_bias: Initial bias of the class logits.
    """

    cls: int
    box: int
    quality: str = ""
    per_cell: tuple[int, ...] = (1, 1, 1, 1, 1)
    cls_bias: float = PRIOR_BIAS


@dataclasses.dataclass(frozen=True)
class Head:
    """The head.

    Attributes:
        names: Prefix of its last convolutions' names, as in mmdetection: 'gfl' for gfl_cls, ...
        width: Channels of the towers; 256 in the paper.
        stacked_convs: Convolutions per tower.
        norm: Norm of the towers: gn is GroupNorm with 32 groups (width must be a multiple of 32).
        conv_bias: Whether the towers' convolutions have biases even if a norm follows (FCOS).
        quality_on: Tower that feeds the quality branch.
        scales: Whether each level multiplies its regression by a learnable factor.
    """

    names: Literal["gfl", "atss", "conv", "retina"] = "gfl"
    width: int = 256
    stacked_convs: int = 4
    norm: Literal["gn", "none"] = "gn"
    conv_bias: bool = False
    quality_on: Literal["reg", "cls"] = "reg"
    scales: bool = True


class DenseHead(nnx.Module):
    """Class, box and optional quality logits per cell; in GFL the class score is the quality."""

    def __init__(
        self,
        in_features: int,
        predicts: OutputSpec,
        head: Head = Head(),
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Build with mmdetection's initial weights: N(0, 0.01), biases 0, class bias -4.595.

        Args:
            in_features: Channels of the pyramid.
            predicts: The outputs.
            head: Sizes and options.
            dtype: Of the activations. The last convolutions multiply in it but accumulate in
                float32: outputs are not rounded to it.
            rngs: Source of the initial weights.

        Raises:
            ValueError: The number of priors per cell differs between levels.
        """
        if len(set(predicts.per_cell)) > 1:
            raise InputError(
                f"detector.priors has {predicts.per_cell} priors per cell; this head is shared "
                "by all levels, so all must have the same number"
            )

        def tower():
            return nnx.List(
                ConvModule(
                    in_features if i == 0 else head.width,
                    head.width,
                    3,
                    bias=head.conv_bias or head.norm == "none",
                    norm_groups=32 if head.norm == "gn" else 0,
                    relu=True,
                    kernel_init=_normal,
                    dtype=dtype,
                    rngs=rngs,
                )
                for i in range(head.stacked_convs)
            )

        def last(branch, features, **kwargs):
            c_in = head.width if head.stacked_convs else in_features
            conv = conv2d(
                c_in,
                features,
                3,
                kernel_init=_normal,
                dtype=dtype,
                out_dtype=jnp.float32,
                rngs=rngs,
                **kwargs,
            )
            setattr(self, f"{head.names}_{branch}", conv)

        self.head, self.quality = head, predicts.quality
        self.cls_convs, self.reg_convs = tower(), tower()
        priors = predicts.per_cell[0]
        bias_init = nnx.initializers.constant(predicts.cls_bias)
        last("cls", priors * predicts.cls, bias_init=bias_init)
        last("reg", priors * predicts.box)
        if predicts.quality:
            last(predicts.quality, priors)
        levels = len(predicts.per_cell) if head.scales else 0
        self.scales = nnx.List(Scale() for _ in range(levels))

    @jax.named_scope("bbox_head")
    def __call__(self, levels: Sequence[Float[Array, "b _ _ c"]]) -> Outputs:
        def last(branch, x):
            return getattr(self, f"{self.head.names}_{branch}")(x)

        outputs = Outputs([], [], [])
        for level, x in enumerate(levels):
            towers = {"cls": x, "reg": x}
            for conv in self.cls_convs:
                towers["cls"] = conv(towers["cls"])
            for conv in self.reg_convs:
                towers["reg"] = conv(towers["reg"])
            box = last("reg", towers["reg"])
            outputs.cls_logits.append(last("cls", towers["cls"]))
            outputs.box_logits.append(self.scales[level](box) if self.head.scales else box)
            if self.quality:
                quality = last(self.quality, towers[self.head.quality_on])
                outputs.quality_logits.append(quality)  # type: ignore[attr-defined]
        return outputs


class Scale(nnx.Module):
    """A learnable factor, one per level."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x * self.scale[...]
