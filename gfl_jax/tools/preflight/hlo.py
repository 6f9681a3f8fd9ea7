"""What the text of a TPU executable says: traffic, time by part of the program, collectives.

The compiler writes its estimate of cycles beside most instructions; what it leaves out is listed,
not guessed.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public facts about one chip.

    hbm_bytes: its memory.  bf16_flops: peak of the matrix units, per second.
    hbm_bandwidth: bytes a second.
    clock: cycles a second; what, with the size of the matrix units, makes up `bf16_flops`.
    ring_bandwidth: bytes a second that a chip sends in a ring along one axis of the slice, over one
        link in each direction.
    accelerator: what the cloud calls a slice, with {chips} or {cores}, two a chip.
    example: a topology.
    options: of libtpu; so that both cores of a chip are one device.
    """

    hbm_bytes: int
    bf16_flops: float
    hbm_bandwidth: float
    clock: float
    ring_bandwidth: float
    accelerator: str
    example: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# Memory, peak and bandwidth: cloud.google.com/tpu/docs, the page of each version. Links: "How to
# Scale Your Model" (jax-ml.github.io/scaling-book/tpus), one way 45 GB/s, of v5p and v6e 90 GB/s.
# Clock of v4: Jouppi et al., ISCA 2023; of the others: peak / (2 x multipliers of the chip).
CHIPS = {
    "v4": Chip(
        32 * GIB, 275e12, 1228e9, 1.05e9, 90e9, "v4-{cores}", "v4:2x2x1",
        {"chip_config_name": "megacore"},
    ),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 1.5e9, 90e9, "v5litepod-{chips}", "v5e:4x4"),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 1.75e9, 180e9, "v5p-{cores}", "v5p:2x2x1"),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 1.75e9, 180e9, "v6e-{chips}", "v6e:4x4"),
}  # fmt: skip

SCOPES = (
    "normalize",
    "backbone",
    "neck",
    "bbox_head",
    "losses",
    "assign",
    "optimizer",
    "detections",
)
"""The `jax.named_scope`s of the program, which its instructions carry; an inner one counts."""


class Instruction(NamedTuple):
    """One instruction. type: its arrays with layouts.  inner: what stands in its parentheses.

    attributes: all that follows.  root: whether it is the result of its computation.
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
        """The path of the operation in the program, empty if the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def custom_call(self) -> str:
        """What a custom call runs; empty if it is none."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def computations(self, attribute: str) -> list[str]:
        """The names that an attribute such as `calls` lists."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|\S+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []


class Module(NamedTuple):
    """An executable. computations: instructions by name, in the order of execution."""

    entry: str
    computations: dict[str, dict[str, Instruction]]


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` writes.

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
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.end()
    return len(text)


class Buffer(NamedTuple):
    """An array as it lies in memory. size: bytes of its elements.  padded: with that of its tiles.

    in_hbm: whether it lies in the chip's memory rather than in that of the core.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    padded: int
    in_hbm: bool


def arrays_of(type_: str) -> list[Buffer]:
    """The arrays of a type, `bf16[8,68]{1,0:T(8,128)(2,1)S(1)}` or a tuple of such.

    The two minor dimensions, by the order given, are padded to tiles. S(n) other than S(0) is
    memory of the core.
    """
    found = []
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
        found.append(
            Buffer(
                dtype,
                shape,
                math.prod(shape) * bits // 8,
                math.prod(padded) * bits // 8,
                not space or space[1] == "0",
            )
        )
    return found


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, or None if that is not a constant."""
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
"""Attributes that name what an instruction, not a fusion, runs."""


def executed(
    module: Module, name: str = "", times: int = 1
) -> Iterator[tuple[dict[str, Instruction], Instruction, int]]:
    """Every instruction that runs, with its computation and how often it runs.

    Of a fusion only itself; of loops their bodies, once if their length is unknown; of a
    conditional all branches.
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

    Of an operand that is only sliced, what is taken out; of one that is updated in place, what is
    put in; of an asynchronous copy (`*-start`), what is moved.
    """
    if instruction.opcode.endswith("-start"):
        arrays = [a for a in arrays_of(instruction.type) if len(a.shape)]
        smallest = min((a.padded for a in arrays), default=0)
        return smallest * sum(a.in_hbm for a in arrays)

    def padded(type_: str, only_hbm: bool = False) -> int:
        return sum(a.padded for a in arrays_of(type_) if a.in_hbm or not only_hbm)

    # Who uses an operand: a fusion's instructions, by the names of its parameters, or itself.
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


FREE = {
    "AllocateBuffer",
    "ConcatBitcast",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
"""Operations and custom calls that take no time."""
TELLING = ("sort", "scatter", "gather", "custom-call", "dynamic-update-slice", "dynamic-slice")
"""Operations that a fusion without an estimate is named after."""
COLLECTIVES = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
    "collective-broadcast": 1.0,
}
"""Kinds, and how many times their data goes round a ring, but for what stays where it is."""


def scope_of(op_name: str) -> str:
    """'neck backward' of `jit(step)/transpose(jvp(neck))/add`; empty outside of all SCOPES.

    Operations that are not differentiated have no direction.
    """
    scopes = [word for word in re.findall(r"[\w.]+", op_name) if word in SCOPES]
    if not scopes:
        return ""
    direction = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    return f"{scopes[-1]} {direction}".strip()


def category(module: Module, computation: dict[str, Instruction], instruction: Instruction) -> str:
    """The scope of an instruction; of what the compiler made up that of what it works on.

    A fusion without one has that of most of its instructions, anything else that of the first
    operand which has one.
    """
    seen: set[str] = set()
    waiting = [instruction]
    while waiting and len(seen) < 50:
        each = waiting.pop(0)
        if each.name in seen:
            continue
        seen.add(each.name)
        if found := scope_of(each.op_name):
            return found
        inside = [i for c in each.computations("calls") for i in module.computations[c].values()]
        scopes = collections.Counter(filter(None, (scope_of(i.op_name) for i in inside)))
        if scopes:
            return scopes.most_common(1)[0][0]
        waiting += [computation[name] for name in each.operands if name in computation]
    return "other"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and dtype.

    count: how many a step.  size: bytes of all of them.  chips: that take part in each.
    seconds: 2 (n - 1) / n x size / the chip's ring bandwidth, for an all-reduce; half for others.
    """

    kind: str
    dtype: str
    count: int
    size: int
    chips: int
    seconds: float


def collectives(module: Module, chip: Chip, chips: int) -> list[Collective]:
    """What the chips of a slice send each other in one run of the executable."""
    sizes: collections.Counter[tuple[str, str, int]] = collections.Counter()
    counts: collections.Counter[tuple[str, str, int]] = collections.Counter()
    for _, each, times in executed(module):
        kind = each.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        groups = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", each.attributes)
        n = chips
        if groups:
            n = int(groups[2]) if groups[2] else len(groups[1].split(","))
        arrays = arrays_of(each.type)
        dtypes = "+".join(sorted({a.dtype for a in arrays}))
        size = sum(a.size for a in arrays)
        if each.opcode.endswith("-start") and kind != "all-reduce":
            size = max(a.size for a in arrays)  # operands and results are listed
        elif kind == "reduce-scatter":
            size *= n  # its result is one part of what is sent
        counts[kind, dtypes, n] += times
        sizes[kind, dtypes, n] += times * size
    return [
        Collective(
            kind,
            dtype,
            counts[kind, dtype, n],
            size,
            n,
            COLLECTIVES[kind] * (n - 1) / n * size / chip.ring_bandwidth,
        )
        for (kind, dtype, n), size in sizes.most_common()
    ]


@dataclasses.dataclass(frozen=True)
class Part:
    """Instructions of one category.

    seconds: the sum of the larger of compute and memory time of each.  hbm_bytes: read and written.
    """

    name: str
    count: int
    seconds: float
    hbm_bytes: int


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """What the text of an executable says about the time of one run.

    parts: by category, longest first.  longest: single instructions.
    unknown: instructions without an estimate by kind and category; their seconds are those of
        memory alone and in no sum.
    copies: asynchronous ones between the chip's memory and the core's, which run beside the others.
    unknown_loops: loops whose length is not a constant, counted as one turn.
    """

    parts: list[Part]
    longest: list[Part]
    unknown: list[Part]
    copies: Part
    unknown_loops: int

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return sum(part.seconds for part in self.parts)

    @property
    def hbm_bytes(self) -> int:
        """Traffic of everything."""
        return sum(part.hbm_bytes for part in (*self.parts, *self.unknown, self.copies))


def breakdown(module: Module, chip: Chip) -> Breakdown:
    """Adds up the compiler's estimates of cycles and the memory traffic of every instruction."""
    known: dict[str, list[Part]] = collections.defaultdict(list)
    unknown: dict[str, list[Part]] = collections.defaultdict(list)
    copies: list[Part] = []
    for computation, each, times in executed(module):
        opcode, target = each.opcode, each.custom_call
        if {opcode, target} & FREE or opcode.endswith("-done"):
            continue
        if opcode.removesuffix("-start") in COLLECTIVES:
            continue
        traffic = times * hbm_bytes(module, computation, each)
        memory = traffic / chip.hbm_bandwidth
        if opcode.endswith("-start"):
            copies.append(Part("copies", times, memory, traffic))
            continue
        scope = category(module, computation, each)
        if each.cycles is not None:
            seconds = max(times * each.cycles / chip.clock, memory)
            bound = "memory" if seconds == memory else "compute"
            name = f"{each.name} ({bound}, {scope}): {each.op_name.rpartition('/')[2]}"
            known[scope].append(Part(name, times, seconds, traffic))
        elif sum(a.size for a in arrays_of(each.type)) > 8:  # no counters and other scalars
            inside = {
                i.opcode
                for c in each.computations("calls")
                for i in module.computations[c].values()
            }
            own = f"{opcode} {target}".strip()
            kind = next((f"fusion of {k}" for k in TELLING if k in inside), own)
            unknown[f"{kind} ({scope})"].append(Part("", times, memory, traffic))
    everything = [part for parts in known.values() for part in parts]
    loops = [i for c in module.computations.values() for i in c.values() if i.opcode == "while"]
    return Breakdown(
        parts=_longest_first(_total(name, parts) for name, parts in known.items()),
        longest=_longest_first(everything)[:10],
        unknown=_longest_first(_total(name, parts) for name, parts in unknown.items()),
        copies=_total("copies", copies),
        unknown_loops=sum(trip_count(module, loop) is None for loop in loops),
    )


def _total(name: str, parts: Sequence[Part]) -> Part:
    return Part(
        name,
        sum(part.count for part in parts),
        sum(part.seconds for part in parts),
        sum(part.hbm_bytes for part in parts),
    )


def _longest_first(parts: Any) -> list[Part]:
    return sorted(parts, key=lambda part: (-part.seconds, part.name))
