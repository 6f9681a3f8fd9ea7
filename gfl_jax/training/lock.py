"""A work directory belongs to one run at a time."""

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator

from gfl_jax.distributed import Devices
from gfl_jax.errors import InputError, WriteError
from gfl_jax.hosts import is_first
from gfl_jax.paths import PathLike, as_path, is_remote, write

FILE = "lock"


@contextlib.contextmanager
def held(workdir: PathLike, devices: Devices) -> Iterator[None]:
    """Holds the lock of a work directory; of several processes of a run the first does.

    On a disk the lock dies with its holder. A bucket cannot be locked: there a note says who is
    running, and a start that finds one warns, since it may be left from a run that was killed.

    Raises:
        InputError: another run holds it.
        WriteError: the work directory cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        error: InputError | OSError | None = None
        if is_first():
            try:
                lock = _note if is_remote(workdir) else _lock
                stack.enter_context(lock(as_path(workdir)))
            except (InputError, OSError) as caught:
                error = caught
        # The others must not wait for a first process that has ended.
        if devices.from_first(error is not None):
            raise error or InputError(f"process 0 cannot use {workdir}; it says why")
        yield


@contextlib.contextmanager
def _lock(workdir: PathLike) -> Iterator[None]:
    folder = as_path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = open(folder / FILE, "a+")
    except OSError as error:
        raise WriteError(
            f"the work directory {folder} cannot be made or written to ({error.strerror}): name "
            "another --workdir"
        ) from error
    with opened as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no such lock, and does without
            pass
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{folder} is in use by {file.read()}: end that run, or name another --workdir"
            ) from error
        except OSError as error:
            print(f"{folder} cannot be locked ({error}): start only one run in it at a time")
        file.truncate(0)
        file.write(_holder())
        file.flush()
        yield


@contextlib.contextmanager
def _note(workdir: PathLike) -> Iterator[None]:
    file = as_path(workdir) / FILE
    if file.exists():
        print(
            f"WARNING: {workdir} was in use by {file.read_text()}, which has not said that it "
            "ended. If it still runs, end one of the two: a bucket cannot be locked"
        )
    write(file, _holder())
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _holder() -> str:
    now = datetime.datetime.now().astimezone()
    return f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S %Z}"
