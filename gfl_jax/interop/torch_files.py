"""Reads tensors from PyTorch checkpoints without torch and without running code from them.

A checkpoint is a pickle, and a pickle may call anything that it can name. The unpickler here only
returns `OrderedDict`, lazy tensors, and inert placeholders for a fixed list of harmless names found
with weights (numpy scalars, training logs, ...). Any other name makes it reject the whole file.
"""

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from gfl_jax.errors import InputError, MissingFileError

_LEGACY_HEADER = (0x1950A86A20F9469CFC6C, 1001)  # magic number, protocol version

_STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "BoolStorage": np.dtype(np.bool_),
    "ByteStorage": np.dtype(np.uint8),
    "CharStorage": np.dtype(np.int8),
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ShortStorage": np.dtype(np.int16),
}


class _ForbiddenGlobalError(Exception):
    """The file names a global that is not allowed; the only argument is that name."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Inert:
    """Stands for an object that is never built: accepts any arguments and state, keeps none."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return object.__new__(cls)

    def __setstate__(self, *_: Any) -> None:
        pass

    # What pickle calls to fill sets, lists and dictionaries.
    add = append = extend = __setitem__ = __setstate__


class _Tensor(_Inert):
    """A tensor whose storage has not been read yet; `offset` and `stride` count elements."""

    storage: _Storage
    offset: int
    size: tuple
    stride: tuple

    def __new__(cls, storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> Any:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        size, stride = tuple(size), tuple(stride)  # a list could still change after the check
        if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor with a bad offset, size or stride")
        tensor = object.__new__(cls)
        tensor.storage, tensor.offset, tensor.size, tensor.stride = storage, offset, size, stride
        return tensor

    def numpy(self, data: bytes, byteorder: str) -> np.ndarray:
        """Copies the tensor out of its storage, which holds `data`.

        The bounds are checked in Python's integers, which do not overflow as numpy's could.
        """
        dtype = self.storage.dtype
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if 0 in self.size:
            return np.zeros(self.size, dtype)
        if (last + 1) * dtype.itemsize > len(data):
            raise EOFError(f"a tensor ends past its storage {self.storage.key!r}")
        words = np.frombuffer(data, f"u{dtype.itemsize}")
        if byteorder != sys.byteorder:
            words = words.byteswap()
        strides = [s * dtype.itemsize for s in self.stride]
        return np.ndarray(self.size, dtype, words, self.offset * dtype.itemsize, strides).copy()


class _Parameter(_Inert):
    """The tensor that a parameter wraps."""

    def __new__(cls, data: _Tensor, *_: Any) -> Any:
        return data


_BUILTINS = "bool bytearray complex dict float frozenset getattr int list set str tuple"

# Nothing but OrderedDict and the classes above is ever called. `getattr` is on the list because
# mmengine's HistoryBuffer pickles its methods with it; its placeholder looks nothing up.
_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _Tensor,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_parameter": _Parameter,
    "torch._utils._rebuild_parameter_with_state": _Parameter,
    "torch.nn.parameter.Parameter": _Parameter,
    **{f"torch.{name}": name for name in _STORAGES},
    **{
        f"{module}.{name}": _Inert
        for module, names in {
            "__builtin__": _BUILTINS,
            "builtins": _BUILTINS,
            "_codecs": "encode",
            "argparse": "Namespace",
            "collections": "Counter defaultdict",
            "mmengine.config.config": "ConfigDict",
            "mmengine.logging.history_buffer": "HistoryBuffer",
            "numpy": "dtype ndarray",
            "numpy._core.multiarray": "_reconstruct scalar",
            "numpy.core.multiarray": "_reconstruct scalar",
            "torch": "Size device",
        }.items()
        for name in names.split()
    },
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")  # for strings from Python 2
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[f"{module}.{name}"]
        except KeyError:
            raise _ForbiddenGlobalError(f"{module}.{name}") from None

    def persistent_load(self, pid: tuple) -> _Storage:
        _, kind, key, _, _, *view = pid
        if view not in ([], [None]):
            raise pickle.UnpicklingError("a view of a storage, which torch no longer writes")
        return self.storages.setdefault(key, _Storage(key, _STORAGES[kind]))


class TorchFile(NamedTuple):
    """What a checkpoint contains.

    Attributes:
        arrays: the tensors by name.
        meta: what mmdet stores with them, with placeholders for objects.
    """

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]


def _content(checkpoint: Any, read: Callable[[str], bytes], order: str) -> TorchFile:
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, dict):
        raise TypeError("its content is not a dict")
    tensors = {name: value for name, value in checkpoint.items() if isinstance(value, _Tensor)}
    if checkpoint and not tensors:
        raise TypeError(f"no tensors in its dict of {', '.join(map(str, checkpoint))}")
    arrays = {name: value.numpy(read(value.storage.key), order) for name, value in tensors.items()}
    return TorchFile(arrays, meta if isinstance(meta, dict) else {})


def _read_zip(file: IO[bytes]) -> TorchFile:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("/data.pkl")), "data.pkl")
        root = pickled.removesuffix("data.pkl")
        order = (
            archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else "little"
        )
        with archive.open(pickled) as stream:
            checkpoint = _Unpickler(stream).load()
        return _content(checkpoint, lambda key: archive.read(f"{root}data/{key}"), order)


def _read_legacy(file: IO[bytes]) -> TorchFile:
    if (_Unpickler(file).load(), _Unpickler(file).load()) != _LEGACY_HEADER:
        raise pickle.UnpicklingError("no torch magic number")
    _Unpickler(file).load()  # sys_info: the storages are little-endian whatever it says
    unpickler = _Unpickler(file)
    checkpoint = unpickler.load()
    data = {}
    for key in _Unpickler(file).load():
        size = int.from_bytes(file.read(8), "little") * unpickler.storages[key].dtype.itemsize
        data[key] = file.read(size)
        if len(data[key]) < size:
            raise EOFError(f"the storage {key!r} is cut short")
    return _content(checkpoint, data.__getitem__, "little")


def read_torch_file(path: str | Path) -> TorchFile:
    """Reads the tensors of a `.safetensors`, `.pth` or `.pt` file.

    PyTorch's zip format and its older non-zip format are both read, without torch and without
    executing anything from the file. A dict under `state_dict`, `model_state_dict` or `model` is
    unwrapped; values that are not tensors are left out.

    Args:
        path: The file; only the suffix `.safetensors` matters, the other two formats are recognised
            by their content.

    Returns:
        The arrays by name, C-contiguous, of the tensors' shapes (conv kernels OIHW) and dtypes, and
        the checkpoint's `meta`, empty if there is none.

    Raises:
        MissingFileError: There is no such file.
        InputError: The file is truncated or not a checkpoint, or it names a global that is not
            allowed, so that reading it would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no such checkpoint file: {path}")
    with path.open("rb") as file:
        try:
            if path.suffix == ".safetensors":
                return TorchFile(load_file(path), {})
            is_zip = file.peek(4).startswith(b"PK\x03\x04")
            return _read_zip(file) if is_zip else _read_legacy(file)
        except _ForbiddenGlobalError as error:
            raise InputError(
                f"{path} was rejected: it names the global '{error}', and reading it would run code"
            ) from None
        except Exception as error:  # a damaged pickle may fail in any way
            raise InputError(
                f"{path} is truncated or not a checkpoint ({type(error).__name__}: {error})"
            ) from error
