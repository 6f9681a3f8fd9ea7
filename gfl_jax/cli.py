"""The command line: config files, and fields as flags with their help.

A command takes a config (or a work directory) and then flags. Every field of a dataclass is a flag,
with the field's entry in the `Attributes:` section of the class as its help. Where a field holds
one of several kinds of value, the field itself is a flag too, which selects the kind:

    gfl-jax train gfl_r50_fpn_1x_coco --detector.assigner FCOS --detector.assigner.center-radius 1.5
"""

import contextlib
import dataclasses
import difflib
import runpy
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec

from gfl_jax.config import Experiment, Row
from gfl_jax.errors import InputError, MissingFileError, UsageError, UserError

Command = TypeVar("Command")

CONFIGS = Path(__file__).parent / "configs"
if not CONFIGS.is_dir():  # in a checkout they are beside the package, in a wheel inside
    CONFIGS = Path(__file__).parents[1] / "configs"


# -------------------------------------------------------------------------------- config files


def find_config(name: str | Path) -> tuple[Path, str]:
    """The file and the row that a config's name stands for.

    Args:
        name: a path, `configs/table_1a.py`, or the name of a config that comes with gfl_jax,
            `table_1a`; of a table, a row may follow: `table_1a:atss_joint`.

    Raises:
        MissingFileError: there is no such file; names those that are spelled alike.
    """
    text = str(name)
    if text.endswith(".py") or ".py:" in text:
        base, _, row = text.removesuffix(".py").partition(".py:")
        file = Path(f"{base}.py")
    else:
        base, _, row = text.partition(":")
        file = CONFIGS / f"{base}.py"
    if not file.is_file():
        known = sorted(path.stem for path in CONFIGS.glob("*.py"))
        near = difflib.get_close_matches(Path(base).name, known, n=5, cutoff=0.5)
        if file.parent != CONFIGS and not near:
            raise MissingFileError(f"there is no config file {file.absolute()}")
        near = near or known
        raise MissingFileError(
            f"there is no config {name}; of those that come with gfl_jax, did you mean "
            f"{', '.join(near)}? Files of your own are named by their path, which ends in .py"
        )
    return file, row


def load_experiment(name: str | Path) -> Experiment:
    """The value named `experiment` of a config; or of an entry of its dictionary `rows`.

    Args:
        name: see `find_config`.

    Raises:
        MissingFileError: there is no such config.
        InputError: the file defines no Experiment of that name.
    """
    file, row = find_config(name)
    values = _run(file)
    if row or ("rows" in values and "experiment" not in values):
        rows = values.get("rows", {})
        if row not in rows:
            raise InputError(
                f"{file} has the rows {', '.join(rows) or '(none)'}: write {file}:ROW with one of "
                f"them, ROW is {row!r}"
            )
        return rows[row].experiment
    experiment = values.get("experiment")
    if not isinstance(experiment, Experiment):
        raise InputError(
            f"{file} must define `experiment = Experiment(...)`, but there it is {experiment!r}"
        )
    return experiment


def load_rows(name: str | Path) -> dict[str, Row]:
    """The dictionary named `rows` of a table's config.

    Raises:
        MissingFileError: there is no such config.
        InputError: the file defines no rows.
    """
    file, _ = find_config(name)
    rows = _run(file).get("rows")
    if not rows or not all(isinstance(row, Row) for row in rows.values()):
        raise InputError(f"{file} must define `rows`, a dictionary of names to Row values")
    return rows


def run_name(name: str | Path) -> str:
    """What a run of this config is called: the file's name and the row's."""
    return Path(name).name.replace(".py:", "_").replace(":", "_").removesuffix(".py")


def _run(file: Path) -> dict[str, Any]:
    """What a config file defines.

    In a config, `configs` is a package of the files beside it and of those that come with gfl_jax:
    `from configs.gfl_r50_fpn_1x_coco import experiment` works in any folder. The files beside it
    can also be imported as beside any program: `from base import experiment`.
    """
    package = types.ModuleType("configs")
    package.__path__ = [str(file.resolve().parent), str(CONFIGS)]
    with _no_configs_imported(), _importable(file.resolve().parent):
        sys.modules["configs"] = package
        try:
            return runpy.run_path(str(file))
        except UserError as error:
            raise InputError(f"{file}: {error}") from error
        except Exception as error:
            raise InputError(f"{_place(error, file)}: {type(error).__name__}: {error}") from error


def _place(error: Exception, file: Path) -> str:
    """Where in a config, or in a file beside it that it imports, an error arose."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).resolve().parent == file.resolve().parent:
            return f"{frame.filename}, line {frame.lineno} ({frame.line})"
    return str(file)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """With the files of a folder as modules; another folder may have others of the same names."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
                del sys.modules[name]


@contextlib.contextmanager
def _no_configs_imported() -> Iterator[None]:
    """Without what was imported from `configs`, which is another package for each folder."""

    def imported() -> dict[str, types.ModuleType]:
        return {k: v for k, v in sys.modules.items() if k.partition(".")[0] == "configs"}

    before = imported()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in imported():
            del sys.modules[name]
        sys.modules.update(before)


# ------------------------------------------------------------------------------ fields as flags


@dataclasses.dataclass
class _Node:
    """A dataclass value that is not built yet.

    Attributes:
        kind: its class.
        values: of its fields; those that are dataclasses are nodes.
    """

    kind: Any
    values: dict[str, Any]


def parse_command(default: Command, arguments: list[str], prog: str, doc: str | None) -> Command:
    """A command's value with fields changed by flags; `--help` and errors end the program.

    Args:
        default: a dataclass value, `tyro.MISSING` in fields that must be given. Its first field
            is a positional argument, from which the other values may have been read.
        arguments: of the command line, the positional first.
        prog: the command's name in messages.
        doc: shown by --help, above all fields.

    Raises:
        UsageError: the positional argument comes after flags.
        SystemExit: with status 0 after --help, 2 after a mistake on the command line.
    """
    tree = _tree(default)
    _exchange(tree, arguments, "")
    with _REGISTRY:
        command = tyro.cli(_Node, default=tree, args=arguments, prog=prog, description=doc)
    first = dataclasses.fields(default)[0].name  # type: ignore[arg-type]
    if getattr(command, first) != getattr(default, first):
        raise UsageError(f"{prog}: {getattr(command, first)} must come before the flags")
    return command  # type: ignore[return-value]


def positional(arguments: list[str]) -> str | None:
    """The first argument if it is no flag."""
    return arguments[0] if arguments and not arguments[0].startswith("-") else None


def _tree(value: Any) -> Any:
    """A dataclass value as nodes, anything else as it is."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = dataclasses.fields(value)
    return _Node(type(value), {f.name: _tree(getattr(value, f.name)) for f in fields})


def _defaults(kind: Any) -> _Node:
    """The node of a class with its defaults; fields without one must be given."""
    missing = dataclasses.MISSING
    return _Node(
        kind,
        {
            f.name: _tree(
                f.default
                if f.default is not missing
                else tyro.MISSING
                if f.default_factory is missing
                else f.default_factory()
            )
            for f in dataclasses.fields(kind)
        },
    )


def _kinds(hint: Any) -> dict[str, Any]:
    """The dataclasses that a type allows, by name."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    members = get_args(hint) or (hint,)
    return {kind.__name__: kind for kind in members if dataclasses.is_dataclass(kind)}  # type: ignore[union-attr]


def _is_flat(hint: Any) -> bool:
    """Whether the flags of a field leave out its name: `Annotated[..., tyro.conf.arg(name="")]`."""
    return any(getattr(extra, "name", None) == "" for extra in get_args(hint)[1:])


def _exchange(node: _Node, arguments: list[str], prefix: str) -> None:
    """Puts the defaults of a kind where a flag names that kind: `--detector.box Gaussian`.

    Where flags leave out the choice's name, so does one that a kind needs: `--data.prepared DST`.
    """
    for name, hint in get_type_hints(node.kind, include_extras=True).items():
        flag = f"{prefix}{name}"
        kinds = _kinds(hint)
        chosen = _last_value(arguments, flag) if len(kinds) > 1 else None
        if chosen is None and len(kinds) > 1 and _is_flat(hint):
            chosen = _needing(kinds, arguments, prefix)
        if chosen in kinds:
            node.values[name] = _defaults(kinds[chosen])
        if isinstance(node.values.get(name), _Node):
            _exchange(node.values[name], arguments, prefix if _is_flat(hint) else f"{flag}.")


def _needing(kinds: dict[str, Any], arguments: list[str], prefix: str) -> str | None:
    """The kind that cannot do without one of these flags."""
    for name, kind in kinds.items():
        needed = [f for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
        if any(_last_value(arguments, f"{prefix}{f.name}") is not None for f in needed):
            return name
    return None


def _last_value(arguments: list[str], flag: str) -> str | None:
    """What follows the last `--flag`, after a space or an equals sign."""
    value = None
    for i, argument in enumerate(arguments):
        name, equals, after = argument.partition("=")
        if name.replace("_", "-") == "--" + flag.replace("_", "-"):
            value = after if equals else "".join(arguments[i + 1 : i + 2])
    return value


_REGISTRY = ConstructorRegistry()


@_REGISTRY.struct_rule
def _flags(info: tyro.constructors.StructTypeInfo) -> StructConstructorSpec | None:
    """The flags of a node: one for the kind of each choice, and those of its fields."""
    if info.type is not _Node:
        return None
    node: _Node = info.default
    hints = get_type_hints(node.kind, include_extras=True)
    help_of = {
        entry.arg_name: entry.description
        for base in reversed(node.kind.__mro__)
        for entry in docstring_parser.parse(base.__doc__ or "").params
    }
    flags = []
    for name in (field.name for field in dataclasses.fields(node.kind)):
        value, hint, text = node.values[name], hints[name], help_of.get(name)
        if len(kinds := _kinds(hint)) > 1:
            choice = Annotated[Literal[tuple(kinds)], tyro.conf.arg(name=name)]  # type: ignore[valid-type]
            flags.append(StructFieldSpec(f"{name} kind", choice, value.kind.__name__, text))  # type: ignore[arg-type]
        if isinstance(value, _Node):
            text = docstring_parser.parse(value.kind.__doc__ or "").short_description
            extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
            hint = Annotated[(_Node, *extras)] if extras else _Node  # type: ignore[assignment]
        flags.append(StructFieldSpec(name, hint, value, text))

    def build(**values: Any) -> Any:
        return node.kind(**{name: values[name] for name in node.values})

    return StructConstructorSpec(build, tuple(flags))
