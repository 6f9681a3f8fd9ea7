"""What a TPU executable costs: time by part of the program, and what the chips send each other.

The compiler writes its estimate of cycles beside most instructions; what it leaves out is listed,
not guessed.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from gfl_jax.tools.preflight.hlo import (
    Instruction,
    Module,
    arrays_of,
    executed,
    hbm_bytes,
    trip_count,
)
from gfl_jax.tools.preflight.topology import Chip

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
"""The `jax.named_scope`s of the program, which its instructions carry; the innermost counts."""


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
CHARACTERISTIC = (
    "sort",
    "scatter",
    "gather",
    "custom-call",
    "dynamic-update-slice",
    "dynamic-slice",
)
"""Operations that a fusion without an estimate is named after."""
COLLECTIVES = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
    "collective-broadcast": 1.0,
}
"""Kinds, and how many times their data goes around a ring, not counting each chip's own part."""


def scope_of(op_name: str) -> str:
    """'neck backward' for `jit(step)/transpose(jvp(neck))/add`; empty outside all SCOPES.

    Operations that are not differentiated have no direction.
    """
    scopes = [word for word in re.findall(r"[\w.]+", op_name) if word in SCOPES]
    if not scopes:
        return ""
    direction = "backward" if "transpose(" in op_name else "forward" if "jvp(" in op_name else ""
    return f"{scopes[-1]} {direction}".strip()


def category(module: Module, computation: dict[str, Instruction], instruction: Instruction) -> str:
    """The scope of an instruction; for one that the compiler added, that of what it works on.

    A fusion without a scope takes the most common one of its instructions, anything else that of
    the first operand that has one.
    """
    seen: set[str] = set()
    waiting = [instruction]
    while waiting and len(seen) < 50:
        each = waiting.pop(0)
        if each.name in seen:
            continue
        seen.add(each.name)
        if scope := scope_of(each.op_name):
            return scope
        inside = [i for c in each.computations("calls") for i in module.computations[c].values()]
        scopes = collections.Counter(filter(None, (scope_of(i.op_name) for i in inside)))
        if scopes:
            return scopes.most_common(1)[0][0]
        waiting += [computation[name] for name in each.operands if name in computation]
    return "other"


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and dtype.

    Attributes:
        kind: all-reduce, all-gather, ...
        dtype: of what is sent; several are joined by '+'.
        count: how many per run.
        size: bytes of all of them.
        chips: how many take part in each.
        seconds: 2 (n - 1) / n x size / the chip's ring bandwidth for an all-reduce between n chips,
            half of that for the others.
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

    Attributes:
        name: of the category, or of a single instruction.
        count: how many times they run.
        seconds: sum over instructions of the larger of compute and memory time.
        hbm_bytes: read from and written to the chip's memory.
    """

    name: str
    count: int
    seconds: float
    hbm_bytes: int


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """What the text of an executable says about the time of one run.

    Attributes:
        parts: by category, longest first.
        longest: the ten longest instructions.
        unknown: instructions without an estimate, by kind and category; their seconds are those of
            memory alone and are in no sum.
        copies: asynchronous ones between the chip's memory and the core's, which overlap with the
            instructions.
        unknown_loops: loops whose length is not a constant, counted as one iteration.
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
        """Memory traffic of everything."""
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
        elif sum(a.size for a in arrays_of(each.type)) > 8:  # skip counters and other scalars
            inside = {
                i.opcode
                for c in each.computations("calls")
                for i in module.computations[c].values()
            }
            own = f"{opcode} {target}".strip()
            kind = next((f"fusion of {k}" for k in CHARACTERISTIC if k in inside), own)
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


def _longest_first(parts: Iterable[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: (-part.seconds, part.name))
