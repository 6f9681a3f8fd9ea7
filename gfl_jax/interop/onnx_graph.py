"""A jaxpr written down as an ONNX graph; `gfl_jax.interop.onnx_ops` knows each operation.

Two things keep the graph close to what one would write by hand. Convolutions of JAX have their
channels last, those of ONNX have them second: an array remembers in which order its axes are
stored, so that whole towers stay in the order of their convolutions. And an array that is only
repeated along an axis is stored once, as ONNX broadcasts by itself.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from gfl_jax.errors import InputError, needs

with needs("onnx"):
    from onnx import helper, numpy_helper

OPSET = 18
Shape = Sequence[Any]
"""Lengths of axes; one that is no int is the batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A known array; its axes may be 1 where those of the variable are longer."""

    array: np.ndarray

    @property
    def shape(self) -> Shape:
        """Lengths of its axes."""
        return self.array.shape


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A result of the graph.

    Attributes:
        name: in the graph.
        shape: lengths of its axes in the order of the variable; may be 1 where those are longer.
        order: which axis of the variable is stored first, second, ...
    """

    name: str
    shape: Shape
    order: tuple[int, ...]


Value = Constant | Tensor
Handler = Callable[["Graph", Any], Sequence[Value]]


def is_static(shape: Sequence[Any]) -> bool:
    """Whether all lengths are known."""
    return all(isinstance(length, int | np.integer) for length in shape)


def plain(rank: int) -> tuple[int, ...]:
    """The order of axes of a variable itself."""
    return tuple(range(rank))


class Graph:
    """Nodes and constants, filled equation by equation."""

    def __init__(self, handlers: dict[str, Handler], first: str, outer: "Graph | None" = None):
        """An empty graph.

        Args:
            handlers: by the primitive's name.
            first: name of the input whose first axis is the batch.
            outer: the graph whose loop has this one as its body.
        """
        self.handlers, self.first = handlers, first
        self.nodes: list[Any] = []
        self.values: dict[Any, Value] = dict(outer.values) if outer else {}
        self.initializers: dict[str, Any] = outer.initializers if outer else {}
        self._made: dict[str, list[str]] = dict(outer._made) if outer else {}
        self._counter: list[int] = outer._counter if outer else [0]

    # ------------------------------------------------------------------------------- equations

    def run(self, jaxpr: Any, arguments: Sequence[Value]) -> list[Value]:
        """Adds the equations of a jaxpr without constants of its own; returns its results."""
        for variable, value in zip(jaxpr.invars, arguments, strict=True):
            self.values[variable] = value
        for equation in jaxpr.eqns:
            results: Sequence[Value] | None = self._known(equation)
            if results is None:
                name = equation.primitive.name
                if name not in self.handlers:
                    raise InputError(
                        f"ONNX export has no rule for JAX's operation {name!r}: export with "
                        "--format stablehlo instead"
                    )
                results = self.handlers[name](self, equation)
            for variable, value in zip(equation.outvars, results, strict=True):
                self.values[variable] = value
        return [self.value(variable) for variable in jaxpr.outvars]

    def closed(self, closed: Any, arguments: Sequence[Value]) -> list[Value]:
        """Adds the equations of a jaxpr with its constants."""
        for variable, array in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            self.values[variable] = Constant(np.asarray(array))
        return self.run(closed.jaxpr, arguments)

    def _known(self, equation: Any) -> list[Value] | None:
        """The results of an equation of known arrays, computed here; None if it is none."""
        primitive, params = equation.primitive, equation.params
        if primitive.name in ("platform_index", "broadcast_in_dim"):
            return None
        if any(jex.jaxprs_in_params(params)):
            return None
        if not all(isinstance(self.value(x), Constant) for x in equation.invars):
            return None
        if not all(is_static(x.aval.shape) for x in (*equation.invars, *equation.outvars)):
            return None
        results = primitive.bind(*(self.array(x) for x in equation.invars), **params)
        if not primitive.multiple_results:
            results = [results]
        return [Constant(np.asarray(x)) for x in results]

    # -------------------------------------------------------------------------------- operands

    def value(self, variable: Any) -> Value:
        """What a variable or literal of the jaxpr is."""
        if isinstance(variable, jex.Literal):
            aval: Any = variable.aval
            return Constant(np.asarray(variable.val, aval.dtype))
        return self.values[variable]

    def array(self, variable: Any) -> np.ndarray:
        """A known array in its full shape.

        Raises:
            InputError: it is not known.
        """
        value = self.value(variable)
        if not isinstance(value, Constant):
            raise InputError(f"ONNX export needs a constant, but {variable} is computed")
        return np.broadcast_to(value.array, variable.aval.shape)

    def read(self, variable: Any, order: Sequence[int] | None = None, *, full: bool = True) -> str:
        """The name of a variable's array with its axes in an order.

        Args:
            variable: of the jaxpr, or a literal.
            order: None: its own.
            full: whether all axes must have their length, or may be 1 to be broadcast.
        """
        value, wanted = self.value(variable), variable.aval.shape
        order = plain(len(wanted)) if order is None else tuple(order)
        if full and tuple(value.shape) != tuple(wanted):
            if isinstance(value, Constant) and is_static(wanted):
                value = Constant(np.broadcast_to(value.array, wanted))
            else:
                value = self._expanded(value, wanted)
        if isinstance(value, Constant):
            return self.constant(value.array.transpose(order))
        return self._in_order(value, order)

    def _in_order(self, value: Tensor, order: tuple[int, ...]) -> str:
        if value.order == order:
            return value.name
        axes = [value.order.index(axis) for axis in order]
        return self.node("Transpose", [value.name], perm=axes)

    def _expanded(self, value: Value, shape: Shape) -> Tensor:
        if isinstance(value, Constant):
            name = self.constant(value.array)
        else:
            name = self._in_order(value, plain(len(shape)))
        # A batch that is there already need not be named: 1 leaves it.
        target = [
            1 if have == want else want for have, want in zip(value.shape, shape, strict=True)
        ]
        return Tensor(
            self.node("Expand", [name, self.shape(target)]), tuple(shape), plain(len(shape))
        )

    def shape(self, lengths: Shape) -> str:
        """A shape as an operand; one of its axes may be the batch."""
        if is_static(lengths):
            return self.constant(np.array(lengths, np.int64))
        parts = [
            self.constant(np.array([x], np.int64)) if is_static([x]) else self.batch(x)
            for x in lengths
        ]
        return self.node("Concat", parts, axis=0)

    def batch(self, length: Any) -> str:
        """The number of images, [1]."""
        if str(length) != "batch":
            raise InputError(f"ONNX export cannot write the length {length}")
        return self.node("Shape", [self.first], start=0, end=1)

    def constant(self, array: np.ndarray) -> str:
        """The name of a known array; equal ones are kept once."""
        array = np.ascontiguousarray(array) if array.ndim else array
        digest = hashlib.sha1(array.tobytes()).hexdigest()[:16]
        name = f"c_{digest}_{array.dtype}_{'x'.join(map(str, array.shape))}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    # ----------------------------------------------------------------------------------- nodes

    def fresh(self, hint: str) -> str:
        """A name that is not in use."""
        self._counter[0] += 1
        return f"{hint.lower()}_{self._counter[0]}"

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node with one result; returns its name."""
        return self.nodes_of(kind, inputs, 1, **attributes)[0]

    def nodes_of(
        self, kind: str, inputs: Sequence[str], count: int, **attributes: Any
    ) -> list[str]:
        """Adds a node with several results, unless there is such a node; returns their names."""
        key = repr((kind, inputs, sorted(attributes.items())))
        if key not in self._made:
            names = self._made[key] = [self.fresh(kind) for _ in range(count)]
            self.nodes.append(helper.make_node(kind, inputs, names, name=names[0], **attributes))
        return self._made[key]

    def named(self, name: str, result: str) -> str:
        """Gives a result another name; returns it."""
        self.nodes.append(helper.make_node("Identity", [name], [result], name=result))
        return result

    def info(self, name: str, aval: Any) -> Any:
        """The type of an input or output."""
        shape = [length if is_static([length]) else str(length) for length in aval.shape]
        return helper.make_tensor_value_info(name, tensor_type(aval.dtype), shape)


def tensor_type(dtype: Any) -> int:
    """ONNX's number of a dtype."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _names_read(nodes: Iterable[Any]) -> Iterator[str]:
    """Names of all inputs, also of those in the bodies of loops."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from _names_read(attribute.g.node)


def model_of(
    traced: Any, names: Sequence[str], results: Sequence[str], handlers: dict[str, Handler]
) -> Any:
    """A traced function as an ONNX model.

    Args:
        traced: of `jax.jit(function).trace(...)`; all that it closes over becomes constants.
        names: of its arguments; the first axis of the first one is the batch.
        results: names of what it returns.
        handlers: by the primitive's name.
    """
    closed = traced.jaxpr
    graph = Graph(handlers, names[0])
    variables = closed.jaxpr.invars
    inputs = [
        Tensor(name, tuple(x.aval.shape), plain(x.aval.ndim))
        for name, x in zip(names, variables, strict=True)
    ]
    graph.closed(closed, inputs)
    for name, variable in zip(results, closed.jaxpr.outvars, strict=True):
        graph.named(graph.read(variable), name)
    read = set(_names_read(graph.nodes))
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "detector",
            [graph.info(n, x.aval) for n, x in zip(names, variables, strict=True) if n in read],
            [graph.info(n, x.aval) for n, x in zip(results, closed.jaxpr.outvars, strict=True)],
            [x for name, x in graph.initializers.items() if name in read],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=9,
        producer_name="gfl_jax",
    )
