"""Files and folders, local or in a bucket: everything a run keeps goes through here."""

import contextlib
import errno
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from gfl_jax.errors import InputError, WriteError, needs

PathLike = epath.PathLike


def as_path(path: PathLike) -> epath.Path:
    """The path of a file or folder, on this machine or in a bucket of Google Cloud Storage.

    Args:
        path: a local path, in which `~` is expanded; or `gs://BUCKET/...`.

    Raises:
        InputError: another kind of storage.
        MissingExtraError: it is in a bucket and gcsfs is not installed.
    """
    scheme, is_url, _ = os.fspath(path).partition("://")
    if not is_url:
        return epath.Path(expand_home(path, "a path"))
    if scheme != "gs":
        raise InputError(f"{os.fspath(path)!r}: give a local path or gs://BUCKET/FOLDER")
    with needs("gcs"):
        import gcsfs  # noqa: F401  # how epath reaches a bucket
    return epath.Path(path)


def local_path(path: PathLike, name: str) -> Path:
    """The path of a file or folder that must be on this machine.

    Args:
        path: of it, in which `~` is expanded.
        name: of the argument, for the error.

    Raises:
        InputError: it is a URL.
    """
    if is_remote(path):
        raise InputError(f"{name} is {os.fspath(path)}: it must be on a local disk, copy it there")
    return expand_home(path, name)


def expand_home(path: PathLike, name: str) -> Path:
    """A local path in which `~` is expanded.

    Args:
        path: it.
        name: of the argument, for the error.

    Raises:
        InputError: this user has no home folder: HOME is not set.
    """
    try:
        if os.fspath(path).startswith("~") and os.environ.get("HOME") == "":
            raise RuntimeError  # an empty HOME would be the root of the file system
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"{name} is {os.fspath(path)}, but HOME is not set and this user has no home folder: "
            "set HOME, or give a path without ~"
        ) from error


def path_for_checkpoints(folder: PathLike) -> epath.Path:
    """The absolute path of a folder of checkpoints, or of what holds it.

    Raises:
        InputError: Orbax cannot keep checkpoints there.
    """
    given = as_path(folder)
    absolute = given if is_remote(given) else given.absolute()
    name = str(absolute)
    if glob.has_magic(name) or (os.sep == "/" and "\\" in name):
        raise InputError(
            f"{name}: checkpoints cannot be in a folder with one of * ? [ \\ in its path, which "
            "Orbax takes for a pattern or an escape: rename it"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name!r}: checkpoints cannot be in a folder whose path is not valid UTF-8: rename it"
        ) from error
    return absolute


def size_of_file(path: epath.Path) -> int:
    """Bytes of a file. Of a local one, etils would look up its owner's name, who may have none."""
    return path.stat().length if is_remote(path) else os.stat(path).st_size


def is_remote(path: PathLike) -> bool:
    """Whether a path is in a bucket rather than in this machine's file system."""
    return "://" in os.fspath(path)


def write(path: PathLike, content: str | bytes) -> None:
    """Writes a whole file: whoever reads it finds all of the old content or all of the new.

    In a bucket a write is like this by itself; locally the file is written under another name.

    Raises:
        WriteError: it could not be written.
    """
    file = as_path(path)
    data = content.encode() if isinstance(content, str) else content
    with writing(file):
        if is_remote(file):
            file.write_bytes(data)
            return
        temporary = file.with_name(file.name + ".partial")
        try:
            temporary.write_bytes(data)
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(file: PathLike) -> Iterator[None]:
    """Names the file that could not be written.

    Raises:
        WriteError: the `with` ended in an error of the disk or the connection.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"{type(error).__name__} {error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += ": free some space there, or name another place"
        raise WriteError(f"{os.fspath(file)} could not be written: {reason}") from error
