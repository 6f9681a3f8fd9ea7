"""What each operation of JAX that the detectors use is in ONNX.

A rule adds nodes to a graph for an equation of a jaxpr and returns its results. An operation, or a
form of one, that no detector here uses has no rule and is an error.
"""

from typing import Any

import numpy as np
from jax import lax

from gfl_jax.errors import needs
from gfl_jax.interop.onnx_elements import (
    CHANNELS_SECOND,
    ELEMENTS_AND_SHAPES,
    result_of,
    unsupported,
)
from gfl_jax.interop.onnx_graph import Constant, Graph, Handler, Tensor, Value, plain, tensor_type

with needs("onnx"):
    from onnx import helper


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
        raise unsupported(equation)
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
            raise unsupported(equation)
        name = graph.node("Cast", [name], to=tensor_type(np.int64))
        name = graph.node("GatherND", [graph.read(operand), name], batch_dims=len(batched))
        first = 0
    # Indexed axes may stay, with length 1. The axes of the indices replace the indexed axis.
    kept = [axis for axis in range(len(lengths)) if axis not in collapsed | set(batched)]
    ones = [x for x, axis in zip(numbers.offset_dims, kept, strict=True) if axis in mapped]
    others = [axis for axis in range(result.ndim) if axis not in ones]
    expected = [axis for i, axis in enumerate(others) if not first <= i < first + outer]
    if [axis for axis in numbers.offset_dims if axis not in ones] != expected:
        raise unsupported(equation)
    if ones:
        name = graph.node("Unsqueeze", [name, graph.constant(np.array(ones, np.int64))])
    return [result_of(graph, equation, name)]


def _window(graph: Graph, equation: Any) -> Value:
    """Neighbouring rows of one axis, from a known one on."""
    (operand, indices), params = equation.invars, equation.params
    (axis,), sizes = params["dimension_numbers"].start_index_map, params["slice_sizes"]
    others = [size == length for size, length in zip(sizes, operand.aval.shape, strict=True)]
    if not all(same or i == axis for i, same in enumerate(others)):
        raise unsupported(equation)
    start = graph.array(indices).astype(np.int64)
    bounds = start, start + sizes[axis], np.array([axis], np.int64)
    names = [graph.read(operand), *map(graph.constant, bounds)]
    return result_of(graph, equation, graph.node("Slice", names))


def _scatter(graph: Graph, equation: Any) -> list[Value]:
    """Everything at one index of one axis is replaced."""
    operand, indices, updates = equation.invars
    numbers, rank = equation.params["dimension_numbers"], operand.aval.ndim
    axes = tuple(numbers.scatter_dims_to_operand_dims)
    simple = len(axes) == 1 and tuple(numbers.inserted_window_dims) == axes
    if not simple or indices.aval.shape != (1,) or numbers.operand_batching_dims:
        raise unsupported(equation)
    (axis,) = map(int, axes)
    places = np.arange(operand.aval.shape[axis], dtype=indices.aval.dtype)
    places = places.reshape([-1 if i == axis else 1 for i in range(rank)])
    here = graph.node("Equal", [graph.constant(places), graph.read(indices)])
    new = graph.node("Unsqueeze", [graph.read(updates), graph.constant(np.array([axis], np.int64))])
    return [result_of(graph, equation, graph.node("Where", [here, new, graph.read(operand)]))]


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
        raise unsupported(equation)
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
    return [result_of(graph, equation, name, CHANNELS_SECOND)]


def _max_pool(graph: Graph, equation: Any) -> list[Value]:
    (x,), params = equation.invars, equation.params
    windows, strides, pads = (
        params[name] for name in ("window_dimensions", "window_strides", "padding")
    )
    flat = (windows[0], windows[3], strides[0], strides[3], *pads[0], *pads[3])
    dilations = {*params["base_dilation"], *params["window_dilation"]}
    if flat != (1, 1, 1, 1, 0, 0, 0, 0) or dilations != {1}:
        raise unsupported(equation)
    name = graph.node(
        "MaxPool",
        [graph.read(x, CHANNELS_SECOND)],
        kernel_shape=windows[1:3],
        strides=strides[1:3],
        pads=[int(side) for side in (pads[1][0], pads[2][0], pads[1][1], pads[2][1])],
    )
    return [result_of(graph, equation, name, CHANNELS_SECOND)]


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
    params, jaxpr = equation.params, equation.params["jaxpr"].jaxpr
    carried = len(equation.outvars)
    known = len(equation.invars) - carried
    variables = jaxpr.invars[known:]
    of_round = (*variables, *jaxpr.outvars)
    of_loop = (*equation.invars[known:], *equation.outvars)
    # What is read or collected on the way is longer than in a round.
    if known < 0 or [x.aval.shape for x in of_round] != [x.aval.shape for x in of_loop]:
        raise unsupported(equation)
    body = Graph(graph.handlers, graph.first, graph)
    names = [body.fresh("carry") for _ in variables]
    tensors = [
        Tensor(name, tuple(x.aval.shape), plain(x.aval.ndim))
        for name, x in zip(names, variables, strict=True)
    ]
    constants = [graph.value(x) for x in equation.invars[:known]]
    body.closed(params["jaxpr"], [*constants, *tensors])
    step, going, still = (body.fresh(name) for name in ("step", "going", "still"))
    body.named(going, still)
    results = [body.named(body.read(x), body.fresh("carried")) for x in jaxpr.outvars]
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
    **ELEMENTS_AND_SHAPES,
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
