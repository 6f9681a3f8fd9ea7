"""TPU slices that need not exist: facts about their chips, and their devices for the compiler."""

import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from gfl_jax.errors import InputError, SetupError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public facts about one chip.

    Attributes:
        hbm_bytes: size of its memory.
        bf16_flops: peak of the matrix units, FLOP/s.
        hbm_bandwidth: of its memory, bytes/s.
        clock: cycles/s; with the size of the matrix units it makes up `bf16_flops`.
        ring_bandwidth: what a chip sends around a ring along one axis of the slice, over one link
            in each direction, bytes/s.
        accelerator: the cloud's name of a slice, with {chips}, or {cores}, two per chip.
        example: a topology.
        options: of libtpu; they make both cores of a chip one device.
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
# Scale Your Model" (jax-ml.github.io/scaling-book/tpus), 45 GB/s one way, 90 GB/s for v5p and v6e.
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


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a slice that need not exist, in the order of their hosts.

    Args:
        topology: version and chips along each axis of the slice, such as v5e:4x4.

    Raises:
        InputError: there is no such slice.
        SetupError: libtpu is not installed.
    """
    version, _, shape = topology.partition(":")
    examples = ", ".join(chip.example for chip in CHIPS.values())
    if version not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"--topology is {topology!r}; give version and chips along each axis: {examples}"
        )
    try:
        import libtpu  # type: ignore[import-not-found]
    except ImportError as error:
        raise SetupError(
            "the compiler for TPUs is not installed: pip install '.[tpu-preflight]', that is "
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
    # A host has 2x2 chips, except that of a single chip.
    single: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **chip.options, **single
        )
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"--topology {topology!r} is not valid ({error}); sides are 1x1 or multiples of 2, as "
            f"in {examples}"
        ) from error
    return sorted(described.devices, key=lambda device: (device.process_index, device.id))
