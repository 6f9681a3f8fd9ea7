"""The experiment as one frozen value, and as JSON."""

import dataclasses
from typing import Any, get_args, get_type_hints

from gfl_jax.data.sources import Data
from gfl_jax.detectors.dense import Detector
from gfl_jax.errors import InputError
from gfl_jax.models.network import Model
from gfl_jax.models.ssd import SSDModel
from gfl_jax.training.step import Train


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that determines a run.

    Attributes:
        model: the network.
        detector: what its outputs mean, which of them are trained to what, and by which losses.
        data: where images and boxes come from, and how they reach the network.
        train: batches, steps, learning rate, evaluations.
    """

    model: Model | SSDModel = Model()
    detector: Detector = Detector()
    data: Data = Data()
    train: Train = Train()


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables.

    Attributes:
        title: as the paper calls it.
        experiment: what is trained.
        paper: AP, AP50, AP75, APS, APM, APL on COCO in percent, as far as the paper gives them.
    """

    title: str
    experiment: Experiment
    paper: tuple[float, ...] = ()


def to_dict(value: Any) -> Any:
    """A config value as plain JSON: dataclasses as objects with their `kind`, tuples as lists."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return [to_dict(item) for item in value] if isinstance(value, tuple | list) else value


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two results of `to_dict`: 'train.lr: 0.01, now 0.02', ..."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
        return [
            line
            for field in {**old, **new}
            for line in differences(old.get(field), new.get(field), f"{name}.{field}".strip("."))
        ]
    short = [value.get("kind") if isinstance(value, dict) else value for value in (old, new)]
    return [f"{name}: {short[0]}, now {short[1]}"] if old != new else []


def from_dict(kind: Any, value: Any) -> Any:
    """The inverse of `to_dict`.

    Args:
        kind: the type to build, a dataclass, a union of such or the type of one of their fields.
        value: JSON of it. Fields that are absent take their defaults.

    Raises:
        ValueError: a kind that is not one of these, or a field that the dataclass does not have.
    """
    members = [k for k in get_args(kind) or (kind,) if isinstance(k, type)]
    kinds: dict[str, Any] = {k.__name__: k for k in members if dataclasses.is_dataclass(k)}
    if isinstance(value, list) and not kinds:
        return tuple(from_dict(None, item) for item in value)
    if not isinstance(value, dict) and not kinds:
        return value
    name = value.get("kind") if isinstance(value, dict) else value
    if not isinstance(value, dict) or not isinstance(name, str) or name not in kinds:
        raise InputError(f"{name!r} is not a kind of {', '.join(kinds)}")
    hints = get_type_hints(kinds[name])
    items = {field: item for field, item in value.items() if field != "kind"}
    if unknown := set(items) - set(hints):
        raise InputError(f"{name} has no field {', '.join(sorted(unknown))}")
    return kinds[name](**{field: from_dict(hints[field], item) for field, item in items.items()})
