"""The classes of a checkpoint: what it calls them, and their rows in the class outputs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from gfl_jax.config import Experiment
from gfl_jax.errors import InputError, MissingFileError
from gfl_jax.interop.names import from_torch, to_torch, torch_name
from gfl_jax.models.network import Network, Variables


class Classes(NamedTuple):
    """Ids and names by label."""

    ids: list[int]
    names: list[str]


def classes_in(meta: Mapping[str, Any]) -> Classes | None:
    """The classes that a PyTorch file names in its `meta`; None if it names none.

    mmdetection 2.x writes `CLASSES`, 3.x and this project write `dataset_meta` with `classes`. The
    ids are those that this project wrote, otherwise 1, 2, ...
    """
    dataset = meta.get("dataset_meta")
    for holder in (dataset if isinstance(dataset, dict) else {}, meta):
        for names in (holder.get("classes"), holder.get("CLASSES")):
            names = [names] if isinstance(names, str) else names  # a comma that was forgotten
            if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
                ids = holder.get("category_ids")
                if not isinstance(ids, list | tuple) or [*map(type, ids)] != [int] * len(names):
                    ids = range(1, len(names) + 1)
                return Classes(list(ids), list(names))
    return None


def classes_of(annotations: str) -> Classes:
    """The categories of a COCO json by id.

    Raises:
        MissingFileError: there is no such file.
        InputError: it has no list of categories with ids and names.
    """
    file = Path(annotations).expanduser()
    if not file.is_file():
        raise MissingFileError(f"--annotations {annotations}: no such file")
    try:
        categories = json.loads(file.read_bytes())["categories"]
        pairs = sorted((int(category["id"]), str(category["name"])) for category in categories)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"--annotations {annotations} is no COCO json whose `categories` have an id and a name "
            f"each ({type(error).__name__}: {error})"
        ) from error
    return Classes([i for i, _ in pairs], [name for _, name in pairs])


def class_outputs(experiment: Experiment) -> dict[str, int]:
    """PyTorch's names of the arrays that predict classes, with the priors per cell of each."""
    convs = zip(experiment.model.cls_convs, experiment.detector.priors.per_cell, strict=False)
    return {f"bbox_head.{c}.{leaf}": n for c, n in convs for leaf in ("weight", "bias")}


def rows_taken(
    new: np.ndarray,
    old: np.ndarray,
    per_cell: int,
    new_names: Sequence[str],
    old_names: Sequence[str],
) -> np.ndarray | None:
    """Class outputs in which the classes of a common name, and a background, have the old rows.

    Args:
        new: [per_cell * channels, ...]; the channels of a prior are its classes and, if there is
            one, the background, which comes last.
        old: the same of another detector.
        per_cell: priors per cell.
        new_names: of the classes of `new`.
        old_names: of the classes of `old`. A name that either side has twice is not used.

    Returns:
        `new` with these rows; None if `old` has no such names or priors.
    """
    background = len(new) // per_cell - len(new_names)
    if old.shape != (per_cell * (len(old_names) + background), *new.shape[1:]) or not old_names:
        return None
    pairs = [(new_names.index(n), old_names.index(n)) for n in shared(new_names, old_names)]
    pairs += [(len(new_names) + i, len(old_names) + i) for i in range(background)]
    by_prior = new.reshape(per_cell, -1, *new.shape[1:]).copy()
    for to, of in pairs:
        by_prior[:, to] = old.reshape(per_cell, -1, *old.shape[1:])[:, of]
    return by_prior.reshape(new.shape)


def shared(new_names: Sequence[str], old_names: Sequence[str]) -> list[str]:
    """The names that both sides have exactly once."""
    return [n for n in new_names if new_names.count(n) == 1 and old_names.count(n) == 1]


def some(names: Sequence[str]) -> str:
    """Names for a message: the first ones of many."""
    shown = ", ".join(names[:8])
    return shown + f" and {len(names) - 8} more" if len(names) > 8 else shown or "none"


def in_order(
    experiment: Experiment,
    network: Network,
    variables: Variables,
    old_names: Sequence[str],
    new_names: Sequence[str],
) -> Variables:
    """The variables with the rows of their class outputs in the order of other labels.

    Args:
        experiment: whose classes they are.
        network: its network.
        variables: of it.
        old_names: what the labels are called.
        new_names: the same names as they shall be.

    Raises:
        InputError: two classes have the same name, so that their labels cannot be distinguished.
    """
    if list(old_names) == list(new_names):
        return variables
    if len(shared(new_names, old_names)) < len(new_names):
        raise InputError(
            f"the classes are {some(old_names)} in the file and {some(new_names)} in the "
            "annotations: a name that two classes share cannot be mapped"
        )
    by_name = {torch_name(path): path for path in network.paths}
    arrays, changed = network.by_path(variables), {}
    for name, per_cell in class_outputs(experiment).items():
        path = by_name[name]
        array = to_torch(path, arrays[path])
        rows = cast(np.ndarray, rows_taken(array, array, per_cell, new_names, old_names))
        changed[path] = from_torch(path, rows, arrays[path].shape)
    return network.replaced(variables, changed)
