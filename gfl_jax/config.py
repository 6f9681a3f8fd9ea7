"""The experiment as one frozen value; every field can be changed on the command line."""

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from gfl_jax.data.sources import Data
from gfl_jax.detectors.dense import Detector
from gfl_jax.distributed import Hosts
from gfl_jax.models.network import Model
from gfl_jax.models.ssd import SSDModel
from gfl_jax.training.step import Train


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that determines a run."""

    model: Model | SSDModel = Model()
    detector: Detector = Detector()
    data: Data = Data()
    train: Train = Train()


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of one of the paper's tables.

    title: as the paper calls it.  paper: AP, AP50, AP75, APS, APM, APL on COCO in percent, as far
    as the paper gives them.
    """

    title: str
    experiment: Experiment
    paper: tuple[float, ...] = ()


def load_experiment(path: str | Path) -> Experiment:
    """The value named `experiment` of a config file.

    Args:
        path: the file; or FILE.py:ROW, an entry of its dictionary `rows`, as in a table's config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file defines no Experiment of that name.
    """
    file, _, name = str(path).partition(".py:")
    values = _run(Path(f"{file}.py" if name else file))
    if name or ("rows" in values and "experiment" not in values):
        rows = values.get("rows", {})
        if name not in rows:
            raise ValueError(
                f"{file.removesuffix('.py')}.py has the rows {', '.join(rows) or '(none)'}: write "
                f"{file.removesuffix('.py')}.py:ROW with one of them, ROW is {name!r}"
            )
        return rows[name].experiment
    experiment = values.get("experiment")
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{path} must define `experiment = Experiment(...)`, found {experiment!r}")
    return experiment


def load_rows(path: str | Path) -> dict[str, Row]:
    """The dictionary named `rows` of a table's config.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file defines no rows.
    """
    rows = _run(Path(path)).get("rows")
    if not rows or not all(isinstance(row, Row) for row in rows.values()):
        raise ValueError(f"{path} must define `rows`, a dictionary of names to Row values")
    return rows


def _run(path: Path) -> dict[str, Any]:
    """What a config file defines."""
    if not path.is_file():
        known = ", ".join(sorted(p.as_posix() for p in Path("configs").glob("*.py")))
        raise FileNotFoundError(f"no config file {path}; there are: {known or 'none in configs/'}")
    # A config may import another one of its folder: `from configs.other import experiment`.
    sys.path.insert(0, str(path.resolve().parents[1]))
    try:
        return runpy.run_path(str(path))
    finally:
        sys.path.pop(0)


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
    if isinstance(value, list):
        return tuple(from_dict(None, item) for item in value)
    if not isinstance(value, dict):
        return value
    members = [k for k in get_args(kind) or (kind,) if isinstance(k, type)]
    kinds: dict[str, Any] = {k.__name__: k for k in members if dataclasses.is_dataclass(k)}
    name = value.get("kind")
    if name not in kinds:
        raise ValueError(f"{name!r} is not a kind of {', '.join(kinds)}")
    hints = get_type_hints(kinds[name])
    items = {field: item for field, item in value.items() if field != "kind"}
    if unknown := set(items) - set(hints):
        raise ValueError(f"{name} has no field {', '.join(sorted(unknown))}")
    return kinds[name](**{field: from_dict(hints[field], item) for field, item in items.items()})


@dataclasses.dataclass(frozen=True)
class TrainCommand(Experiment):
    """What train.py takes.

    workdir: where everything of the run is kept; empty: runs/<name of the config>.
    hosts: the processes that train together.
    """

    workdir: str = ""
    hosts: Hosts = Hosts()


@dataclasses.dataclass(frozen=True)
class EvalCommand(Experiment):
    """What eval.py takes.

    limit: evaluate the first images only; 0 for all.
    out: where results and pictures go; empty: the folder `eval` beside the checkpoints.
    hosts: the processes that evaluate together.
    """

    limit: int = 0
    out: str = ""
    hosts: Hosts = Hosts()


Command = TypeVar("Command", bound=Experiment)


def parse_fields(
    command: type[Command], experiment: Experiment, arguments: list[str], doc: str | None
) -> tuple[Experiment, Command]:
    """Changes fields of an experiment by `--any.field VALUE`; a mistyped one ends the program.

    Args:
        command: Experiment with further fields.
        experiment: the values to start from.
        arguments: of the command line.
        doc: shown by --help, above all fields.

    Returns:
        The experiment and the whole command.
    """
    fields = {
        field.name: getattr(experiment, field.name) for field in dataclasses.fields(Experiment)
    }
    parsed = tyro.cli(
        command,
        default=command(**fields),
        args=arguments,
        description=doc,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return Experiment(**{name: getattr(parsed, name) for name in fields}), parsed
