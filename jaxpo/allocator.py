"""Huge pages for the large arrays that a CPU computes with.

XLA takes gigabytes anew for each step and gives them back. In pages of 4 KiB the system spends a tenth of a step of a
small model on handing them out.
"""

import os
import platform
import sys
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES, HUGETLB = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def start_again_with_huge_pages() -> None:
    """Have malloc ask for huge pages: the C library reads how it is to work as a process starts, so start anew.

    The process keeps its id, its arguments and its streams. Nothing happens where the C library or the system knows no
    such thing, or where the user has set it: `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` leaves all as it is.
    """
    given = os.environ.get(TUNABLES, "")
    if HUGETLB in given or not sys.executable or not available():
        return
    tunables = f"{given}:{HUGETLB}=1" if given else f"{HUGETLB}=1"
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, TUNABLES: tunables})


def available() -> bool:
    """Whether the C library can ask for huge pages, and the system gives them to who asks and to nobody else."""
    library, version = platform.libc_ver()
    known = library == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    return known and HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text(encoding="ascii")
