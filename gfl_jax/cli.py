"""What concerns the process rather than the program."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path


def use_huge_pages() -> None:
    """Restarts this command with large memory pages for big allocations (Linux with glibc).

    XLA on CPUs takes its temporary memory anew in each step; with pages of 4 KiB part of the step
    goes into faulting them in. Does nothing where GLIBC_TUNABLES is set.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with the message of an error that a user can mend; others pass.

    Those are missing or unreadable files, and what this project raises itself. An error that a
    library raises, or an operation in our code, is a bug and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        file, package = Path(last.filename).resolve(), Path(__file__).resolve().parent
        ours = package in file.parents or file == Path(sys.argv[0]).resolve()
        # jax leaves its own frames out: that the last one is ours is not enough.
        if isinstance(error, OSError) or (ours and (last.line or "").startswith("raise")):
            sys.exit(f"\nerror: {error}")
        raise
