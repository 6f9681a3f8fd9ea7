"""What each operation of JAX that the detectors use is in ONNX.

A rule adds nodes to a graph for an equation of a jaxpr and returns its results. An operation, or a
form of one, that no detector here uses has no rule and is an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax import lax

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
    from onnx import helper, numpy_helper

CHANNELS_SECOND = (0, 3, 1, 2)


def _result(graph: Graph, equation: Any, name: str, order: Sequence[int] | None = None) -> Value:
    """A result of full shape."""
    shape = tuple(equation.outvars[0].aval.shape)
    return Tensor(name, shape, plain(len(shape)) if order is None else tuple(order))


def _unsupported(equation: Any) -> InputError:
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
    """Of a constant the negative is added: x - c = x + (-c), which runtimes merge into a convolution before it."""
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
        raise _unsupported(equation)
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
    shape = [1] * rank
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
            target = graph.constant(np.array([0, groups, size, h, w], np.int64))
            name = graph.node("Reshape", [value.name, target])
            return [_result(graph, equation, name, (0, 3, 4, 1, 2))]
    unknown = [axis for axis, length in enumerate(new) if not is_static([length])]
    if len(unknown) > 1:
        raise _unsupported(equation)
    target = np.array([x if is_static([x]) else -1 for x in new], np.int64)
    name = graph.node("Reshape", [graph.read(operand), graph.constant(target)])
    return [_result(graph, equation, name)]


def _squeeze(graph: Graph, equation: Any) -> list[Value]:
    axes = graph.constant(np.array(equation.params["dimensions"], np.int64))
    (operand,) = equation.invars
    return [_result(graph, equation, graph.node("Squeeze", [graph.read(operand), axes]))]


def _transpose(graph: Graph, equation: Any) -> list[Value]:
    (operand,), permutation = equation.invars, equation.params["permutation"]
    return [_result(graph, equation, graph.read(operand, permutation))]


def _concatenate(graph: Graph, equation: Any) -> list[Value]:
    names = [graph.read(x) for x in equation.invars]
    name = graph.node("Concat", names, axis=int(equation.params["dimension"]))
    return [_result(graph, equation, name)]


def _slice(graph: Graph, equation: Any) -> list[Value]:
    (operand,), params = equation.invars, equation.params
    lengths = operand.aval.shape
    steps = params["strides"] or (1,) * len(lengths)
    axes = [
        axis
        for axis, length in enumerate(lengths)
        if (params["start_indices"][axis], params["limit_indices"][axis], steps[axis])
        != (0, length, 1)
    ]
    parts = [params["start_indices"], params["limit_indices"], plain(len(lengths)), steps]
    if not axes:
        return [graph.value(operand)]
    if not all(is_static([part[axis] for axis in axes]) for part in parts):
        raise _unsupported(equation)
    names = [graph.constant(np.array([part[axis] for axis in axes], np.int64)) for part in parts]
    return [_result(graph, equation, graph.node("Slice", [graph.read(operand), *names]))]


def _pad(graph: Graph, equation: Any) -> list[Value]:
    (operand, value), config = equation.invars, equation.params["padding_config"]
    if any(inner or low < 0 or high < 0 for low, high, inner in config):
        raise _unsupported(equation)
    pads = [low for low, _, _ in config] + [high for _, high, _ in config]
    names = [graph.read(operand), graph.constant(np.array(pads, np.int64)), graph.read(value)]
    return [_result(graph, equation, graph.node("Pad", names))]


def _rev(graph: Graph, equation: Any) -> list[Value]:
    (operand,) = equation.invars
    name = graph.read(operand)
    for axis in equation.params["dimensions"]:
        indices = np.arange(operand.aval.shape[axis])[::-1]
        name = graph.node("Gather", [name, graph.constant(indices)], axis=int(axis))
    return [_result(graph, equation, name)]


def _tile(graph: Graph, equation: Any) -> list[Value]:
    (operand,) = equation.invars
    reps = graph.constant(np.array(equation.params["reps"], np.int64))
    return [_result(graph, equation, graph.node("Tile", [graph.read(operand), reps]))]


def _iota(graph: Graph, equation: Any) -> list[Value]:
    """Of a shape that is not known: repeated along its other axes."""
    shape, axis = equation.params["shape"], equation.params["dimension"]
    if not is_static([shape[axis]]):
        count = graph.node("Squeeze", [graph.batch(shape[axis])])
        zero, one = (graph.constant(np.array(x, np.int64)) for x in (0, 1))
        name = graph.node("Range", [zero, count, one])
        name = graph.node("Cast", [name], to=tensor_type(equation.params["dtype"]))
        target = np.array([-1 if i == axis else 1 for i in range(len(shape))], np.int64)
        name = graph.node("Reshape", [name, graph.constant(target)])
        thin = tuple(x if i == axis else 1 for i, x in enumerate(shape))
        return [Tensor(name, thin, plain(len(shape)))]
    thin = [x if i == axis else 1 for i, x in enumerate(shape)]
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
        return [_result(graph, equation, name, [kept.index(a) for a in order if a not in axes])]

    return rule


def _argmax(graph: Graph, equation: Any) -> list[Value]:
    (operand,), (axis,) = equation.invars, equation.params["axes"]
    name = graph.node("ArgMax", [graph.read(operand)], axis=int(axis), keepdims=0)
    name = graph.node("Cast", [name], to=tensor_type(equation.params["index_dtype"]))
    return [_result(graph, equation, name)]


def _top_k(graph: Graph, equation: Any) -> list[Value]:
    (operand,), axis = equation.invars, int(equation.params["axis"])
    k = graph.constant(np.array([equation.params["k"]], np.int64))
    values, indices = graph.nodes_of("TopK", [graph.read(operand), k], 2, axis=axis)
    indices = graph.node("Cast", [indices], to=tensor_type(equation.outvars[1].aval.dtype))
    return [_result(graph, equation, values), _result(graph, equation, indices)]


# ---------------------------------------------------------------------------------------- indexing


def _gather(graph: Graph, equation: Any) -> list[Value]:
    """Rows chosen by indices: of one axis, or of one axis image by image."""
    (operand, indices), params = equation.invars, equation.params
    numbers, lengths = params["dimension_numbers"], operand.aval.shape
    result, mapped = equation.outvars[0].aval, numbers.start_index_map
    batched = tuple(numbers.operand_batching_dims)
    if indices.aval.shape == (1,) and not numbers.collapsed_slice_dims and not batched:
        return [_window(graph, equation)]
    single = {*mapped, *batched}
    sizes = params["slice_sizes"]
    collapsed = set(numbers.collapsed_slice_dims)
    whole = all(
        sizes[axis] == (1 if axis in single else length) for axis, length in enumerate(lengths)
    )
    if not whole or not collapsed <= set(mapped):
        raise _unsupported(equation)
    name = graph.read(indices)
    if params["mode"] != lax.GatherScatterMode.PROMISE_IN_BOUNDS:
        last = np.array([lengths[axis] - 1 for axis in mapped], indices.aval.dtype)
        name = graph.node("Max", [name, graph.constant(np.zeros((), last.dtype))])
        name = graph.node("Min", [name, graph.constant(last)])
    outer = indices.aval.ndim - 1
    if not batched and len(mapped) == 1:
        name = graph.node("Squeeze", [name, graph.constant(np.array([-1], np.int64))])
        name = graph.node("Gather", [graph.read(operand), name], axis=int(mapped[0]))
        first = mapped[0]
    else:
        leading = plain(len(batched) + len(mapped))
        if (*batched, *mapped) != leading or batched != tuple(numbers.start_indices_batching_dims):
            raise _unsupported(equation)
        name = graph.node("Cast", [name], to=tensor_type(np.int64))
        name = graph.node("GatherND", [graph.read(operand), name], batch_dims=len(batched))
        first = 0
    # Indexed axes may stay, with length 1. The axes of the indices replace the indexed axis.
    kept = [axis for axis in range(len(lengths)) if axis not in collapsed | set(batched)]
    ones = [x for x, axis in zip(numbers.offset_dims, kept, strict=True) if axis in mapped]
    others = [axis for axis in range(result.ndim) if axis not in ones]
    expected = [axis for i, axis in enumerate(others) if not first <= i < first + outer]
    if [axis for axis in numbers.offset_dims if axis not in ones] != expected:
        raise _unsupported(equation)
    if ones:
        name = graph.node("Unsqueeze", [name, graph.constant(np.array(ones, np.int64))])
    return [_result(graph, equation, name)]


def _window(graph: Graph, equation: Any) -> Value:
    """Neighbouring rows of one axis, from a known one on."""
    (operand, indices), params = equation.invars, equation.params
    (axis,), sizes = params["dimension_numbers"].start_index_map, params["slice_sizes"]
    others = [size == length for size, length in zip(sizes, operand.aval.shape, strict=True)]
    if not all(same or i == axis for i, same in enumerate(others)):
        raise _unsupported(equation)
    start = graph.array(indices).astype(np.int64)
    bounds = start, start + sizes[axis], np.array([axis], np.int64)
    names = [graph.read(operand), *map(graph.constant, bounds)]
    return _result(graph, equation, graph.node("Slice", names))


def _scatter(graph: Graph, equation: Any) -> list[Value]:
    """Everything at one index of one axis is replaced."""
    operand, indices, updates = equation.invars
    numbers, rank = equation.params["dimension_numbers"], operand.aval.ndim
    axes = tuple(numbers.scatter_dims_to_operand_dims)
    simple = len(axes) == 1 and tuple(numbers.inserted_window_dims) == axes
    if not simple or indices.aval.shape != (1,) or numbers.operand_batching_dims:
        raise _unsupported(equation)
    (axis,) = map(int, axes)
    places = np.arange(operand.aval.shape[axis], dtype=indices.aval.dtype)
    places = places.reshape([-1 if i == axis else 1 for i in range(rank)])
    here = graph.node("Equal", [graph.constant(places), graph.read(indices)])
    new = graph.node("Unsqueeze", [graph.read(updates), graph.constant(np.array([axis], np.int64))])
    return [_result(graph, equation, graph.node("Where", [here, new, graph.read(operand)]))]


# ------------------------------------------------------------------------------------ convolutions


def _conv(graph: Graph, equation: Any) -> list[Value]:
    (x, kernel), params = equation.invars, equation.params
    numbers = params["dimension_numbers"]
    plain_layout = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (
        (0, 3, 1, 2),
        (3, 2, 0, 1),
        (0, 3, 1, 2),
    )
    if not plain_layout or set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise _unsupported(equation)
    (top, bottom), (left, right) = params["padding"]
    name = graph.node(
        "Conv",
        [graph.read(x, CHANNELS_SECOND), graph.read(kernel, (3, 2, 0, 1))],
        kernel_shape=kernel.aval.shape[:2],
        strides=params["window_strides"],
        dilations=params["rhs_dilation"],
        pads=[int(side) for side in (top, left, bottom, right)],
        group=params["feature_group_count"],
    )
    return [_result(graph, equation, name, CHANNELS_SECOND)]


def _max_pool(graph: Graph, equation: Any) -> list[Value]:
    (x,), params = equation.invars, equation.params
    windows, strides, pads = (
        params[name] for name in ("window_dimensions", "window_strides", "padding")
    )
    flat = (windows[0], windows[3], strides[0], strides[3], *pads[0], *pads[3])
    dilations = {*params["base_dilation"], *params["window_dilation"]}
    if flat != (1, 1, 1, 1, 0, 0, 0, 0) or dilations != {1}:
        raise _unsupported(equation)
    name = graph.node(
        "MaxPool",
        [graph.read(x, CHANNELS_SECOND)],
        kernel_shape=windows[1:3],
        strides=strides[1:3],
        pads=[int(side) for side in (pads[1][0], pads[2][0], pads[1][1], pads[2][1])],
    )
    return [_result(graph, equation, name, CHANNELS_SECOND)]


# ------------------------------------------------------------------------- functions and branches


def _inlined(name: str) -> Handler:
    """A function that is called: its equations."""

    def rule(graph: Graph, equation: Any) -> list[Value]:
        inner = equation.params[name]
        arguments = [graph.value(x) for x in equation.invars]
        if hasattr(inner, "consts"):
            return graph.closed(inner, arguments)
        return graph.run(inner, arguments)

    return rule


def _platform(graph: Graph, equation: Any) -> list[Value]:
    """The way of every other platform, which is the plain one."""
    platforms = equation.params["platforms"]
    default = next((i for i, names in enumerate(platforms) if names is None), len(platforms) - 1)
    return [Constant(np.array(default, np.int32))]


def _cond(graph: Graph, equation: Any) -> list[Value]:
    index, *arguments = equation.invars
    branch = equation.params["branches"][int(graph.array(index))]
    return graph.closed(branch, [graph.value(x) for x in arguments])


def _scan(graph: Graph, equation: Any) -> list[Value]:
    """A loop of a fixed number of rounds that reads and collects nothing on the way."""
    params, carried = equation.params, equation.params["num_carry"]
    known = params["num_consts"]
    if len(equation.invars) != known + carried or len(equation.outvars) != carried:
        raise _unsupported(equation)
    body, jaxpr = Graph(graph.handlers, graph), params["jaxpr"].jaxpr
    variables = jaxpr.invars[known:]
    names = [body.fresh("carry") for _ in variables]
    tensors = [
        Tensor(name, tuple(x.aval.shape), plain(x.aval.ndim))
        for name, x in zip(names, variables, strict=True)
    ]
    constants = [graph.value(x) for x in equation.invars[:known]]
    body.closed(params["jaxpr"], [*constants, *tensors])
    step, going, still = (body.fresh(name) for name in ("step", "going", "still"))
    body.nodes.append(helper.make_node("Identity", [going], [still]))
    results = [body.node("Identity", [body.read(x)]) for x in jaxpr.outvars]
    info = helper.make_tensor_value_info
    condition = tensor_type(np.bool_)
    inner = helper.make_graph(
        body.nodes,
        "body",
        [
            info(step, tensor_type(np.int64), []),
            info(going, condition, []),
            *(body.info(n, x.aval) for n, x in zip(names, variables, strict=True)),
        ],
        [
            info(still, condition, []),
            *(body.info(n, x.aval) for n, x in zip(results, jaxpr.outvars, strict=True)),
        ],
    )
    rounds = graph.constant(np.array(params["length"], np.int64))
    start = [graph.read(x) for x in equation.invars[known:]]
    outputs = graph.nodes_of(
        "Loop", [rounds, graph.constant(np.array(True)), *start], carried, body=inner
    )
    return [
        Tensor(name, tuple(x.aval.shape), plain(x.aval.ndim))
        for name, x in zip(outputs, equation.outvars, strict=True)
    ]


RULES: dict[str, Handler] = {
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
    "argmax": _argmax,
    "reduce_and": _reduction("ReduceMin"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_or": _reduction("ReduceMax"),
    "reduce_sum": _reduction("ReduceSum"),
    "top_k": _top_k,
    "gather": _gather,
    "scatter": _scatter,
    "conv_general_dilated": _conv,
    "reduce_window_max": _max_pool,
    "checkpoint": _inlined("jaxpr"),
    "cond": _cond,
    "custom_jvp_call": _inlined("call_jaxpr"),
    "custom_vjp_call": _inlined("call_jaxpr"),
    "jit": _inlined("jaxpr"),
    "platform_index": _platform,
    "scan": _scan,
}
