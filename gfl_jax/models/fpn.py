"""Feature pyramid (Lin et al., arXiv 1612.03144) with two extra levels, P6 and P7."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gfl_jax.models.layers import ConvModule, upsample_nearest


@dataclasses.dataclass(frozen=True)
class Neck:
    """The feature pyramid.

    Attributes:
        width: Channels of every level; 256 in the paper.
        extra_from: Input of the strided convolution that makes P6: P5 ('output'; GFL, ATSS, FCOS)
            or C5 ('input'; RetinaNet, FoveaBox). P7 is made from P6.
        extra_relu: Whether there is a ReLU between P6 and P7 (FCOS).
    """

    width: int = 256
    extra_from: Literal["output", "input"] = "output"
    extra_relu: bool = False


class FPN(nnx.Module):
    """Maps C2..C5 (C2 is not used) to P3..P7 at strides 8..128."""

    def __init__(
        self,
        in_features: Sequence[int],
        neck: Neck = Neck(),
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def conv(c_in, kernel_size, stride=1):
            return ConvModule(
                c_in,
                neck.width,
                kernel_size,
                stride=stride,
                kernel_init=nnx.initializers.xavier_uniform(),
                dtype=dtype,
                rngs=rngs,
            )

        self.neck = neck
        used = in_features[1:]
        first = used[-1] if neck.extra_from == "input" else neck.width
        extra = [conv(first, 3, stride=2), conv(neck.width, 3, stride=2)]
        self.lateral_convs = nnx.List([conv(c, 1) for c in used])
        self.fpn_convs = nnx.List([conv(neck.width, 3) for _ in used] + extra)

    @jax.named_scope("neck")
    def __call__(
        self, features: Sequence[Float[Array, "b _ _ _"]]
    ) -> list[Float[Array, "b _ _ c"]]:
        used = features[1:]
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, used, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + upsample_nearest(merged[i + 1], merged[i].shape[1:3])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=False)]
        to_p6, to_p7 = self.fpn_convs[len(merged) :]
        p6 = to_p6(used[-1] if self.neck.extra_from == "input" else levels[-1])
        p7 = to_p7(jax.nn.relu(p6) if self.neck.extra_relu else p6)
        return [*levels, p6, p7]
