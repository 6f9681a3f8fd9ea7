"""One per-device function over all local devices, by pmap or by shard_map: the same results.

Trees are either replicated (the state) or sharded (a batch: devices share the leading axis). What
is fetched is a copy: on CPUs numpy would otherwise look into buffers that the next step reuses.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "devices"
"""Name of the axis to sum over inside a mapped function."""


class Pmap:
    """jax.pmap: on the devices every array carries a leading axis, one entry a device."""

    def __init__(self, devices: Sequence[jax.Device]):
        self._devices, self.count = list(devices), len(devices)
        self.kind = devices[0].device_kind

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
        return copy(np.zeros(self.count), tree)

    def shard(self, tree: Any) -> Any:
        """A host tree, split over the devices by its leading axis."""
        return jax.tree.map(lambda x: x.reshape(self.count, -1, *x.shape[1:]), tree)

    def fetch_replicated(self, tree: Any) -> Any:
        """One copy of a replicated tree, on the host."""
        return jax.tree.map(lambda x: np.array(x.addressable_data(0)).reshape(x.shape[1:]), tree)

    def fetch_sharded(self, tree: Any) -> Any:
        """The whole of a sharded tree, on the host."""
        return jax.tree.map(lambda x: np.array(x).reshape(-1, *x.shape[2:]), tree)


class ShardMap:
    """jax.shard_map under jit: on the devices arrays have their global shapes."""

    def __init__(self, devices: Sequence[jax.Device]):
        self.count, self.kind = len(devices), devices[0].device_kind
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
        """A host tree, split over the devices by its leading axis."""
        return jax.device_put(tree, NamedSharding(self._mesh, P(AXIS)))

    def fetch_replicated(self, tree: Any) -> Any:
        """One copy of a replicated tree, on the host."""
        return jax.tree.map(np.array, tree)

    def fetch_sharded(self, tree: Any) -> Any:
        """The whole of a sharded tree, on the host."""
        return jax.tree.map(np.array, tree)


def parallel(
    mapping: Literal["pmap", "shard_map"],
    batch_size: int,
    devices: Sequence[jax.Device] | None = None,
) -> Pmap | ShardMap:
    """The mapping named in the config over `devices` (all local ones).

    Raises:
        ValueError: the devices cannot share a batch equally.
    """
    devices = jax.local_devices() if devices is None else devices
    if batch_size % len(devices):
        raise ValueError(
            f"train.batch_size {batch_size} is not a multiple of the {len(devices)} devices"
        )
    return Pmap(devices) if mapping == "pmap" else ShardMap(devices)
