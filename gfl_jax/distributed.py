"""One function mapped over all devices, by `pmap` or `shard_map`, with the same results.

Devices may belong to several processes (hosts); each calls everything here at the same time. Trees
of arrays are either replicated (the state) or sharded (a batch: devices share the leading axis).
What is fetched is a copy: on CPUs numpy would otherwise look into buffers that the next step
reuses.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gfl_jax.errors import InputError

T = TypeVar("T")

AXIS = "devices"
"""Name of the mapped axis along which devices share a batch."""

REPLICATED, SHARDED = P(), P(AXIS)
"""How a tree lies on the devices: whole on each of them, or split along its leading axis."""


class Devices:
    """What both mappings have in common.

    Attributes:
        count: number of devices of all processes.
        kind: what they are, such as 'TPU v5 lite'.
        share: (index, count) of this process among those that share a batch.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        """Over these devices, in the order of their processes."""
        self.count, self.kind = len(devices), devices[0].device_kind
        processes = sorted({device.process_index for device in devices})
        here = jax.process_index()
        self.share = (processes.index(here) if here in processes else 0, len(processes))

    def gather(self, values: Any) -> np.ndarray:
        """The float64 numbers [n] that each process passes, as [processes, n] on all of them."""
        values = np.ascontiguousarray(values, np.float64).reshape(-1)
        if self.share[1] == 1:
            return values[None]
        bits = multihost_utils.process_allgather(values.view(np.uint32))  # jax rounds to float32
        return np.ascontiguousarray(bits).view(np.float64)

    def gather_rows(self, rows: np.ndarray) -> np.ndarray:
        """The float64 rows [n, k] of all processes, process by process; n may differ."""
        counts = self.gather([len(rows)])[:, 0].astype(int)
        padded = np.zeros((counts.max(), rows.shape[1]))
        padded[: len(rows)] = rows
        parts = self.gather(padded).reshape(len(counts), *padded.shape)
        return np.concatenate([part[:n] for part, n in zip(parts, counts, strict=True)])

    def from_first(self, value: float) -> float:
        """The number that process 0 passes."""
        return float(self.gather([value])[0, 0])

    def check_same(self, value: float, name: str) -> None:
        """Checks that all processes pass the same number.

        Raises:
            InputError: on every process, if any passes another one.
        """
        values = self.gather([value])[:, 0].tolist()
        if len(set(values)) > 1:
            listed = ", ".join(f"{v:g} (process {i})" for i, v in enumerate(values))
            raise InputError(
                f"processes differ in {name}: {listed}. All must see the same files; wait for the "
                "file system, then rerun the same command"
            )

    def fetch_local(self, tree: Any) -> Any:
        """This process's part of a sharded tree, on the host."""
        raise NotImplementedError

    def fetch_sharded(self, tree: Any) -> Any:
        """The whole of a sharded tree, on every host."""
        local = self.fetch_local(tree)
        return multihost_utils.process_allgather(local, tiled=True) if self.share[1] > 1 else local

    def fetch_replicated(self, tree: Any) -> Any:
        """One copy of a replicated tree, on the host."""
        parts = jax.tree.map(lambda x: x.addressable_data(0), tree)
        for part in jax.tree.leaves(parts):
            part.copy_to_host_async()
        return jax.tree.map(np.array, parts)


class Pmap(Devices):
    """jax.pmap: every array has a leading axis, with one entry per device of this process."""

    def __init__(self, devices: Sequence[jax.Device]):
        super().__init__(devices)
        self._devices = devices
        here = [d for d in devices if d.process_index == jax.process_index()]
        self._local = len(here)
        self._sharding = NamedSharding(Mesh(np.array(here or devices), (AXIS,)), P(AXIS))

    def map(
        self,
        f: Callable,
        *,
        inputs: P | tuple[P, ...] = (REPLICATED, SHARDED),
        outputs: P | tuple[P, ...],
        donate: bool = False,
    ) -> Callable:
        """`f` over the devices.

        Args:
            f: per-device function of trees; may sum over AXIS.
            inputs: for each argument of `f`, REPLICATED or SHARDED. (pmap needs no such word, as
                each array has its leading axis.)
            outputs: the same for each output.
            donate: whether the buffers of the first argument are reused for the outputs.
        """
        return jax.pmap(f, AXIS, devices=self._devices, donate_argnums=(0,) if donate else ())

    def replicate(self, tree: Any) -> Any:
        """A host tree on every device."""
        # Through pmap itself: arrays placed otherwise make the first step compile twice.
        copy = jax.pmap(lambda _, x: x, AXIS, in_axes=(0, None), devices=self._devices)
        return copy(np.zeros(self._local), tree)

    def shard(self, tree: Any) -> Any:
        """This process's part of a host tree, split over its devices along the leading axis."""
        split = jax.tree.map(lambda x: x.reshape(self._local, -1, *x.shape[1:]), tree)
        return jax.device_put(split, self._sharding)

    def fetch_replicated(self, tree: Any) -> Any:
        """One copy of a replicated tree, on the host."""
        return jax.tree.map(lambda x: x.reshape(x.shape[1:]), super().fetch_replicated(tree))

    def fetch_local(self, tree: Any) -> Any:
        """This process's part of a sharded tree, on the host."""
        return jax.tree.map(lambda x: np.array(x).reshape(-1, *x.shape[2:]), tree)


class ShardMap(Devices):
    """jax.shard_map under jit: arrays have their global shapes."""

    def __init__(self, devices: Sequence[jax.Device]):
        super().__init__(devices)
        self._mesh = Mesh(np.array(devices), (AXIS,))
        # Copies, since arrays that share a buffer cannot be donated to the step; device_put would
        # share one among devices of a CPU.
        replicated = NamedSharding(self._mesh, REPLICATED)
        self._copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=replicated)

    def map(
        self,
        f: Callable,
        *,
        inputs: P | tuple[P, ...] = (REPLICATED, SHARDED),
        outputs: P | tuple[P, ...],
        donate: bool = False,
    ) -> Callable:
        """See `Pmap.map`."""
        # check_vma=True would sum gradients by itself, on top of the step's own sum.
        mapped = jax.shard_map(
            f, mesh=self._mesh, in_specs=inputs, out_specs=outputs, check_vma=False
        )
        return jax.jit(mapped, donate_argnums=(0,) if donate else ())

    def replicate(self, tree: Any) -> Any:
        """A host tree on every device."""
        return self._copy(jax.tree.map(np.asarray, tree))

    def shard(self, tree: Any) -> Any:
        """See `Pmap.shard`."""
        sharding = NamedSharding(self._mesh, SHARDED)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)

    def fetch_local(self, tree: Any) -> Any:
        """This process's part of a sharded tree, on the host."""

        def local(x: jax.Array) -> np.ndarray:
            parts = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
            return np.concatenate([np.asarray(part.data) for part in parts])

        return jax.tree.map(local, tree)


def prefetch(
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
    mapping: Literal["auto", "pmap", "shard_map"], devices: Sequence[jax.Device] | None = None
) -> Pmap | ShardMap:
    """The mapping named in the config over `devices` (those of all processes).

    'auto' is shard_map for devices of several processes, where pmap converts every array between
    local and global at each call; else pmap.
    """
    devices = jax.devices() if devices is None else devices
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    if mapping == "auto":
        several = len({device.process_index for device in devices}) > 1
        mapping = "shard_map" if several else "pmap"
    return Pmap(devices) if mapping == "pmap" else ShardMap(devices)
