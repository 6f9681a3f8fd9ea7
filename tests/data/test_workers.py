"""What a worker process does not survive, and what is said of it."""

import multiprocessing
import os
import signal
import time

import pytest

from gfl_jax.data.workers import deaths_explained, start_worker, without_interrupts
from gfl_jax.errors import SetupError


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-7, r"/dev/shm.*is full.*--shm-size=.*--data\.workers"),
        (-9, r"killed.*memory.*fewer --data\.workers"),
        (-15, r"ended by SIGTERM.*to resume"),
        (3, r"ended with status 3.*to resume"),
    ],
)
def test_the_death_of_a_worker_has_a_cause_and_a_remedy(code, said):
    with pytest.raises(SetupError, match=said), deaths_explained():
        raise RuntimeError(
            f"Worker process was terminated unexpectedly with exit code {code}. Search the logs "
            "above for the source of the crash."
        )


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="of a loader"), deaths_explained():
        raise RuntimeError("of a loader")


def _worker(pipe):
    start_worker(0, 1)
    pipe.send((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
    time.sleep(60)


def _parent(pipe):
    worker = multiprocessing.get_context("spawn").Process(target=_worker, args=(pipe,))
    worker.start()
    pipe.send(worker.pid)
    time.sleep(60)


def test_a_worker_leaves_signals_to_its_parent_and_ends_with_it():
    here, there = multiprocessing.Pipe()
    parent = multiprocessing.get_context("spawn").Process(target=_parent, args=(there,))
    parent.start()
    first, second = (here.recv() for _ in range(2) if here.poll(120))
    pid, handlers = (first, second) if isinstance(first, int) else (second, first)
    assert handlers == (signal.SIG_IGN, signal.SIG_IGN)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}") and "Z" not in _state(pid):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_processes_started_meanwhile_begin_without_interrupts():
    with without_interrupts():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
