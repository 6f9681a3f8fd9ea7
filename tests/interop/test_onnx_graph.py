"""Functions of JAX as ONNX graphs: what ONNX Runtime computes is what JAX computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gfl_jax.errors import InputError

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from gfl_jax.interop.onnx_graph import model_of
from gfl_jax.interop.onnx_ops import RULES

(BATCH,) = jax.export.symbolic_shape("batch")


def convert(function, *arrays):
    """The model of a function of arrays whose first axis is the batch."""
    shapes = [jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype) for x in arrays]
    traced = jax.jit(function).trace(*shapes)
    count = len(jax.tree.leaves(traced.out_info))
    names = [f"in_{i}" for i in range(len(arrays))]
    return model_of(traced, names, [f"out_{i}" for i in range(count)], RULES)


def assert_same(function, *arrays, atol=1e-5):
    """ONNX Runtime and JAX agree, also on another number of images than the first."""
    model = convert(function, *arrays)
    opened = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (len(arrays[0]), 1):
        part = [x[:count] for x in arrays]
        wanted = {x.name: part[int(x.name[3:])] for x in opened.get_inputs()}
        found = opened.run(None, wanted)
        expected = jax.tree.leaves(function(*map(jnp.asarray, part)))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, atol=atol)
    return model


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KERNEL = 0.05 * noise(3, 3, 32, 32, seed=1)
MAPS = noise(3, 6, 10, 32)


def conv(x, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, KERNEL, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=numbers
    )


def group_norm(x):
    groups = x.reshape(*x.shape[:3], 8, 4)
    centred = groups - groups.mean((1, 2, 4), keepdims=True)
    return (centred * lax.rsqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-5)).reshape(
        x.shape
    )


def test_towers_of_convolutions_are_not_transposed_in_between():
    scale, shift = noise(32, seed=2), noise(32, seed=3)

    def tower(x):
        for _ in range(4):
            x = jax.nn.relu((conv(x) - shift) * scale + shift) + x
        return x

    model = assert_same(tower, MAPS, atol=1e-4)
    assert [node.op_type for node in model.graph.node].count("Transpose") == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: group_norm(conv(x)) + x,
        lambda x: conv(x, stride=2).reshape(x.shape[0], -1, 8),
        lambda x: jnp.repeat(jnp.repeat(conv(x), 2, axis=1), 2, axis=2),
        lambda x: lax.reduce_window(
            conv(x), -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        ),
        lambda x: conv(x).max(-1),
        lambda x: conv(x).transpose(3, 0, 2, 1).sum((0, 2)),
        lambda x: jnp.concatenate([conv(x), x], -1)[..., ::2],
        lambda x: x[:, jnp.arange(9) * 6 // 9][:, :, 2:5],
    ],
    ids=[
        "group norm",
        "stride",
        "repeat",
        "pool",
        "channels",
        "transposed",
        "concatenated",
        "rows",
    ],
)
def test_maps_keep_their_meaning_in_any_order_of_axes(function):
    assert_same(function, MAPS, atol=1e-4)


def test_constants_are_kept_once():
    model = convert(lambda x: conv(conv(conv(x))), MAPS)
    kernels = [x for x in model.graph.initializer if list(x.dims) == [32, 32, 3, 3]]
    assert len(kernels) == 1


ROWS = noise(3, 11, 4)
INDICES = np.random.default_rng(4).integers(0, 11, (3, 5)).astype(np.int32)
VALUES = np.random.default_rng(5).integers(-9, 9, (3, 7)).astype(np.int32)


@pytest.mark.parametrize(
    "function, arrays",
    [
        (lambda x, i: jax.vmap(lambda x, i: x[i])(x, i), (ROWS, INDICES)),
        (lambda x, i: jax.vmap(lambda x, i: x[i, 2])(x, i), (ROWS, INDICES)),
        (lambda x: jax.vmap(lambda x: x[jnp.argmax(x[:, 0]), 0])(x), (ROWS,)),
        (lambda i: jnp.asarray(ROWS[0])[i], (INDICES,)),
        (lambda i: jnp.asarray(ROWS[0])[i - 11], (INDICES,)),
        (lambda x: x[:, :, ::-1] + x[:, 3:4], (ROWS,)),
        (lambda x: lax.top_k(jnp.floor(x[..., 0]), 6), (ROWS,)),
        (lambda x: jnp.argmax(jnp.floor(x[..., 1]), axis=1), (ROWS,)),
        (lambda i: (i // 4, i % 4, lax.rem(i, 4), jnp.sign(i), abs(i)), (VALUES,)),
        (lambda i: (i > 0) & (i != 3) | ~(i <= -2), (VALUES,)),
        (lambda i: ((i > 0).all(1), (i > 0).any(1)), (VALUES,)),
        (lambda x: jnp.where(x > 0, x, 7.0).min(1), (ROWS,)),
        (lambda x: jax.nn.softmax(x).sum(1), (ROWS,)),
        (lambda x: jnp.clip(x, 0.0, jnp.abs(x[:, :1])), (ROWS,)),
        (lambda x: jnp.tile(x[:, 0], 3), (ROWS,)),
        (
            lambda x: jnp.arange(x.shape[0])[:, None] + jnp.zeros((x.shape[0], 3), jnp.int32),
            (ROWS,),
        ),
        (lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 0)), constant_values=5), (ROWS,)),
        (lambda x: jax.vmap(lambda row: tuple(row.T))(x), (ROWS,)),
        (lambda x: (x**3, jnp.exp(x), jax.nn.sigmoid(x), jnp.ceil(x), jnp.sqrt(x * x)), (ROWS,)),
    ],
)
def test_an_operation_is_that_of_jax(function, arrays):
    assert_same(function, *arrays)


def test_a_loop_carries_what_it_changes():
    def take_three(x):
        def take(i, carry):
            left, taken = carry
            best = jnp.argmax(left)
            left = jnp.where(jnp.arange(len(left)) == best, -9.0, left)
            return left, taken.at[i].set(best)

        return lax.fori_loop(0, 3, take, (x[:, 0], jnp.full(4, -1)))

    assert_same(jax.vmap(take_three), ROWS)


@pytest.mark.parametrize(
    "loop",
    [
        lambda x: lax.scan(lambda total, row: (total + row, None), x[0] * 0, x)[0],
        lambda x: lax.scan(lambda total, _: (total + 1, total), x, None, length=3)[1],
    ],
    ids=["reads", "collects"],
)
def test_a_loop_that_reads_or_collects_on_the_way_is_refused(loop):
    with pytest.raises(InputError, match="'scan'"):
        convert(jax.vmap(loop), ROWS)


def test_what_has_no_rule_is_refused_with_a_way_out():
    with pytest.raises(InputError, match=r"'cumsum'.*--format stablehlo"):
        convert(lambda x: jnp.cumsum(x, axis=1), ROWS)
    with pytest.raises(InputError, match=r"'scatter'.*--format stablehlo"):
        convert(lambda x, i: jax.vmap(lambda x, i: x.at[i].set(0))(x, i), ROWS, INDICES)
