"""Reports on a compiled program, in words, Markdown and JSON."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from gfl_jax.tools.preflight.compile import OutOfMemory, Program, needed_and_available
from gfl_jax.tools.preflight.costs import CHARACTERISTIC, Part
from gfl_jax.tools.preflight.topology import GIB


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def verdict(result: Program | OutOfMemory) -> str:
    """The answer in a few sentences: does it fit, how fast is it, what takes the time?"""
    job = result.job
    if isinstance(result, OutOfMemory):
        sizes = needed_and_available(result.message)
        numbers = f"the chip has {_gib(job.chip.hbm_bytes)}"
        if sizes:
            numbers = f"it needs {_gib(sizes[0])}, and there are {_gib(sizes[1])}"
        return f"The {job} does not fit: {numbers}. Fewer images per chip or a smaller canvas may."
    fits = "fits" if result.free >= 0 else "does not fit"
    parts = result.breakdown.parts
    shares = [f"{part.name} {part.seconds / result.seconds:.0%}" for part in parts[:3]]
    sending = sum(collective.seconds for collective in result.collectives) / result.seconds
    named = (*CHARACTERISTIC, *(f"fusion of {kind}" for kind in CHARACTERISTIC))
    unknown = sum(part.count for part in result.breakdown.unknown if part.name.startswith(named))
    return (
        f"The {job} {fits}: {_gib(result.memory.total)} of {_gib(job.chip.hbm_bytes)}, "
        f"{result.free / job.chip.hbm_bytes:.0%} free. Estimated {result.seconds * 1e3:.1f} ms: "
        f"{result.rate:.1f} images/s per chip, {result.rate * job.chips:.0f} on {job.chips}. Most "
        f"of it: {', '.join(shares)}; between chips {sending:.0%}. Not counted, because "
        f"the compiler gives no estimate: {unknown} sorts, gathers, scatters and the like."
    )


def _table(head: str, rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the columns of `head` are separated by |."""
    names = head.split("|")
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(head: str, parts: Sequence[Part], seconds: float) -> str:
    return _table(
        f"{head}|count|ms|share|GB of memory traffic",
        [
            (
                part.name,
                part.count,
                f"{part.seconds * 1e3:.2f}",
                f"{part.seconds / max(seconds, 1e-12):.1%}",
                f"{part.hbm_bytes / 1e9:.3f}",
            )
            for part in parts
        ],
    )


def markdown(result: Program | OutOfMemory) -> str:
    """Everything about one job."""
    job, chip = result.job, result.job.chip
    top = f"## {str(job).capitalize()}\n\n{verdict(result)}\n\nCompiled in "
    top += f"{result.compile_seconds:.0f} s."
    if isinstance(result, OutOfMemory):
        return f"{top}\n\n```\n{result.message[:3000]}\n```"
    parts = result.breakdown
    memory = [(name, _gib(size)) for name, size in dataclasses.asdict(result.memory).items()]
    memory += [("**total**", f"**{_gib(result.memory.total)}**"), ("free", _gib(result.free))]
    times = {
        "estimate": result.seconds,
        "instructions": parts.seconds,
        f"memory: {parts.hbm_bytes / 1e9:.2f} GB": result.memory_seconds,
        f"matrix units: {result.flops / 1e9:.0f} GFLOP": result.flops / chip.bf16_flops,
    }
    sent = [
        (c.kind, c.dtype, c.count, f"{c.size / 1e6:.3f}", c.chips, f"{c.seconds * 1e3:.3f}")
        for c in result.collectives
    ]
    notes = (
        "The estimate is the longer of instructions and memory, plus the sending. Copies between "
        "the chip's memory and the core's overlap with the instructions: "
        f"{parts.copies.count}, {parts.copies.hbm_bytes / 1e9:.2f} GB. The compiler's own count of "
        f"bytes, {result.bytes_accessed / 1e9:.2f} GB, includes the core's memory and is several "
        "times too large. Loops of unknown length, counted as one iteration: "
        f"{parts.unknown_loops}."
    )
    return "\n\n".join(
        [
            top,
            _table("memory of a chip; aliased outputs are subtracted|", memory),
            _table("time|ms", [(name, f"{value * 1e3:.2f}") for name, value in times.items()]),
            notes,
            _times("part", parts.parts, parts.seconds),
            _times("longest instructions", parts.longest, parts.seconds),
            "Not in any sum, because the compiler gives no estimate; the time is that of memory "
            "alone:",
            _times("without an estimate", parts.unknown, parts.seconds),
            _table("between chips|dtype|count|MB|chips|ms in a ring", sent)
            if sent
            else "Nothing is sent between chips.",
        ]
    )


def comparison(results: Sequence[Program | OutOfMemory]) -> str:
    """One row per job, and which batch trains fastest."""
    rows, rates = [], {}
    for result in results:
        job = result.job
        row = [job.name, str(job.images), "no"]
        if isinstance(result, Program):
            if result.free >= 0:
                row[-1] = "yes"
                if job.name == "train step":
                    rates[job.images] = result.rate
            row += [
                f"{result.memory.total / GIB:.2f}",
                f"{result.free / job.chip.hbm_bytes:.0%}",
                f"{result.seconds * 1e3:.1f}",
                f"{result.rate:.1f}",
                f"{result.rate * job.chips:.0f}",
                result.breakdown.parts[0].name,
            ]
        rows.append(row + [""] * (9 - len(row)))
    table = _table(
        "|images per chip|fits|GiB|free|ms|images/s per chip|images/s|longest part", rows
    )
    if not rates:
        return f"{table}\n\nNo train step fits."
    best = max(rates, key=lambda images: rates[images])
    return f"{table}\n\nThe fastest train step that fits: {best} images per chip."


def to_json(result: Program | OutOfMemory) -> dict[str, Any]:
    """Everything about one job as plain values."""
    values = dataclasses.asdict(result) | {"verdict": verdict(result)}
    if isinstance(result, OutOfMemory):
        needed, available = needed_and_available(result.message) or (None, None)
        return values | {"fits": False, "needed_bytes": needed, "available_bytes": available}
    return values | {
        "fits": result.free >= 0,
        "total_bytes": result.memory.total,
        "free_bytes": result.free,
        "seconds": result.seconds,
        "memory_bound_seconds": result.memory_seconds,
        "compute_bound_seconds": result.flops / result.job.chip.bf16_flops,
        "images_per_second_per_chip": result.rate,
        "images_per_second": result.rate * result.job.chips,
    }
