"""Folders that are either complete or absent, made by one process at a time."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from gfl_jax.errors import InputError, UserError, WriteError
from gfl_jax.paths import expand_home


def local_folder(name: str | Path, flag: str) -> Path:
    """The absolute path of a folder on a local disk.

    Args:
        name: its path.
        flag: what sets it on the command line, for the error.

    Raises:
        InputError: it is a URL.
    """
    if "://" in str(name):
        raise InputError(
            f"{flag} is {name}: raw images and the folders that data is prepared in must be on a "
            "local disk; prepare there (gfl-jax prepare SRC DST), copy DST to the bucket and pass "
            "it as --data.prepared"
        )
    return expand_home(name, flag).absolute()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds this folder's lock, once no other process on this machine does.

    Raises:
        WriteError: what is done meanwhile fails for the disk's sake: it is full, read-only, ...
    """
    if folder.parent.exists() and not folder.parent.is_dir():
        raise InputError(f"cannot prepare data in {folder.parent}: it is not a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
            with contextlib.suppress(ImportError):  # Windows has no such lock and does without
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)  # freed when the process ends, however it ends
            yield
    except UserError:
        raise
    except OSError as error:
        raise WriteError(
            f"cannot prepare data in {folder.parent}: {error}. Free space there, or name a folder "
            "on another disk with --data.cache-dir (gfl-jax prepare: DST)"
        ) from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder` if nothing goes wrong.

    Until then it is beside `folder`. Leftovers of a killed process are deleted by the next one. The
    caller must hold the lock of `folder`.
    """
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
