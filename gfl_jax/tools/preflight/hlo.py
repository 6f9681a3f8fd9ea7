"""Reads the text of a TPU executable: instructions, loops, and memory traffic."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: unique in its module.
        type: its arrays with layouts.
        opcode: what it does.
        inner: the text between its parentheses.
        attributes: the text after them.
        root: whether it is the result of its computation.
    """

    name: str
    type: str
    opcode: str
    inner: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.inner)

    @property
    def op_name(self) -> str:
        """The path of the operation in the program; empty if the compiler added it."""
        return self._attribute(r'op_name="([^"]*)"')

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate."""
        cycles = self._attribute(r'"estimated_cycles":"(\d+)"')
        return int(cycles) if cycles else None

    @property
    def custom_call(self) -> str:
        """What a custom call runs; empty for other instructions."""
        return self._attribute(r'custom_call_target="([^"]*)"')

    def computations(self, attribute: str) -> list[str]:
        """The names that an attribute such as `calls` lists."""
        names = self._attribute(rf"\b{attribute}=(\{{[^}}]*\}}|\S+)")
        return re.findall(r"%([\w.\-]+)", names)

    def _attribute(self, pattern: str) -> str:
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


class Module(NamedTuple):
    """An executable.

    Attributes:
        entry: the computation where it starts.
        computations: their instructions by name, in the order of execution.
    """

    entry: str
    computations: dict[str, dict[str, Instruction]]


def parse(text: str) -> Module:
    """Reads the text of `compiled.as_text()`.

    Raises:
        ValueError: the text has no ENTRY computation.
    """
    entry = ""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%(\S+) \(.*\{$", line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif start := re.match(r"\s+(ROOT )?%(\S+) = ", line):
            rest = line[start.end() :]
            type_end = _closing(rest, 0) if rest[0] == "(" else rest.index(" ")
            inner = rest.index("(", type_end)
            end = _closing(rest, inner)
            current[start[2]] = Instruction(
                name=start[2],
                type=rest[:type_end],
                opcode=rest[type_end:inner].strip(),
                inner=rest[inner + 1 : end - 1],
                attributes=rest[end:],
                root=bool(start[1]),
            )
    if not entry:
        raise ValueError("the text of the executable has no ENTRY computation")
    return Module(entry, computations)


def _closing(text: str, start: int) -> int:
    """Index just past the parenthesis that closes the first one at or after `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.end()
    return len(text)


class Buffer(NamedTuple):
    """An array in memory.

    Attributes:
        dtype: as the compiler writes it.
        shape: of the array.
        size: bytes of its elements.
        padded: bytes with the padding of its tiles.
        in_hbm: whether it is in the chip's memory rather than the core's.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    padded: int
    in_hbm: bool


def arrays_of(type_: str) -> list[Buffer]:
    """The arrays of a type: `bf16[8,68]{1,0:T(8,128)(2,1)S(1)}` or a tuple of these.

    The two minor dimensions, in the order given, are padded to tiles. S(n) other than S(0) is
    memory of the core.
    """
    buffers = []
    for dtype, sides, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", type_):
        bits = int((re.search(r"\d+", dtype) or ["8"])[0])
        shape = tuple(int(side) for side in sides.split(",") if side)
        order, _, tiling = layout.partition(":")
        padded = [shape[int(i)] for i in order.split(",") if i] if order else list(shape[::-1])
        if tile := re.search(r"T\(([\d,]+)\)", tiling):
            for i, side in enumerate(reversed(tile[1].split(","))):
                if i < len(padded):
                    padded[i] = -(-padded[i] // int(side)) * int(side)
        space = re.search(r"S\((\d+)\)", tiling)
        buffers.append(
            Buffer(
                dtype,
                shape,
                math.prod(shape) * bits // 8,
                math.prod(padded) * bits // 8,
                not space or space[1] == "0",
            )
        )
    return buffers


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How many times the body of a `while` runs, None if that is not a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    constants: list[int] = []
    less_than = False
    conditions = loop.computations("condition")
    while conditions:
        for each in module.computations[conditions.pop()].values():
            if each.opcode == "constant" and re.fullmatch(r"-?\d+", each.inner):
                constants.append(int(each.inner))
            less_than |= "direction=LT" in each.attributes
            conditions += each.computations("calls")
    return max(constants) if less_than and constants else None


CALLED = ("to_apply", "calls", "branch_computations", "true_computation", "false_computation")
"""Attributes that name the computations an instruction runs, other than a fusion."""


def executed(
    module: Module, name: str = "", times: int = 1
) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
    """Every instruction that runs, with its computation and how many times it runs.

    A fusion counts as one instruction, a loop as its body (once if its length is unknown), a
    conditional as all its branches.
    """
    computation = module.computations[name or module.entry]
    for each in computation.values():
        if each.opcode == "while":
            loops = times * (trip_count(module, each) or 1)
            for body in each.computations("body"):
                yield from executed(module, body, loops)
        elif each.opcode in ("conditional", "call", "async-start"):
            for attribute in CALLED:
                for called in each.computations(attribute):
                    yield from executed(module, called, times)
        else:
            yield computation, each, times


SLICING = ("slice", "dynamic-slice", "gather")


def hbm_bytes(module: Module, computation: dict[str, Instruction], instruction: Instruction) -> int:
    """Bytes that an instruction reads from the chip's memory and writes to it.

    An operand that is only sliced counts as its slice, one that is updated in place as the update,
    an asynchronous copy (`*-start`) as what it moves.
    """
    if instruction.opcode.endswith("-start"):
        arrays = [a for a in arrays_of(instruction.type) if len(a.shape)]
        smallest = min((a.padded for a in arrays), default=0)
        return smallest * sum(a.in_hbm for a in arrays)

    def padded(type_: str, only_hbm: bool = False) -> int:
        return sum(a.padded for a in arrays_of(type_) if a.in_hbm or not only_hbm)

    # What uses an operand: the instructions inside a fusion, by the names of its parameters, or the
    # instruction itself.
    users, names = computation, instruction.operands
    if instruction.opcode == "fusion":
        users = module.computations[instruction.computations("calls")[0]]
        parameters = {int(i.inner): i.name for i in users.values() if i.opcode == "parameter"}
        names = [parameters.get(index, "") for index in range(len(instruction.operands))]
    read, written = 0, padded(instruction.type, only_hbm=True)
    for operand, name in zip(instruction.operands, names, strict=True):
        whole = padded(computation[operand].type, only_hbm=True) if operand in computation else 0
        using = [instruction]
        if users is not computation:
            using = [i for i in users.values() if name in i.operands]
        first = bool(using) and all(i.operands.index(name) == 0 for i in using)
        if whole and first and all(i.opcode in SLICING for i in using):
            whole = min(whole, sum(padded(i.type) for i in using))
        elif whole and first and all(i.opcode == "dynamic-update-slice" for i in using):
            written -= whole - sum(padded(users[i.operands[1]].type) for i in using)
            whole = 0
        read += whole
    return read + max(written, 0)
