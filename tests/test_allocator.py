"""Huge pages: a process that starts anew is the same process, with malloc asking for them."""

import os
import subprocess
import sys

import pytest

from jaxpo import allocator

START = """
import os, sys
print("begin", os.getpid())
from jaxpo import allocator
allocator.start_again_with_huge_pages()
print("end", os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""


def lines(**environment: str) -> list[list[str]]:
    clean = {name: value for name, value in os.environ.items() if name != allocator.TUNABLES}
    command = [sys.executable, "-c", START, "an argument", "KEY=VALUE"]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return [line.split(" ") for line in done.stdout.splitlines()]


@pytest.mark.skipif(not allocator.available(), reason="no huge pages to ask for on this system")
def test_the_process_starts_anew_once() -> None:
    first, second, end = lines()
    assert first == second == ["begin", end[1]]
    assert end[2:] == ["glibc.malloc.hugetlb=1", "an", "argument", "KEY=VALUE"]


@pytest.mark.skipif(not allocator.available(), reason="no huge pages to ask for on this system")
def test_other_tunables_stay() -> None:
    *_, end = lines(GLIBC_TUNABLES="glibc.malloc.perturb=0")
    assert end[2] == "glibc.malloc.perturb=0:glibc.malloc.hugetlb=1"


def test_the_users_own_setting_stays() -> None:
    first, end = lines(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert first == ["begin", end[1]]
    assert end[2] == "glibc.malloc.hugetlb=0"


@pytest.mark.parametrize(
    ("library", "pages", "expected"),
    [
        (("glibc", "2.36"), "always [madvise] never", True),
        (("glibc", "2.36"), "[always] madvise never", False),
        (("glibc", "2.36"), "always madvise [never]", False),
        (("glibc", "2.36"), None, False),
        (("glibc", "2.31"), "always [madvise] never", False),
        (("", ""), "always [madvise] never", False),
    ],
)
def test_where_there_are_none_nothing_is_asked(
    library: tuple[str, str], pages: str | None, expected: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: library)
    monkeypatch.setattr(allocator, "HUGE_PAGES", tmp_path / "enabled")
    if pages is not None:
        (tmp_path / "enabled").write_text(pages, encoding="ascii")
    assert allocator.available() == expected
