"""The pyramid against its definition, level by level, from convolutions that are tested alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gfl_jax.models.fpn import FPN, Neck

CHANNELS = (4, 6, 8, 10)
SIDES = ((16, 24), (8, 12), (4, 6), (2, 3))
PYRAMID = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))


def features():
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=(2, *side, c)), jnp.float32)
        for side, c in zip(SIDES, CHANNELS, strict=True)
    ]


def pyramid(neck):
    fpn = FPN(CHANNELS, neck, rngs=nnx.Rngs(0))
    for conv in (*fpn.lateral_convs, *fpn.fpn_convs):
        bias = np.random.default_rng(1).normal(size=neck.width)
        conv.conv.bias[...] = jnp.asarray(bias, jnp.float32)
    return fpn, fpn(features())


def twice(x, height, width):
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]


@pytest.mark.parametrize("extra_from", ["output", "input"])
@pytest.mark.parametrize("extra_relu", [False, True])
def test_levels_are_those_of_the_definition(extra_from, extra_relu):
    fpn, levels = pyramid(Neck(5, extra_from, extra_relu))
    assert [x.shape for x in levels] == [(2, *side, 5) for side in PYRAMID]
    _, c3, c4, c5 = features()
    m3, m4, m5 = (lateral(c) for lateral, c in zip(fpn.lateral_convs, (c3, c4, c5), strict=True))
    m4 = m4 + twice(m5, 4, 6)
    m3 = m3 + twice(m4, 8, 12)
    expected = [conv(m) for conv, m in zip(fpn.fpn_convs, (m3, m4, m5), strict=False)]
    expected.append(fpn.fpn_convs[3](expected[2] if extra_from == "output" else c5))
    p6 = expected[3]
    assert (np.asarray(p6) < 0).any()
    expected.append(fpn.fpn_convs[4](np.maximum(p6, 0) if extra_relu else p6))
    for ours, theirs in zip(levels, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("extra_from", "channels"), [("output", 5), ("input", 10)])
def test_p6_takes_the_channels_of_what_it_is_made_of(extra_from, channels):
    fpn = FPN(CHANNELS, Neck(5, extra_from), rngs=nnx.Rngs(0))
    assert [conv.conv.kernel[...].shape for conv in fpn.fpn_convs] == [
        (3, 3, 5, 5),
        (3, 3, 5, 5),
        (3, 3, 5, 5),
        (3, 3, channels, 5),
        (3, 3, 5, 5),
    ]


@pytest.mark.parametrize("neck", [Neck(5), Neck(5, "input"), Neck(5, "input", True)])
def test_c2_is_not_used(neck):
    fpn = FPN(CHANNELS, neck, rngs=nnx.Rngs(0))
    gradient = jax.grad(lambda x: sum(level.sum() for level in fpn(x)))(features())
    assert [bool(np.any(g)) for g in gradient] == [False, True, True, True]
