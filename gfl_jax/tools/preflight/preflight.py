"""Compiles training and evaluation for TPUs on a machine without one: does it fit, how fast is it?

    python -m gfl_jax.tools.preflight.preflight configs/gfl_r50_fpn_1x_coco.py --topology v5e:4x4
        [--per-device-batch 2 4 8] [--mapping shard_map] [--canvas 800 1344] [--out report.md]
        [--any.field VALUE]

Compiles the train step of train.py and the predictions of eval.py, whole, with the compiler that
runs on the machines themselves (`pip install -e ".[tpu-preflight]"`), and reads the result: the
memory of a chip, what is sent between chips, and an estimate of the time of a step and of what it
is spent on. Nothing is computed and no data is opened. A step of full size takes long to compile,
gfl_r50's 6 to 10 minutes on one core. Several batches make a table that says which one is best.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    from gfl_jax.cli import plain_errors

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gfl_jax.config import Experiment, load_experiment, parse_fields
from gfl_jax.data.batch import Batch
from gfl_jax.data.loader import Data
from gfl_jax.data.plan import canvases_of
from gfl_jax.distributed import AXIS, Pmap, ShardMap, parallel
from gfl_jax.models.network import Network
from gfl_jax.tools.preflight.hlo import (
    CHIPS,
    GIB,
    TELLING,
    Breakdown,
    Chip,
    Collective,
    Part,
    breakdown,
    collectives,
    parse,
)
from gfl_jax.training.step import (
    abstract_state,
    learning_rate,
    make_predict,
    make_train_step,
    sgd,
)


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a slice that need not exist, in the order of their hosts.

    Args:
        topology: version and chips along each axis of the slice, such as v5e:4x4.

    Raises:
        ValueError: there is no such slice.
        RuntimeError: libtpu is not installed.
    """
    version, _, shape = topology.partition(":")
    examples = ", ".join(chip.example for chip in CHIPS.values())
    if version not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(
            f"--topology is {topology!r}; give version and chips along each axis: {examples}"
        )
    try:
        import libtpu  # type: ignore[import-not-found]
    except ImportError as error:
        raise RuntimeError(
            "the compiler for TPUs is not installed: pip install 'gfl-jax[tpu-preflight]', that is "
            f"'jax[tpu]=={jax.__version__}'"
        ) from error
    chip, chips = CHIPS[version], math.prod(map(int, shape.split("x")))
    settings = {
        "TPU_LIBRARY_PATH": libtpu.get_library_path(),
        "TPU_ACCELERATOR_TYPE": chip.accelerator.format(chips=chips, cores=2 * chips),
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # nothing is run: several may compile
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # Hosts have 2x2 chips, but for a single one.
    single: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **chip.options, **single
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology {topology!r} is refused ({error}); sides are 1x1 or multiples of 2, as in "
            f"{examples}"
        ) from error
    return sorted(described.devices, key=lambda device: (device.process_index, device.id))


# ---------------------------------------------------------------------- compiling


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip's memory.

    aliased: outputs that take the place of arguments.  beside: what else stays there meanwhile: the
    rest of the training state while an evaluation runs.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    beside: int = 0

    @property
    def total(self) -> int:
        """All that has to fit."""
        used = self.arguments + self.outputs - self.aliased + self.temporaries
        return used + self.code + self.beside


@dataclasses.dataclass(frozen=True)
class Job:
    """What is compiled.

    name: 'train step' or 'predict'.  images: of a chip in one run.  chip, chips: it is for.
    """

    name: str
    images: int
    chip: Chip
    chips: int

    def __str__(self):
        return f"{self.name} of {self.images} images a chip"


@dataclasses.dataclass(frozen=True)
class Refused:
    """A job for which a chip has too little memory. message: the compiler's."""

    job: Job
    compile_seconds: float
    message: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled job.

    flops, bytes_accessed: of a chip in one run; the bytes count the core's own memory too.
    """

    job: Job
    compile_seconds: float
    memory: Memory
    flops: float
    bytes_accessed: float
    collectives: list[Collective]
    breakdown: Breakdown

    @property
    def free(self) -> int:
        """Bytes of a chip's memory that are left; negative if it does not fit."""
        return self.job.chip.hbm_bytes - self.memory.total

    @property
    def memory_seconds(self) -> float:
        """What the traffic of the chip's memory takes, if nothing else does."""
        return self.breakdown.hbm_bytes / self.job.chip.hbm_bandwidth

    @property
    def seconds(self) -> float:
        """The estimate: all parts, or the memory if that takes longer, and then the sending."""
        sending = sum(collective.seconds for collective in self.collectives)
        return max(self.breakdown.seconds, self.memory_seconds) + sending

    @property
    def rate(self) -> float:
        """Images a second of one chip."""
        return self.job.images / self.seconds


def out_of_memory(message: str) -> tuple[int, int] | None:
    """The bytes that are needed and that there are, of a compiler's refusal that names them."""

    def size(number: str, unit: str) -> int:
        return int(float(number) * 1024 ** " KMGT".index(unit or " "))

    for pattern in (
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    ):
        if found := re.search(pattern, message):
            return size(found[1], found[2]), size(found[3], found[4])
    return None


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Says twice a minute how long `what` has taken, on standard error."""
    done, start = threading.Event(), time.perf_counter()

    def tell(ending: str = "") -> None:
        print(f"{what}: {time.perf_counter() - start:.0f} s{ending}", file=sys.stderr, flush=True)

    def keep_telling() -> None:
        while not done.wait(30):
            tell()

    thread = threading.Thread(target=keep_telling, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        tell(", ended")


def compile_job(job: Job, mapped: Any, arguments: Sequence[Any], beside: int) -> Program | Refused:
    """Compiles a mapped function for arguments of these shapes and reads the result.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed, but not for want of memory.
    """
    start = time.perf_counter()
    with _progress(f"compiling the {job}"):
        try:
            executable = mapped.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
                raise
            return Refused(job, time.perf_counter() - start, message)
    seconds = time.perf_counter() - start
    sizes, costs = executable.memory_analysis(), executable.cost_analysis()
    memory = Memory(
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
        beside,
    )
    module = parse(executable.as_text())
    return Program(
        job,
        seconds,
        memory,
        costs.get("flops", 0.0),
        costs.get("bytes accessed", 0.0),
        collectives(module, job.chip, job.chips),
        breakdown(module, job.chip),
    )


def preflight(
    experiment: Experiment,
    topology: str,
    batches: Sequence[int],
    canvas: tuple[int, int],
    gts: int,
    num_classes: int,
) -> Iterator[Program | Refused]:
    """Compiles the step of `loop.fit` for each number of images a chip, then the predictions.

    Args:
        experiment: what to train; its batch size does not matter.
        topology: see `topology_devices`.
        batches: images a chip.
        canvas: height and width of the images.
        gts: objects that an image is padded to.
        num_classes: of the data.
    """
    devices, chip = topology_devices(topology), CHIPS[topology.partition(":")[0]]
    detector = experiment.detector
    network = Network(experiment.model, detector.predicts(num_classes))
    state = abstract_state(network, experiment.train)

    def compiled(name: str, images: int, f: Callable, outputs: list[bool], tree: Any, **options):
        mapped = parallel(experiment.train.mapping, devices)
        arguments = _arguments(mapped, devices, tree, images, canvas, gts)
        job = Job(name, images, chip, len(devices))
        function = mapped.map(f, outputs, donate=tree is state)
        return compile_job(job, function, arguments, _bytes(state) - _bytes(tree))

    for images in batches:
        train = dataclasses.replace(experiment.train, batch_size=images * len(devices))
        schedule = learning_rate(train, steps_per_epoch=1000)
        step = make_train_step(network, detector, sgd(train, schedule), schedule, train)
        step = functools.partial(step, axis_name=AXIS)
        yield compiled("train step", images, step, [False, False, True], state)
    predict, variables = make_predict(network, detector), state.evaluated()
    yield compiled("predict", experiment.train.eval_batch, predict, [True], variables)


def _arguments(
    mapped: Pmap | ShardMap,
    devices: Sequence[jax.Device],
    tree: Any,
    images: int,
    canvas: tuple[int, int],
    gts: int,
) -> tuple[Any, Batch]:
    """A tree on every device and a batch, as `replicate` and `shard` lay them out; shapes only."""
    fields: list[tuple[tuple[int, ...], type]] = [
        ((*canvas, 3), np.uint8),
        ((2,), np.int32),
        ((2,), np.float32),
        ((gts, 4), np.float32),
        ((gts,), np.int32),
        ((gts,), np.bool_),
        ((), np.bool_),
    ]
    if isinstance(mapped, Pmap):
        everywhere: tuple[int, ...] = (len(devices),)
        split: tuple[int, ...] = (len(devices), images)
        shardings: list[Any] = [None, None]
    else:
        everywhere, split = (), (len(devices) * images,)
        mesh = Mesh(np.array(devices), (AXIS,))
        shardings = [NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))]
    shape: Any = jax.ShapeDtypeStruct
    return (
        jax.tree.map(
            lambda x: shape((*everywhere, *x.shape), x.dtype, sharding=shardings[0]), tree
        ),
        Batch(*(shape((*split, *sides), dtype, sharding=shardings[1]) for sides, dtype in fields)),
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------------- in words


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def verdict(result: Program | Refused) -> str:
    """The answer in a few sentences: does it fit, how fast is it, what takes the time."""
    job = result.job
    if isinstance(result, Refused):
        sizes = out_of_memory(result.message)
        numbers = f"the chip has {_gib(job.chip.hbm_bytes)}"
        if sizes:
            numbers = f"it needs {_gib(sizes[0])}, and there are {_gib(sizes[1])}"
        return f"The {job} does not fit: {numbers}. Fewer images a chip or a smaller canvas may."
    fits = "fits" if result.free >= 0 else "does not fit"
    parts = result.breakdown.parts
    shares = [f"{part.name} {part.seconds / result.seconds:.0%}" for part in parts[:3]]
    sending = sum(collective.seconds for collective in result.collectives) / result.seconds
    named = (*TELLING, *(f"fusion of {kind}" for kind in TELLING))
    unknown = sum(part.count for part in result.breakdown.unknown if part.name.startswith(named))
    return (
        f"The {job} {fits}: {_gib(result.memory.total)} of {_gib(job.chip.hbm_bytes)}, "
        f"{result.free / job.chip.hbm_bytes:.0%} free. Estimated {result.seconds * 1e3:.1f} ms: "
        f"{result.rate:.1f} images/s a chip, {result.rate * job.chips:.0f} on {job.chips}. Most "
        f"of it: {', '.join(shares)}; between chips {sending:.0%}. Not counted, "
        f"since the compiler gives no estimate: {unknown} sorts, gathers, scatters and the like."
    )


def _table(head: str, rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; the words of `head` are separated by |."""
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


def markdown(result: Program | Refused) -> str:
    """Everything about one job."""
    job, chip = result.job, result.job.chip
    top = f"## {str(job).capitalize()}\n\n{verdict(result)}\n\nCompiled in "
    top += f"{result.compile_seconds:.0f} s."
    if isinstance(result, Refused):
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
        "The estimate is the longer of instructions and memory, and the sending. Copies between "
        f"the chip's memory and the core's run beside the instructions: {parts.copies.count}, "
        f"{parts.copies.hbm_bytes / 1e9:.2f} GB. The compiler's own count of bytes, "
        f"{result.bytes_accessed / 1e9:.2f} GB, holds the core's memory too and is several times "
        f"too large. Loops of unknown length, counted as one turn: {parts.unknown_loops}."
    )
    return "\n\n".join(
        [
            top,
            _table("memory of a chip, aliased ones taken off|", memory),
            _table("time|ms", [(name, f"{value * 1e3:.2f}") for name, value in times.items()]),
            notes,
            _times("part", parts.parts, parts.seconds),
            _times("longest instructions", parts.longest, parts.seconds),
            "In no sum, since the compiler gives no estimate; the time is that of memory alone:",
            _times("without an estimate", parts.unknown, parts.seconds),
            _table("between chips|dtype|count|MB|chips|ms in a ring", sent)
            if sent
            else "Nothing is sent between chips.",
        ]
    )


def comparison(results: Sequence[Program | Refused]) -> str:
    """One row a job, and which batch trains fastest."""
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
    table = _table("|images a chip|fits|GiB|free|ms|images/s a chip|images/s|longest part", rows)
    if not rates:
        return f"{table}\n\nNo train step fits."
    best = max(rates, key=lambda images: rates[images])
    return f"{table}\n\nThe fastest train step that fits: {best} images a chip."


# ---------------------------------------------------------------------- command


@dataclasses.dataclass(frozen=True)
class PreflightCommand(Experiment):
    """What this program takes.

    topology: version of the TPU and chips along each axis of the slice: v5e:1x1, v5e:4x4, v4:2x2x1,
        v5p:2x2x1, v6e:4x4, ...
    per_device_batch: images a chip and step; of several, a table says which is best.
        train.batch_size follows from it; predictions have train.eval_batch.
    mapping: that of the step; empty: train.mapping.
    canvas: height and width of the images; 0 0: the largest canvas of the data, landscape.
    gts: objects that an image is padded to; COCO has up to 96.
    num_classes: of the data.
    out: Markdown or JSON file; the other is written beside it. Empty: neither.
    """

    topology: str = "v5e:2x2"
    per_device_batch: tuple[int, ...] = (2,)
    mapping: Literal["", "pmap", "shard_map"] = ""
    canvas: tuple[int, int] = (0, 0)
    gts: int = 100
    num_classes: int = 80
    out: str = ""

    def __post_init__(self):
        if min(self.per_device_batch, default=0) < 1:
            raise ValueError(
                f"--per-device-batch is {self.per_device_batch}; give positive numbers of images"
            )
        if self.canvas != (0, 0) and (min(self.canvas) < 32 or any(s % 32 for s in self.canvas)):
            raise ValueError(
                f"--canvas is {self.canvas}; give height and width, multiples of 32, or 0 0"
            )
        for field in ("gts", "num_classes"):
            if getattr(self, field) < 1:
                name = field.replace("_", "-")
                raise ValueError(f"--{name} is {getattr(self, field)}; it must be positive")


def largest_canvas(data: Data) -> tuple[int, int]:
    """Height and width of the largest canvas of an experiment's batches, landscape."""
    if not data.keep_ratio:
        return data.scale[1], data.scale[0]
    sides = canvases_of(data.scale, data.canvases)[-1]
    return min(sides), max(sides)


def main(arguments: list[str]) -> None:
    """Experiment to report."""
    if not arguments or arguments[0].startswith("-"):
        raise FileNotFoundError(f"the first argument is a config file\n\n{__doc__}")
    experiment, command = parse_fields(
        PreflightCommand, load_experiment(arguments[0]), arguments[1:], __doc__
    )
    if command.mapping:
        train = dataclasses.replace(experiment.train, mapping=command.mapping)
        experiment = dataclasses.replace(experiment, train=train)
    jax.config.update("jax_platforms", "cpu")  # libtpu would look for chips
    canvas = command.canvas if any(command.canvas) else largest_canvas(experiment.data)

    results = []
    for result in preflight(
        experiment,
        command.topology,
        command.per_device_batch,
        canvas,
        command.gts,
        command.num_classes,
    ):
        results.append(result)
        print(f"{verdict(result)}\n", flush=True)

    about = (
        f"{arguments[0]} on {command.topology}, {experiment.train.mapping}, canvas "
        f"{canvas[0]} x {canvas[1]}, {experiment.model.dtype}, {command.num_classes} classes, "
        f"{command.gts} objects an image; jax {jax.__version__}"
    )
    table = comparison(results)
    print(table)
    report = "\n\n".join(["# Before it runs", about, table, *map(markdown, results)])
    if not command.out:
        print(f"\n{report}")
        return
    out = Path(command.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(f"{report}\n")
    values = {"about": about, "jobs": list(map(to_json, results))}
    out.with_suffix(".json").write_text(json.dumps(values, indent=1))
    print(f"\nreport {out.with_suffix('.md')}, all numbers {out.with_suffix('.json')}")


def to_json(result: Program | Refused) -> dict[str, Any]:
    """Everything about one job as plain values."""
    values = dataclasses.asdict(result) | {"verdict": verdict(result)}
    if isinstance(result, Refused):
        needed, available = out_of_memory(result.message) or (None, None)
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


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
