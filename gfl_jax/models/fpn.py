"""Feature pyramid (Lin et al., arXiv 1612.03144) with two extra levels, P6 and P7."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gfl_jax.models.layers import ConvModule, upsample_nearest


class FPN(nnx.Module):
    """C3, C4, C5 to P3..P7 at strides 8..128; P6 and P7 are strided convolutions on P5."""

    def __init__(
        self,
        in_features: Sequence[int],
        width: int = 256,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def conv(c_in, kernel_size, stride=1):
            return ConvModule(
                c_in,
                width,
                kernel_size,
                stride=stride,
                kernel_init=nnx.initializers.xavier_uniform(),
                dtype=dtype,
                rngs=rngs,
            )

        self.lateral_convs = nnx.List([conv(c, 1) for c in in_features])
        self.fpn_convs = nnx.List(
            [conv(width, 3) for _ in in_features] + [conv(width, 3, stride=2) for _ in range(2)]
        )

    def __call__(
        self, features: Sequence[Float[Array, "b _ _ _"]]
    ) -> list[Float[Array, "b _ _ c"]]:
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, features, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + upsample_nearest(merged[i + 1], merged[i].shape[1:3])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, merged, strict=False)]
        for conv in self.fpn_convs[len(merged) :]:
            levels.append(conv(levels[-1]))
        return levels
