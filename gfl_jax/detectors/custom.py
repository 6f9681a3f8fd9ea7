"""Custom losses: functions of a user's own file, named in a config.

A config and a checkpoint keep the name. The file is executed when training starts, never when a
checkpoint is opened or a config is read.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
from jaxtyping import Array, Float

from gfl_jax.errors import InputError, MissingFileError


class BuiltIn:
    """A loss of this package."""

    def resolve(self) -> None:
        """There is nothing to look up."""


class Custom:
    """A loss of the user's, by its name.

    Attributes:
        function: 'path/to/file.py:name' or 'package.module:name'.
        field: of the config, for error messages.
    """

    function: str
    field: str

    def resolve(self) -> Callable:
        """Looks the function up; see `custom_function`."""
        return custom_function(self.function, self.field)

    def call(self, *arguments: Array, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        """The function's losses in float32.

        Raises:
            InputError: they are not of this shape, one for every element.
        """
        loss = jnp.asarray(self.resolve()(*arguments), jnp.float32)
        if loss.shape != shape:
            raise InputError(
                f"{self.function} returned shape {loss.shape} for arguments of shape "
                f"{arguments[0].shape}; it must return {shape}: the caller reduces"
            )
        return loss


@functools.cache
def custom_function(name: str, field: str) -> Callable:
    """Finds the function that a config names.

    Args:
        name: 'path/to/file.py:function', the path absolute or relative to where the program was
            started, or 'package.module:function'. The file is executed once.
        field: of the config, for error messages.

    Raises:
        MissingFileError: there is no such file.
        InputError: there is no such module or function.
        Exception: whatever the file raises when it is executed.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise InputError(f"{field} is {name!r}; write 'path/to/file.py:function'")
    if place.endswith(".py"):
        file = Path(place).expanduser().resolve()
        if not file.is_file():
            raise MissingFileError(f"{field} names {name!r}: there is no file {file}")
        module = _module(file)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise InputError(f"{field} names {name!r}: {error}") from error
    loss = getattr(module, function, None)
    if not callable(loss):
        functions = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and not key.startswith("_")
        ]
        raise InputError(
            f"{field} names {name!r}: {place} has no function {function}; it has "
            f"{', '.join(functions) or 'none'}"
        )
    return loss


@functools.cache
def _module(file: Path) -> ModuleType:
    """Executes a file, once."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
