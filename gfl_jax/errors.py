"""The errors that a user can fix: their message is all that is printed, without a traceback.

Each is also one of Python's own, so that callers in Python catch what they would expect. Any other
exception is a bug and keeps its traceback.
"""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Says what is wrong, where, and what would be right."""


class UsageError(UserError):
    """The command line itself cannot be understood; the program ends with status 2."""


class InputError(UserError, ValueError):
    """A value of a config, or what a file contains, cannot be used."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class WriteError(UserError, OSError):
    """A file could not be written."""


class SetupError(UserError, RuntimeError):
    """Something of the environment is missing or fails: another program, a device, a process."""


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed."""


@contextlib.contextmanager
def naming(file: object) -> Iterator[None]:
    """Puts the name of a file before the message of an InputError, unless it is in there already.

    Args:
        file: what is read or used inside the `with`.
    """
    try:
        yield
    except InputError as error:
        if str(file) in str(error):
            raise
        raise InputError(f"{file}: {error}") from error


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of an optional dependency: says which extra of this package installs it.

    Args:
        extra: name in pyproject.toml's optional dependencies.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed: it comes with the extra gfl-jax[{extra}], in a "
            f"checkout pip install '.[{extra}]'",
            name=error.name,
        ) from error
