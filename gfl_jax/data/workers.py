"""Worker processes: they leave signals to the main process, end with it, and say why they died."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator

import cv2

from gfl_jax.errors import SetupError

_DEATH = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")
"""Begins Grain's RuntimeError about a worker that is gone."""


def start_worker(_worker: int, _count: int) -> None:
    """Sets up a worker process."""
    # SIGTERM and Ctrl-C come to the whole process group; the main process still takes a step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Workers share the cores already: without this each has a thread for every core.
    cv2.setNumThreads(0)
    # A worker whose training process was killed would wait for ever, and keep its shared memory.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Around the start of workers, which begin with the signals that are blocked here.

    They import for seconds before `start_worker`; a Ctrl-C meanwhile is not for them. Python's own
    handler in this process is called all the same, by another thread.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def deaths_explained() -> Iterator[None]:
    """Around the use of workers: says why one is gone, and what to do.

    Raises:
        SetupError: a worker process was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not (match := _DEATH.match(str(error))):
            raise
        raise SetupError(_explanation(int(match[1]))) from error


def _explanation(code: int) -> str:
    if code == -signal.SIGBUS:
        total, _, free = shutil.disk_usage("/dev/shm")
        return (
            "a worker process was stopped because /dev/shm, through which it hands batches over, "
            f"is full ({total / 2**20:.0f} MiB, {free / 2**20:.0f} free): enlarge it (docker run "
            "--shm-size=8g or --ipc=host), or take fewer --data.workers; 0 needs none of it"
        )
    if code == -signal.SIGKILL:
        return (
            "a worker process was killed, by somebody or by the system because memory ran out: "
            "rerun the same command to resume, with fewer --data.workers if memory was short"
        )
    end = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    return f"a worker process ended {end}: rerun the same command to resume"
