"""The correspondence between our NNX parameter paths and PyTorch's parameter names.

Modules carry PyTorch's attribute paths, so that only the leaves and the axes differ:
('backbone', 'layer1', 0, 'conv1', 'kernel') HWIO is 'backbone.layer1.0.conv1.weight' OIHW.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gfl_jax.errors import InputError

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def torch_name(path: tuple) -> str:
    """Returns the PyTorch name of an NNX path.

    The leaf 'scale' under 'scales' (the scalars after the regression branch) keeps its name, and
    the 'layers' of an `nnx.Sequential`, recognised by the index after it, has no counterpart.
    """
    *modules, leaf = path
    if not (leaf == "scale" and "scales" in modules):
        leaf = _LEAVES.get(leaf, leaf)
    pairs = zip(modules, path[1:], strict=True)
    kept = [str(module) for module, after in pairs if module != "layers" or isinstance(after, str)]
    return ".".join([*kept, leaf])


def _torch_axes(path: tuple, ndim: int) -> tuple[int, ...]:
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def to_torch(path: tuple, array: Any) -> np.ndarray:
    """Lays an array out as PyTorch does: kernels (..., in, out) become (out, in, ...)."""
    array = np.asarray(array)
    return array.transpose(_torch_axes(path, array.ndim)).copy()


def from_torch(path: tuple, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Lays a PyTorch array out as NNX does: kernels (out, in, ...) become (..., in, out).

    Args:
        path: The NNX path.
        array: The array in PyTorch's layout.
        shape: The shape of the NNX variable.

    Returns:
        The array of shape `shape`, C-contiguous.

    Raises:
        ValueError: The array has another shape.
    """
    ours = np.transpose(array, np.argsort(_torch_axes(path, array.ndim)))
    if ours.shape != tuple(shape):
        raise InputError(f"{torch_name(path)}: shape {ours.shape} instead of {tuple(shape)}")
    return ours.copy()


def in_short(names: Iterable[str]) -> str:
    """Names by how they begin: 'backbone.layer1 (20 names), neck.lateral_convs (6), fc.bias'."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:2]), []).append(name)
    words = [
        group[0] if len(group) == 1 else f"{begin} ({len(group)} names)"
        for begin, group in groups.items()
    ]
    more = [f"and {len(words) - _SHOWN} other beginnings"] if len(words) > _SHOWN else []
    return ", ".join(word[:80] for word in words[:_SHOWN] + more) or "none"


_SHOWN = 8


@dataclass(frozen=True)
class Mismatch:
    """What did not match while loading; the names are PyTorch's.

    Attributes:
        missing: In the model, not in the file.
        unexpected: In the file, not in the model.
        misshapen: (name, shape in the model, shape in the file), both in PyTorch's layout.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    def raise_if_any(self, source: Any) -> None:
        """Raises InputError if there is any, naming `source` and the first of each kind."""
        sections = {
            "missing from the file": self.missing,
            "unexpected in the file": self.unexpected,
            "of another shape": [f"{n}: model {a}, file {b}" for n, a, b in self.misshapen],
        }
        lines = []
        for title, names in sections.items():
            if names:
                lines += [f"  {title} ({len(names)}):", *(f"    {name}" for name in names[:_SHOWN])]
            if len(names) > _SHOWN:
                lines += [f"    and {len(names) - _SHOWN} more: {in_short(names[_SHOWN:])}"]
        if lines:
            raise InputError("\n".join([f"{source} does not fit the model:", *lines]))


def load_state_dict(
    state: Mapping[tuple, Any], torch_dict: Mapping[str, np.ndarray], *, ignore: Iterable[str] = ()
) -> tuple[dict[tuple, Any], Mismatch]:
    """Fills the variables of a model from a PyTorch state dict.

    Args:
        state: The variables by path, as `dict(nnx.to_flat_state(state))` gives them; only their
            `shape` and `dtype` are read, so abstract ones will do.
        torch_dict: The arrays by PyTorch name, in PyTorch's layout.
        ignore: Regular expressions matched from the start of the PyTorch names; what they match
            is neither loaded nor reported. 'num_batches_tracked' is always ignored.

    Returns:
        A new mapping of the same paths, in which everything that fits is an array from
        `torch_dict` cast to the variable's dtype and the rest is unchanged; and what did not match.
    """

    def ignored(name: str) -> bool:
        return name.endswith("num_batches_tracked") or any(re.match(r, name) for r in ignore)

    ignore = tuple(ignore)
    loaded, missing, misshapen = dict(state), [], []
    names = {path: torch_name(path) for path in state}
    for path, name in names.items():
        if ignored(name):
            continue
        if name not in torch_dict:
            missing.append(name)
            continue
        shape = tuple(state[path].shape)
        expected = tuple(shape[axis] for axis in _torch_axes(path, len(shape)))
        if torch_dict[name].shape == expected:
            array = from_torch(path, torch_dict[name], shape)
            loaded[path] = array.astype(state[path].dtype, copy=False)
        else:
            misshapen.append((name, expected, torch_dict[name].shape))
    known = set(names.values())
    unexpected = [name for name in torch_dict if name not in known and not ignored(name)]
    return loaded, Mismatch(tuple(missing), tuple(unexpected), tuple(misshapen))
