"""The processes of a run: joining, speaking with one voice, and stopping together."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from typing import Literal

import jax
from jax.experimental import multihost_utils

from gfl_jax.errors import InputError, SetupError

PREEMPTED = 75
"""Exit status of a run that received SIGTERM, saved its state, and waits to be resumed."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as of any program that it ends."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run: one per host, or one per GPU.

    Attributes:
        start: 'auto' joins others where a coordinator is named, Slurm runs several tasks or the
            environment lists several TPU hosts; 'always' lets jax ask the cloud's metadata (TPU pod
            slices entered by ssh), Open MPI or Kubernetes; 'never' trains alone.
        coordinator: HOST:PORT of process 0; empty: from the environment.
        count: number of processes; -1: from the environment.
        index: which of them this is, from 0; -1: from the environment.
        timeout: seconds of silence after which a process counts as dead and the others stop.
    """

    start: Literal["auto", "always", "never"] = "auto"
    coordinator: str = ""
    count: int = -1
    index: int = -1
    timeout: int = 100

    def __post_init__(self):
        if self.coordinator and ":" not in self.coordinator:
            raise InputError(f"hosts.coordinator is {self.coordinator!r}; give HOST:PORT")
        if (self.count, self.index) != (-1, -1) and not 0 <= self.index < self.count:
            raise InputError(
                f"hosts.count is {self.count} and hosts.index {self.index}; give both, index from "
                "0 to count - 1, or neither"
            )
        if self.timeout <= 0:
            raise InputError(f"hosts.timeout is {self.timeout}; it must be positive")

    @property
    def joins(self) -> bool:
        """Whether this process connects with others."""
        if self.start != "auto":
            return self.start == "always"
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
        named = self.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
        return bool(named) or int(tasks) > 1 or "," in workers


def join(hosts: Hosts) -> None:
    """Connects this process with the others, if there are any; before anything else uses jax.

    From then on the death of one stops them all with an error, within about `hosts.timeout`.

    Raises:
        SetupError: jax sees devices of other processes, but nothing connects this one with them.
    """
    if hosts.joins:
        jax.distributed.initialize(
            hosts.coordinator or None,
            hosts.count if hosts.count > 0 else None,
            hosts.index if hosts.index >= 0 else None,
            heartbeat_timeout_seconds=hosts.timeout,
        )
    elif jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise SetupError(
            f"this machine is one of the {jax.process_count()} hosts of a TPU slice, and "
            f"hosts.start '{hosts.start}' does not connect them: run the same command on every "
            "host with --hosts.start always"
        )


def is_first() -> bool:
    """Whether this process writes what only one may write: logs, results and pictures."""
    return jax.process_index() == 0


def print_once(text: str) -> None:
    """Prints a line, of several processes on the first alone."""
    if is_first():
        print(text, flush=True)


class Preempted(SystemExit):
    """Ends the program with status PREEMPTED or INTERRUPTED; the state is saved."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Yields a function that says whether to stop, because SIGTERM or Ctrl-C came to any process.

    All processes call it equally often, and it returns the exit status to stop with, or 0, at the
    same call to all of them.
    """
    received: list[int] = []
    several = jax.process_count() > 1

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if several:  # jax's own handler hears SIGTERM and tells the others
            signal.raise_signal(signal.SIGTERM)

    def status() -> int:
        return INTERRUPTED if signal.SIGINT in received else PREEMPTED

    ours = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, receive) for number in ours}
    calls = iter(range(2**62))
    try:
        if several:
            reached = multihost_utils.reached_preemption_sync_point
            yield lambda: status() if reached(next(calls)) else 0
        else:
            yield lambda: status() if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
