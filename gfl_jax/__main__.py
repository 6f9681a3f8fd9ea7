"""The front door: `gfl-jax COMMAND ...` or `python -m gfl_jax COMMAND ...`."""

import contextlib
import difflib
import importlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

COMMANDS = {
    "train": ("gfl_jax.train:main", "train a detector, evaluate it and draw what it detects"),
    "eval": ("gfl_jax.evaluate:main", "evaluate a trained detector on a data set"),
    "predict": (
        "gfl_jax.tools.predict:main",
        "detect on images, folders and videos: pictures and tables",
    ),
    "report": (
        "gfl_jax.tools.report.command:main",
        "a page for a browser: what a detector gets wrong, what it costs, and the pictures",
    ),
    "compare": (
        "gfl_jax.tools.report.compare:main",
        "two detectors on the same images: more than chance, and where do they differ?",
    ),
    "export": ("gfl_jax.tools.export:main", "write a trained detector to copy and share"),
    "push": (
        "gfl_jax.tools.push:main",
        "upload a trained detector to the Hugging Face hub, with a model card",
    ),
    "calibrate": (
        "gfl_jax.tools.calibrate:main",
        "do intervals of box sides hold what they promise? correct them",
    ),
    "prepare": (
        "gfl_jax.tools.prepare:main",
        "check a data set (COCO, Pascal VOC, YOLO, CVAT, Label Studio) and prepare it",
    ),
    "tables": ("gfl_jax.tools.tables:main", "train the rows of the paper's tables"),
    "consistency": (
        "gfl_jax.tools.consistency:main",
        "do scores rank detections by their true IoU? (figures 1 and 2 of the paper)",
    ),
    "ambiguity": (
        "gfl_jax.tools.ambiguity:main",
        "are distributions flat where a side is unclear? (figure 3 of the paper)",
    ),
    "preflight": (
        "gfl_jax.tools.preflight.command:main",
        "compile for TPUs without one: does it fit, how fast is it?",
    ),
    "convert": ("gfl_jax.interop.convert:main", "PyTorch weights in and out"),
    "crosscheck": (
        "gfl_jax.interop.crosscheck:main",
        "compare with mmdetection stage by stage on the same images",
    ),
}
"""Name: the function, imported when it is called, and what --help says.

A function either takes the command line's `arguments` as they are, or its parameters are its flags.
"""

STOPPED = "\nstopped by Ctrl-C\n"

USAGE = (
    "usage: gfl-jax COMMAND [ARGUMENTS]\n\nGeneralized Focal Loss for dense object detection.\n\n"
    + "".join(f"  {name:<12} {text}\n" for name, (_, text) in COMMANDS.items())
    + "\n  gfl-jax COMMAND --help   what a command takes\n  gfl-jax --version"
)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command.

    Args:
        arguments: of the command line, the command first; None: those of this program.

    Raises:
        SystemExit: with status 1 after an error that a user can fix, 2 after a mistake on the
            command line, 130 after Ctrl-C, or what the command returns.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(USAGE)
        return
    if name == "--version":
        from gfl_jax import __version__

        print(f"gfl-jax {__version__}")
        return
    if not name:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    if name not in COMMANDS:
        near = "".join(
            f"; did you mean {n}?" for n in difflib.get_close_matches(name, COMMANDS)[:1]
        )
        print(f"{USAGE}\n\nerror: there is no command {name!r}{near}", file=sys.stderr)
        sys.exit(2)

    try:
        sys.exit(_run(name, rest))
    except KeyboardInterrupt:
        print(STOPPED, end="", file=sys.stderr)
        raise Interrupted(130) from None


def _run(name: str, arguments: list[str]) -> Any:
    """Runs a command; returns its status. What takes seconds to import is imported here."""
    with _loading():
        import tyro

        from gfl_jax import terminal

        terminal.write_anything()
        terminal.plain_warnings()
        module, _, function_name = COMMANDS[name][0].partition(":")
        with terminal.plain_errors():
            function = getattr(importlib.import_module(module), function_name)
        terminal.interrupts_end()
    with terminal.plain_errors():
        if list(inspect.signature(function).parameters) == ["arguments"]:
            return function(arguments)
        return tyro.cli(function, args=arguments, prog=f"gfl-jax {name}")


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Around imports, which Ctrl-C could leave half done: it ends the program at once."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual is None:
        yield
        return

    def end(*_: Any) -> None:
        os.write(2, STOPPED.encode())
        os._exit(130)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


class Interrupted(SystemExit):
    """A command that saves nothing was ended by Ctrl-C."""


def program(*arguments: str) -> None:
    """`main`, as a program: after Ctrl-C it does not wait for threads that still compute."""
    try:
        main([*arguments, *sys.argv[1:]])
    except Interrupted:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(130)


if __name__ == "__main__":
    program()
