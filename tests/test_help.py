"""Every command explains itself: help beside each flag, and status 2 for a mistake."""

import dataclasses
import importlib
import inspect
import re
from typing import get_type_hints

import docstring_parser
import pytest

from gfl_jax.__main__ import COMMANDS, main
from gfl_jax.cli import _kinds
from gfl_jax.evaluate import EvalCommand
from gfl_jax.tools.preflight.command import PreflightCommand
from gfl_jax.tools.push import PushCommand
from gfl_jax.tools.report.command import ReportCommand
from gfl_jax.tools.report.compare import CompareCommand
from gfl_jax.train import TrainCommand


def kinds_below(kind, known=()):
    """A dataclass and all that its fields may hold, of every choice each kind."""
    found = [*known]
    if kind not in found:
        found.append(kind)
        for hint in get_type_hints(kind, include_extras=True).values():
            for below in _kinds(hint).values():
                found = kinds_below(below, found)
    return found


COMMAND_CLASSES = (
    TrainCommand,
    EvalCommand,
    PreflightCommand,
    ReportCommand,
    CompareCommand,
    PushCommand,
)
KINDS = list(dict.fromkeys(kind for command in COMMAND_CLASSES for kind in kinds_below(command)))


def documented(owner):
    """The entries of a docstring's Attributes or Args."""
    docs = [
        docstring_parser.parse(base.__doc__ or "") for base in getattr(owner, "__mro__", [owner])
    ]
    return {
        entry.arg_name: entry.description or "" for doc in reversed(docs) for entry in doc.params
    }


def test_every_choice_is_looked_at():
    names = {kind.__name__ for kind in KINDS}
    assert {"ATSS", "FoveaBox", "SSDModel", "Backbone", "SoftmaxMining", "Hosts", "Train"} <= names
    assert len(names) == len(KINDS) > 35


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_its_own_entry(kind):
    entries = documented(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    assert {name for name in fields if not entries.get(name, "").strip()} == set()
    own = {entry.arg_name for entry in docstring_parser.parse(kind.__doc__).params}
    assert own <= fields, "an entry of no field"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_group_of_flags_is_headed_by_what_it_is_not_by_its_fields(kind):
    summary = docstring_parser.parse(kind.__doc__).short_description
    for field in dataclasses.fields(kind):
        assert not re.search(rf"\b{field.name}:", summary)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_of_a_command_has_its_own_entry(name):
    module, _, function = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(module), function)
    parameters = set(inspect.signature(command).parameters) - {"arguments"}
    entries = documented(command)
    assert {p for p in parameters if not entries.get(p, "").strip()} == set()


def flags_without_help(printed):
    """Flags beside which a printed help says nothing."""
    text = re.sub(r"[│╭╮╰╯─]", " ", printed)
    body = text[text.index("-h, --help") :]
    parts = re.split(r"(?<!,)\n {1,3}(?=--[a-z])", re.sub(r" +\n", "\n", body))
    silent = []
    for part in parts[1:]:
        flags, *meaning = re.split(r"\n|\s{2,}", part.strip(), maxsplit=1)
        said = re.sub(r"\((default|required|repeatable).*", "", " ".join(meaning), flags=re.S)
        if not said.strip():
            silent.append(flags)
    assert len(parts) > 1
    return silent


def run(capsys, *arguments):
    """The status that the front door ends with, and what it prints on both streams."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_complete(name, capsys):
    status, printed, _ = run(capsys, name, "--help")
    assert status == 0
    assert printed.startswith(f"usage: gfl-jax {name}")
    assert flags_without_help(printed) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_on_the_command_line_ends_with_status_2(name, capsys):
    status, _, printed = run(capsys, name, "--no-such-flag", "1")
    assert status == 2
    assert "no-such-flag" in printed or "issing" in printed or "equired" in printed
