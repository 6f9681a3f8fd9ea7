"""What a command shares with the terminal: errors without tracebacks, Ctrl-C, odd encodings."""

import contextlib
import functools
import io
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

from gfl_jax.errors import UsageError, UserError
from gfl_jax.hosts import INTERRUPTED


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with the message of an error that a user can fix; others pass.

    Those are `UserError`, and what the system itself says of files, disks and connections. Status 2
    if the command line cannot be understood, otherwise 1.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and error.errno is None:
            raise  # an OSError of a library's own
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


@functools.cache
def interrupts_end() -> None:
    """From now on Ctrl-C is never lost, and a second one ends the program at once.

    Where the first is raised in a callback, of Python's garbage collection for instance, Python
    drops it: it is raised again. A thread watches for the second: Python's handlers wait until a
    compilation or a write has returned. It also says so where the first has not ended the program
    soon.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # called by somebody's program, whose signals are its own affair
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    again: list[bool] = []
    hook = sys.unraisablehook

    def unless_interrupt(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            hook(unraisable)
            return
        again.append(True)
        left = threading.Event()

        def raise_again() -> None:
            left.wait()  # in this hook it would be dropped once more
            time.sleep(0.05)
            # To the main thread, where it ends a wait.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        threading.Thread(target=raise_again, daemon=True).start()
        left.set()

    sys.unraisablehook = unless_interrupt

    def wait_for_one() -> None:
        while os.read(reader, 1) != bytes([signal.SIGINT]) or (again and again.pop()):
            pass

    def watch() -> None:
        wait_for_one()
        words = b"\nCtrl-C: stops after what is running now; again: ends without saving\n"
        notice = threading.Timer(1.0, os.write, (2, words))
        notice.daemon = True
        notice.start()
        wait_for_one()
        notice.cancel()
        os.write(2, b"\nCtrl-C twice: ended without saving\n")
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the program as an error does: what `finally` says is still done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def plain_warnings() -> None:
    """Prints warnings for users without the line of code that they come from.

    And leaves out what libraries say beside the error that ends a program:

    * Orbax logs every failed write with its traceback, from several threads, and raises it too.
    * Of tensorstore's writes the others come back to an event loop that has ended, and some of
      Orbax's coroutines never start.
    * Python's resource tracker, a process of its own, removes the shared memory of workers.
    """
    import absl.logging  # whose records name their caller only if its logger is made first

    for name in (absl.logging.get_absl_logger().name, "asyncio"):
        logging.getLogger(name).addFilter(
            lambda record: (
                record.levelno < logging.ERROR
                or "orbax" not in record.pathname + record.getMessage()
            )
        )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    usual = warnings.formatwarning

    def in_words(message: Warning | str, category: type[Warning], *args: Any, **named: Any) -> str:
        plain = category is UserWarning
        return f"warning: {message}\n" if plain else usual(message, category, *args, **named)

    warnings.formatwarning = in_words
    hook = sys.unraisablehook

    def unless_late(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = unless_late


def write_anything() -> None:
    """Lets names that the terminal's encoding does not have be printed, as backslash escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
