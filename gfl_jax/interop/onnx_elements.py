"""Operations of JAX on elements and shapes in ONNX, see `gfl_jax.interop.onnx_ops`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gfl_jax.errors import InputError, needs
from gfl_jax.interop.onnx_graph import (
    Constant,
    Graph,
    Handler,
    Tensor,
    Value,
    is_static,
    plain,
    tensor_type,
)

with needs("onnx"):
    from onnx import numpy_helper

CHANNELS_SECOND = (0, 3, 1, 2)


def result_of(graph: Graph, equation: Any, name: str, order: Sequence[int] | None = None) -> Value:
    """A result of full shape."""
    shape = tuple(equation.outvars[0].aval.shape)
    return Tensor(name, shape, plain(len(shape)) if order is None else tuple(order))


def unsupported(equation: Any) -> InputError:
    """The error of an operation in a form that has no rule."""
    return InputError(
        f"ONNX export has no rule for this form of JAX's operation {equation.primitive.name!r}: "
        "export with --format stablehlo instead"
    )


# ------------------------------------------------------------------------------- element by element


def _elements(kind: str | Callable[..., str], **attributes: Any) -> Handler:
    """An operation on elements: of one array, or of several that are broadcast."""

    def rule(graph: Graph, equation: Any) -> list[Value]:
        rank = equation.outvars[0].aval.ndim
        operands = [(graph.value(x), x) for x in equation.invars]
        ordered = [v for v, _ in operands if isinstance(v, Tensor) and len(v.order) == rank]
        # The largest array decides: the others are scalars or vectors more often than not.
        order = max(ordered, key=_size).order if ordered else plain(rank)
        names = [
            graph.read(x, order if x.aval.ndim == rank else None, full=False) for _, x in operands
        ]
        if isinstance(kind, str):
            name = graph.node(kind, names, **attributes)
        else:
            name = kind(graph, equation, *names)
        shapes = [v.shape for v, _ in operands if len(v.shape) == rank]
        shape = tuple(_longer(lengths) for lengths in zip(*shapes, strict=True))
        return [Tensor(name, shape, order)]

    return rule


def _size(value: Tensor) -> int:
    return int(np.prod([x for x in value.shape if is_static([x])]))


def _longer(lengths: Sequence[Any]) -> Any:
    return next((x for x in lengths if not is_static([x]) or x != 1), 1)


def _sub(graph: Graph, equation: Any, a: str, b: str) -> str:
    """Of a constant the negative is added, which runtimes merge into a convolution before it."""
    subtracted = graph.value(equation.invars[1])
    if not isinstance(subtracted, Constant) or subtracted.array.dtype.kind != "f":
        return graph.node("Sub", [a, b])
    negative = -numpy_helper.to_array(graph.initializers[b])
    return graph.node("Add", [a, graph.constant(negative)])


def _square(graph: Graph, equation: Any, x: str) -> str:
    return graph.node("Mul", [x, x])


def _rsqrt(graph: Graph, equation: Any, x: str) -> str:
    return graph.node("Reciprocal", [graph.node("Sqrt", [x])])


def _ne(graph: Graph, equation: Any, a: str, b: str) -> str:
    return graph.node("Not", [graph.node("Equal", [a, b])])


def _integer_pow(graph: Graph, equation: Any, x: str) -> str:
    exponent = np.array(equation.params["y"], equation.invars[0].aval.dtype)
    return graph.node("Pow", [x, graph.constant(exponent)])


def _select(graph: Graph, equation: Any, which: str, *cases: str) -> str:
    if len(cases) != 2 or equation.invars[0].aval.dtype != np.bool_:
        raise unsupported(equation)
    return graph.node("Where", [which, cases[1], cases[0]])


def _clamp(graph: Graph, equation: Any, low: str, x: str, high: str) -> str:
    return graph.node("Min", [graph.node("Max", [x, low]), high])


def _cast(graph: Graph, equation: Any, x: str) -> str:
    return graph.node("Cast", [x], to=tensor_type(equation.params["new_dtype"]))


# ------------------------------------------------------------------------------------------ shapes


def _broadcast(graph: Graph, equation: Any) -> list[Value]:
    """Only axes of length 1 are inserted: ONNX repeats along them where it must."""
    (operand, *_), axes = equation.invars, equation.params["broadcast_dimensions"]
    value, rank = graph.value(operand), equation.outvars[0].aval.ndim
    if axes == plain(rank):
        return [value]
    shape: list[Any] = [1] * rank
    for axis, length in zip(axes, value.shape, strict=True):
        shape[axis] = length
    if isinstance(value, Constant):
        return [Constant(value.array.reshape(shape))]
    new = [axis for axis in range(rank) if axis not in axes]
    name = graph.read(operand, full=False)
    if new:
        name = graph.node("Unsqueeze", [name, graph.constant(np.array(new, np.int64))])
    return [Tensor(name, tuple(shape), plain(rank))]


def _reshape(graph: Graph, equation: Any) -> list[Value]:
    (operand, *_), new = equation.invars, equation.outvars[0].aval.shape
    value, old = graph.value(operand), operand.aval.shape
    if len(old) == 4 and tuple(new[:3]) == tuple(old[:3]) and len(new) == 5:
        if isinstance(value, Tensor) and value.order == CHANNELS_SECOND and value.shape == old:
            # Channels into groups: as well where channels come second.
            _, h, w, groups, size = new
            groups_second = graph.constant(np.array([0, groups, size, h, w], np.int64))
            name = graph.node("Reshape", [value.name, groups_second])
            return [result_of(graph, equation, name, (0, 3, 4, 1, 2))]
    unknown = [axis for axis, length in enumerate(new) if not is_static([length])]
    if len(unknown) > 1:
        raise unsupported(equation)
    target = np.array([x if is_static([x]) else -1 for x in new], np.int64)
    name = graph.node("Reshape", [graph.read(operand), graph.constant(target)])
    return [result_of(graph, equation, name)]


def _squeeze(graph: Graph, equation: Any) -> list[Value]:
    axes = graph.constant(np.array(equation.params["dimensions"], np.int64))
    (operand,) = equation.invars
    return [result_of(graph, equation, graph.node("Squeeze", [graph.read(operand), axes]))]


def _unstack(graph: Graph, equation: Any) -> list[Value]:
    (operand,), axis = equation.invars, int(equation.params["axis"])
    name = graph.read(operand)
    places = [graph.constant(np.array(i, np.int64)) for i in range(len(equation.outvars))]
    parts = [graph.node("Gather", [name, place], axis=axis) for place in places]
    return [result_of(graph, equation, part) for part in parts]


def _transpose(graph: Graph, equation: Any) -> list[Value]:
    (operand,), permutation = equation.invars, equation.params["permutation"]
    return [result_of(graph, equation, graph.read(operand, permutation))]


def _concatenate(graph: Graph, equation: Any) -> list[Value]:
    names = [graph.read(x) for x in equation.invars]
    name = graph.node("Concat", names, axis=int(equation.params["dimension"]))
    return [result_of(graph, equation, name)]


def _slice(graph: Graph, equation: Any) -> list[Value]:
    (operand,), params = equation.invars, equation.params
    lengths = operand.aval.shape
    steps = params["strides"] or (1,) * len(lengths)
    bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    parts = [
        (start, limit, axis, step)
        for axis, (start, limit, step) in enumerate(bounds)
        if (start, limit, step) != (0, lengths[axis], 1)
    ]
    if not parts:
        return [graph.value(operand)]
    if not all(map(is_static, parts)):
        raise unsupported(equation)
    names = [graph.constant(np.array(part, np.int64)) for part in zip(*parts, strict=True)]
    return [result_of(graph, equation, graph.node("Slice", [graph.read(operand), *names]))]


def _pad(graph: Graph, equation: Any) -> list[Value]:
    (operand, value), config = equation.invars, equation.params["padding_config"]
    if any(inner or low < 0 or high < 0 for low, high, inner in config):
        raise unsupported(equation)
    pads = [low for low, _, _ in config] + [high for _, high, _ in config]
    names = [graph.read(operand), graph.constant(np.array(pads, np.int64)), graph.read(value)]
    return [result_of(graph, equation, graph.node("Pad", names))]


def _rev(graph: Graph, equation: Any) -> list[Value]:
    (operand,) = equation.invars
    name = graph.read(operand)
    for axis in equation.params["dimensions"]:
        indices = np.arange(operand.aval.shape[axis])[::-1]
        name = graph.node("Gather", [name, graph.constant(indices)], axis=int(axis))
    return [result_of(graph, equation, name)]


def _tile(graph: Graph, equation: Any) -> list[Value]:
    (operand,) = equation.invars
    reps = graph.constant(np.array(equation.params["reps"], np.int64))
    return [result_of(graph, equation, graph.node("Tile", [graph.read(operand), reps]))]


def _iota(graph: Graph, equation: Any) -> list[Value]:
    """0, 1, ... along an axis, of length 1 along the others."""
    shape, axis = equation.params["shape"], equation.params["dimension"]
    thin = [x if i == axis else 1 for i, x in enumerate(shape)]
    if not is_static([shape[axis]]):
        count = graph.node("Squeeze", [graph.batch(shape[axis])])
        zero, one = (graph.constant(np.array(x, np.int64)) for x in (0, 1))
        name = graph.node("Range", [zero, count, one])
        name = graph.node("Cast", [name], to=tensor_type(equation.params["dtype"]))
        target = np.array([-1 if i == axis else 1 for i in range(len(shape))], np.int64)
        name = graph.node("Reshape", [name, graph.constant(target)])
        return [Tensor(name, thin, plain(len(shape)))]
    return [Constant(np.arange(shape[axis], dtype=equation.params["dtype"]).reshape(thin))]


# ------------------------------------------------------------------------------ sums and the like


def _reduction(kind: str) -> Handler:
    def rule(graph: Graph, equation: Any) -> list[Value]:
        (operand, *_), axes = equation.invars, equation.params["axes"]
        value = graph.value(operand)
        order = value.order if isinstance(value, Tensor) else plain(operand.aval.ndim)
        name = graph.read(operand, order)
        logical = operand.aval.dtype == np.bool_
        if logical:
            name = graph.node("Cast", [name], to=tensor_type(np.int32))
        stored = graph.constant(np.array(sorted(order.index(a) for a in axes), np.int64))
        name = graph.node(kind, [name, stored], keepdims=0)
        if logical:
            name = graph.node("Cast", [name], to=tensor_type(np.bool_))
        kept = [a for a in range(operand.aval.ndim) if a not in axes]
        return [result_of(graph, equation, name, [kept.index(a) for a in order if a not in axes])]

    return rule


def _argmax(graph: Graph, equation: Any) -> list[Value]:
    (operand,), (axis,) = equation.invars, equation.params["axes"]
    name = graph.node("ArgMax", [graph.read(operand)], axis=int(axis), keepdims=0)
    name = graph.node("Cast", [name], to=tensor_type(equation.params["index_dtype"]))
    return [result_of(graph, equation, name)]


def _top_k(graph: Graph, equation: Any) -> list[Value]:
    (operand,), axis = equation.invars, int(equation.params["axis"])
    k = graph.constant(np.array([equation.params["k"]], np.int64))
    values, indices = graph.nodes_of("TopK", [graph.read(operand), k], 2, axis=axis)
    indices = graph.node("Cast", [indices], to=tensor_type(equation.outvars[1].aval.dtype))
    return [result_of(graph, equation, values), result_of(graph, equation, indices)]


ELEMENTS_AND_SHAPES: dict[str, Handler] = {
    **{
        name: _elements(kind)
        for name, kind in {
            "abs": "Abs",
            "add": "Add",
            "and": "And",
            "ceil": "Ceil",
            "copy": "Identity",
            "div": "Div",
            "eq": "Equal",
            "exp": "Exp",
            "floor": "Floor",
            "ge": "GreaterOrEqual",
            "gt": "Greater",
            "le": "LessOrEqual",
            "log": "Log",
            "logistic": "Sigmoid",
            "lt": "Less",
            "max": "Max",
            "min": "Min",
            "mul": "Mul",
            "neg": "Neg",
            "not": "Not",
            "or": "Or",
            "sign": "Sign",
            "sqrt": "Sqrt",
            "stop_gradient": "Identity",
            "tanh": "Tanh",
        }.items()
    },
    "clamp": _elements(_clamp),
    "convert_element_type": _elements(_cast),
    "integer_pow": _elements(_integer_pow),
    "ne": _elements(_ne),
    "rem": _elements("Mod", fmod=1),
    "rsqrt": _elements(_rsqrt),
    "select_n": _elements(_select),
    "square": _elements(_square),
    "sub": _elements(_sub),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "squeeze": _squeeze,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
    "argmax": _argmax,
    "reduce_and": _reduction("ReduceMin"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_or": _reduction("ReduceMax"),
    "reduce_sum": _reduction("ReduceSum"),
    "top_k": _top_k,
}
