"""Processes that train together: how they find each other, and how all of them stop at once."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import tyro
from jax.experimental import multihost_utils

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


@dataclasses.dataclass(frozen=True)
class _Flags:
    hosts: Hosts = Hosts()


def join(arguments: list[str]) -> None:
    """Connects this process with the others, if there are any; before anything else uses jax.

    From then on the death of one stops them all with an error, within about `hosts.timeout`. What
    others than the first print is dropped, their errors are not.

    Args:
        arguments: of the command line; flags other than --hosts.* are for others to read.
    """
    flags, _ = tyro.cli(_Flags, args=arguments, return_unknown_args=True, add_help=False)
    hosts = flags.hosts
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
