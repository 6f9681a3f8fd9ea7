"""What README.md and docs/*.md tell a reader to run, as `test_documents.py` runs it."""

import ast
import functools
import importlib
import inspect
import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple, get_type_hints

from markdown_it import MarkdownIt

from gfl_jax.__main__ import COMMANDS
from gfl_jax.cli import _is_flat, _kinds

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

OURS = r"gfl-jax|python -m gfl_jax|python train\.py|python eval\.py"
"""How the front door is called; `python train.py` is `gfl-jax train`."""


class Block(NamedTuple):
    """A block of code of a page.

    Attributes:
        place: page and line.
        text: of the block.
        is_python: whether it is a Python program, rather than lines for a shell or a sketch.
    """

    place: str
    text: str
    is_python: bool


def blocks(page: str, text: str) -> list[Block]:
    """The indented and the fenced blocks of a page, also those inside lists.

    A blank line divides what is no Python: commands may follow a sketch.
    """
    found = []
    for token in MarkdownIt().parse(text):
        if token.type in ("fence", "code_block") and token.info != "bibtex":
            line = token.map[0] + 1 + (token.type == "fence")
            is_python = _is_python(token.content)
            for part in [token.content] if is_python else re.split(r"(?<=\n)\n+", token.content):
                start = line + token.content[: token.content.index(part)].count("\n")
                found.append(Block(f"{page}:{start}", part, is_python))
    return found


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def inline(text: str) -> list[str]:
    """What stands between backquotes in a page's sentences and tables."""
    tokens = MarkdownIt().enable("table").parse(text)
    return [
        child.content
        for token in tokens
        for child in token.children or ()
        if child.type == "code_inline"
    ]


def lines(block: Block) -> list[str]:
    """The lines of a block; a backslash at the end of one joins it with the next."""
    return [line for line in re.sub(r" *\\\n *", " ", block.text).splitlines() if line.strip()]


def calls(line: str) -> list[str]:
    """The calls of the front door in a line for a shell, without its comment."""
    return [found.strip() for found in re.findall(rf"(?:{OURS})\b[^&;\"#]*", line)]


def expanded(call: str) -> list[list[str]]:
    """The command lines that a documented call stands for.

    `[--a 1 | --b 2]` may be left out, or be one of these; `x|y` is x or y; RUN... is one or more.

    Returns:
        The arguments of `gfl_jax.__main__.main` for each.
    """
    plain = re.sub(r"\[[^\]]*\]", " ", call)
    options = [o for group in re.findall(r"\[([^\]]*)\]", call) for o in group.split(" | ")]
    found = []
    for text in (plain, *(f"{plain} {option}" for option in options)):
        text = re.sub(r"^(gfl-jax|python -m gfl_jax)\b", "", text)
        text = re.sub(r"^python (train|eval)\.py", r"\1", text)
        words = [word.removesuffix("...") for word in shlex.split(text)]
        choices = [word.split("|") if word[0] != "-" else [word] for word in words if word]
        found += [list(chosen) for chosen in itertools.product(*choices)]
    return found


# ---------------------------------------------------------------------------- flags in sentences


@functools.cache
def flags_of_command(name: str) -> set[str]:
    """Every flag that a command can have, with those of all kinds of all choices."""
    module, _, function = COMMANDS[name][0].partition(":")
    owner = importlib.import_module(module)
    parameters = inspect.signature(getattr(owner, function)).parameters
    if list(parameters) != ["arguments"]:
        return {_flag(parameter) for parameter in parameters}
    kind = next(v for n, v in vars(owner).items() if n.endswith("Command"))
    return set(_flags_of_kind(kind, ""))


def _flags_of_kind(kind: type, prefix: str):
    for name, hint in get_type_hints(kind, include_extras=True).items():
        yield _flag(prefix + name)
        for below in _kinds(hint).values():
            yield from _flags_of_kind(below, prefix if _is_flat(hint) else f"{prefix}{name}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def flags_in(text: str) -> list[str]:
    """The flags in a piece of text, as `flags_of_command` spells them."""
    found = re.findall(r"(?:^|[\s(\[|])(--[A-Za-z][\w.-]*)", text)
    return [re.sub(r"([.-])no-", r"\1", flag).replace("_", "-") for flag in found]


def unknown_flags(text: str) -> list[str]:
    """Flags in a piece of text that its command does not have; without a command, that none has."""
    named = re.search(rf"(?:{OURS}) ?([a-z]*)", text)
    name = named and (named[1] or re.sub(r"python (\w+)\.py.*", r"\1", named[0].strip()))
    commands = [name] if name in COMMANDS else list(COMMANDS)
    known = set().union(*map(flags_of_command, commands))
    return [flag for flag in flags_in(text) if flag not in known]
