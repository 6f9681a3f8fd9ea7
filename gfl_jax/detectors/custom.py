"""Functions of a user's own file, named in a config."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path


@functools.cache
def custom_function(name: str, field: str) -> Callable:
    """Finds the function that a config names.

    Args:
        name: 'path/to/file.py:function', the path absolute or relative to where the program was
            started, or 'package.module:function'. The file is executed once.
        field: of the config, for error messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such module or function; or an error in the file.
    """
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise ValueError(f"{field} is {name!r}; write 'path/to/file.py:function'")
    if place.endswith(".py"):
        file = Path(place).expanduser().resolve()
        if not file.is_file():
            raise FileNotFoundError(f"{field} names {name!r}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"{field} names {name!r}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        functions = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and not key.startswith("_")
        ]
        raise ValueError(
            f"{field} names {name!r}: {place} has no function {function}; it has "
            f"{', '.join(functions) or 'none'}"
        )
    return found
