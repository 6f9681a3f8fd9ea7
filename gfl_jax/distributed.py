"""Processes and devices: joining, stopping together, and one function mapped over all devices.

`pmap` and `shard_map` give the same results.

Devices may belong to several processes (hosts); each calls everything here at the same time. Trees
are either replicated (the state) or sharded (a batch: devices share the leading axis). What is
fetched is a copy: on CPUs numpy would otherwise look into buffers that the next step reuses.
"""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")

AXIS = "devices"
"""Name of the mapped axis along which devices share a batch."""

PREEMPTED = 75
"""Exit status of a run that was told to stop, saved its state, and waits to be started again."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run: one a host, or one a GPU.

    start: 'auto' joins others where a coordinator is named, Slurm runs several tasks or the
        environment lists several TPU hosts; 'always' lets jax ask the cloud's metadata (TPU pod
        slices entered by ssh), Open MPI or Kubernetes; 'never' trains alone.
    coordinator: HOST:PORT of process 0; empty: from the environment.
    count, index: how many processes, and which of them this is; -1: from the environment.
    timeout: seconds of silence after which a process counts as dead and the others stop.
    """

    start: Literal["auto", "always", "never"] = "auto"
    coordinator: str = ""
    count: int = -1
    index: int = -1
    timeout: int = 100

    def __post_init__(self):
        if self.coordinator and ":" not in self.coordinator:
            raise ValueError(f"hosts.coordinator is {self.coordinator!r}; give HOST:PORT")
        if (self.count, self.index) != (-1, -1) and not 0 <= self.index < self.count:
            raise ValueError(
                f"hosts.count is {self.count} and hosts.index {self.index}; give both, index from "
                "0 to count - 1, or neither"
            )
        if self.timeout <= 0:
            raise ValueError(f"hosts.timeout is {self.timeout}; it must be positive")

    @property
    def several(self) -> bool:
        """Whether to join others."""
        if self.start != "auto":
            return self.start == "always"
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
        named = self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        return bool(named) or int(tasks) > 1 or "," in workers


def join(hosts: Hosts) -> None:
    """Connects this process with the others, if there are any; before anything else uses jax.

    From then on the death of one stops them all with an error, within about `hosts.timeout`. What
    others than the first print is dropped, their errors are not.

    Args:
        hosts: which processes.
    """
    if hosts.several:
        jax.distributed.initialize(
            hosts.coordinator or None,
            hosts.count if hosts.count > 0 else None,
            hosts.index if hosts.index >= 0 else None,
            heartbeat_timeout_seconds=hosts.timeout,
        )
        if not is_first():
            sys.stdout = open(os.devnull, "w")


def is_first() -> bool:
    """Whether this process writes what only one may write: logs, results and pictures."""
    return jax.process_index() == 0


class Preempted(SystemExit):
    """Ends the program with status PREEMPTED; the state is saved."""

    def __init__(self):
        super().__init__(PREEMPTED)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether to stop, because SIGTERM came to any process.

    All processes call it equally often, and to all it says yes at the same call.
    """
    if jax.process_count() > 1:
        calls = iter(range(2**62))  # jax's own handler hears the signal
        yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
        return
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        yield lambda: bool(told)
    finally:
        signal.signal(signal.SIGTERM, before)


class Devices:
    """What both mappings share.

    count: devices of all processes.  kind: what they are.
    share: (index, count) of this process among those that share a batch.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        """Over these devices, in the order of their processes."""
        self.count, self.kind = len(devices), devices[0].device_kind
        processes = sorted({device.process_index for device in devices})
        here = jax.process_index()
        self.share = (processes.index(here) if here in processes else 0, len(processes))

    def agree(self, value: float) -> float:
        """The number that process 0 has."""
        if self.share[1] == 1:
            return value
        bits = np.float64(value).reshape(1).view(np.uint32)  # jax would round it to float32
        bits = np.asarray(multihost_utils.broadcast_one_to_all(bits), np.uint32)
        return float(bits.view(np.float64)[0])

    def _gathered(self, local: Any) -> Any:
        """The parts of all processes together, on every host."""
        return multihost_utils.process_allgather(local, tiled=True) if self.share[1] > 1 else local


class Pmap(Devices):
    """jax.pmap: every array carries a leading axis, one entry a device of this process."""

    def __init__(self, devices: Sequence[jax.Device]):
        super().__init__(devices)
        self._devices = devices
        here = [d for d in devices if d.process_index == jax.process_index()]
        self._local = len(here)
        self._sharding = NamedSharding(Mesh(np.array(here or devices), (AXIS,)), P(AXIS))

    def map(self, f: Callable, outputs: Sequence[bool], *, donate: bool = False) -> Callable:
        """`f(replicated, sharded)` over the devices.

        Args:
            f: per-device function of a replicated and a sharded tree; may sum over AXIS.
            outputs: for each output of `f`, whether it is sharded. (With pmap it does not matter.)
            donate: whether the replicated tree's buffers are reused for the outputs.
        """
        return jax.pmap(f, AXIS, devices=self._devices, donate_argnums=(0,) if donate else ())

    def replicate(self, tree: Any) -> Any:
        """A host tree on every device."""
        # Through pmap itself: arrays placed otherwise make the first step compile twice.
        copy = jax.pmap(lambda _, x: x, AXIS, in_axes=(0, None), devices=self._devices)
        return copy(np.zeros(self._local), tree)

    def shard(self, tree: Any) -> Any:
        """This process's part of a host tree, split over its devices by the leading axis."""
        split = jax.tree.map(lambda x: x.reshape(self._local, -1, *x.shape[1:]), tree)
        return jax.device_put(split, self._sharding)

    def fetch_replicated(self, tree: Any) -> Any:
        """One copy of a replicated tree, on the host."""
        return jax.tree.map(lambda x: np.array(x.addressable_data(0)).reshape(x.shape[1:]), tree)

    def fetch_sharded(self, tree: Any) -> Any:
        """The whole of a sharded tree, on every host."""
        local = jax.tree.map(lambda x: np.array(x).reshape(-1, *x.shape[2:]), tree)
        return self._gathered(local)


class ShardMap(Devices):
    """jax.shard_map under jit: on the devices arrays have their global shapes."""

    def __init__(self, devices: Sequence[jax.Device]):
        super().__init__(devices)
        self._mesh = Mesh(np.array(devices), (AXIS,))

    def map(self, f: Callable, outputs: Sequence[bool], *, donate: bool = False) -> Callable:
        """See `Pmap.map`."""
        specs = tuple(P(AXIS) if sharded else P() for sharded in outputs)
        # check_vma=True would sum gradients by itself, on top of the step's own sum.
        mapped = jax.shard_map(
            f,
            mesh=self._mesh,
            in_specs=(P(), P(AXIS)),
            out_specs=specs if len(specs) > 1 else specs[0],
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=(0,) if donate else ())

    def replicate(self, tree: Any) -> Any:
        """A host tree on every device."""
        # Copies, since arrays that share a buffer cannot be donated to the step; device_put would
        # share one among devices of a CPU.
        copy = jax.jit(
            lambda tree: jax.tree.map(jnp.copy, tree),
            out_shardings=NamedSharding(self._mesh, P()),
        )
        return copy(jax.tree.map(np.asarray, tree))

    def shard(self, tree: Any) -> Any:
        """See `Pmap.shard`."""
        sharding = NamedSharding(self._mesh, P(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)

    def fetch_replicated(self, tree: Any) -> Any:
        """One copy of a replicated tree, on the host."""
        return jax.tree.map(lambda x: np.array(x.addressable_data(0)), tree)

    def fetch_sharded(self, tree: Any) -> Any:
        """The whole of a sharded tree, on every host."""

        def local(x: jax.Array) -> np.ndarray:
            parts = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            return np.concatenate([np.asarray(part.data) for part in parts])

        return self._gathered(jax.tree.map(local, tree))


def ahead(
    devices: Pmap | ShardMap, batches: Iterable[T], part: Callable[[T], Any]
) -> Iterator[tuple[T, Any]]:
    """Every batch with a part of it on the devices, one ahead: it is copied while a step runs."""
    waiting: list[tuple[T, Any]] = []
    for batch in batches:
        waiting.append((batch, devices.shard(part(batch))))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def parallel(
    mapping: Literal["pmap", "shard_map"], devices: Sequence[jax.Device] | None = None
) -> Pmap | ShardMap:
    """The mapping named in the config over `devices` (those of all processes)."""
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Pmap(devices) if mapping == "pmap" else ShardMap(devices)
