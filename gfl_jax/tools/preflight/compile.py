"""Compiles the whole train step and the predictions for a slice, and reads the result."""

import contextlib
import dataclasses
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gfl_jax.config import Experiment
from gfl_jax.data.batch import Batch
from gfl_jax.distributed import AXIS, REPLICATED, SHARDED, Pmap, ShardMap, parallel
from gfl_jax.models.network import Network
from gfl_jax.tools.preflight.costs import Breakdown, Collective, breakdown, collectives
from gfl_jax.tools.preflight.hlo import parse
from gfl_jax.tools.preflight.topology import CHIPS, Chip, topology_devices
from gfl_jax.training.evaluator import make_predict
from gfl_jax.training.step import abstract_state, learning_rate, make_train_step, sgd


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a chip's memory.

    Attributes:
        arguments: of the program.
        outputs: of the program.
        aliased: outputs that reuse the memory of arguments.
        temporaries: what the program needs while it runs.
        code: the program itself.
        beside: what else stays in memory: the rest of the training state during an evaluation.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    beside: int = 0

    @property
    def total(self) -> int:
        """Everything that has to fit."""
        used = self.arguments + self.outputs - self.aliased + self.temporaries
        return used + self.code + self.beside


@dataclasses.dataclass(frozen=True)
class Job:
    """What is compiled.

    Attributes:
        name: 'train step' or 'predict'.
        images: per chip and run.
        chip: the kind of chip it is for.
        chips: how many.
    """

    name: str
    images: int
    chip: Chip
    chips: int

    def __str__(self):
        return f"{self.name} of {self.images} images per chip"


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """A job for which a chip has too little memory.

    Attributes:
        job: what was to be compiled.
        compile_seconds: until the compiler gave up.
        message: the compiler's.
    """

    job: Job
    compile_seconds: float
    message: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled job.

    Attributes:
        job: what was compiled.
        compile_seconds: how long that took.
        memory: what it needs of a chip's.
        flops: FLOP per chip and run.
        bytes_accessed: per chip and run by the compiler's count, the core's own memory included.
        collectives: what the chips send each other.
        breakdown: time by part of the program.
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
        """Bytes of a chip's memory that are left, negative if the job does not fit."""
        return self.job.chip.hbm_bytes - self.memory.total

    @property
    def memory_seconds(self) -> float:
        """Time of the memory traffic alone."""
        return self.breakdown.hbm_bytes / self.job.chip.hbm_bandwidth

    @property
    def seconds(self) -> float:
        """The estimate: the longer of all parts and the memory traffic, plus the sending."""
        sending = sum(collective.seconds for collective in self.collectives)
        return max(self.breakdown.seconds, self.memory_seconds) + sending

    @property
    def rate(self) -> float:
        """Images/s per chip."""
        return self.job.images / self.seconds


def needed_and_available(message: str) -> tuple[int, int] | None:
    """Bytes needed and available by the compiler's out-of-memory message; None if it has none."""

    def size(number: str, unit: str) -> int:
        return int(float(number) * 1024 ** " KMGT".index(unit or " "))

    for pattern in (
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    ):
        if match := re.search(pattern, message):
            return size(match[1], match[2]), size(match[3], match[4])
    return None


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Prints twice a minute how long `what` has taken, on standard error."""
    done, start = threading.Event(), time.perf_counter()

    def show(ending: str = "") -> None:
        print(f"{what}: {time.perf_counter() - start:.0f} s{ending}", file=sys.stderr, flush=True)

    def keep_showing() -> None:
        while not done.wait(30):
            show()

    thread = threading.Thread(target=keep_showing, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show(", done")


def compile_job(
    job: Job, mapped: Any, arguments: Sequence[Any], beside: int
) -> Program | OutOfMemory:
    """Compiles a mapped function for arguments of these shapes and reads the result.

    Args:
        job: what it is.
        mapped: the jitted function.
        arguments: shapes, dtypes and shardings.
        beside: bytes that stay in a chip's memory besides the arguments.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed for a reason other than memory.
    """
    start = time.perf_counter()
    with _progress(f"compiling the {job}"):
        try:
            executable = mapped.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
                raise
            return OutOfMemory(job, time.perf_counter() - start, message)
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
) -> Iterator[Program | OutOfMemory]:
    """Compiles the step of `loop.fit` for each number of images per chip, then the predictions.

    Args:
        experiment: what to train; its batch size does not matter.
        topology: see `topology_devices`.
        batches: images per chip.
        canvas: height and width of the images, in pixels.
        gts: number of objects that an image is padded to.
        num_classes: of the data.
    """
    devices, chip = topology_devices(topology), CHIPS[topology.partition(":")[0]]
    detector = experiment.detector
    network = Network(experiment.model, detector.predicts(num_classes))
    state = abstract_state(network, experiment.train)

    def compiled(name: str, images: int, f: Callable, outputs: Any, tree: Any, **options):
        mapped = parallel(experiment.train.mapping, devices)
        arguments = _arguments(mapped, devices, tree, images, canvas, gts)
        job = Job(name, images, chip, len(devices))
        function = mapped.map(f, outputs=outputs, donate=tree is state)
        return compile_job(job, function, arguments, _bytes(state) - _bytes(tree))

    for images in batches:
        train = dataclasses.replace(experiment.train, batch_size=images * len(devices))
        schedule = learning_rate(train, steps_per_epoch=1000)
        step = make_train_step(network, detector, sgd(train, schedule), schedule, train)
        yield compiled("train step", images, step, (REPLICATED, REPLICATED, SHARDED), state)
    predict, variables = make_predict(network, detector), state.evaluated()
    yield compiled("predict", experiment.train.eval_batch, predict, SHARDED, variables)


def _arguments(
    mapped: Pmap | ShardMap,
    devices: Sequence[jax.Device],
    tree: Any,
    images: int,
    canvas: tuple[int, int],
    gts: int,
) -> tuple[Any, Batch]:
    """Shapes of a tree and of a batch as `replicate` and `shard` lay them out on the devices."""
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
        shardings = [NamedSharding(mesh, REPLICATED), NamedSharding(mesh, SHARDED)]
    shape: Any = jax.ShapeDtypeStruct
    return (
        jax.tree.map(
            lambda x: shape((*everywhere, *x.shape), x.dtype, sharding=shardings[0]), tree
        ),
        Batch(*(shape((*split, *sides), dtype, sharding=shardings[1]) for sides, dtype in fields)),
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
