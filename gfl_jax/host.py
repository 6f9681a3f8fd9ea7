"""What has to be set before the process starts."""

import os
import sys


def use_huge_pages() -> None:
    """Restarts this command with large memory pages for big allocations (Linux with glibc).

    XLA on CPUs takes its temporary memory anew in each step; with pages of 4 KiB a fifth of a
    training step goes into faulting them in. Does nothing where GLIBC_TUNABLES is set.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)
