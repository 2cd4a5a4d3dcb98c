"""Worker processes that are killed, and those of a parent that is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxpo.data.files import Where
from jaxpo.data.tokenise import tokenise
from jaxpo.errors import UserError

PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_tokenise import Telling, rows
from jaxpo.data.tokenise import tokenise
if __name__ == "__main__":
    list(tokenise(rows(), Telling(sys.argv[2]), 2))
"""


def rows() -> Iterator[tuple[Where, dict[str, Any]]]:
    return ((Where("rows:", n), {"text": str(n)}) for n in range(2048))


class Killed:
    """A worker that the system takes away."""

    def __call__(self, chunk: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Telling:
    """A worker that leaves its number in a folder and takes its time."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, chunk: Any) -> None:
        (Path(self.folder) / str(os.getpid())).touch()
        time.sleep(0.05)


def test_a_worker_that_is_killed_is_told() -> None:
    killed: Any = Killed()
    with pytest.raises(UserError, match=r"^data\.workers: one of the 2 processes that tokenise was killed"):
        list(tokenise(rows(), killed, 2))


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "parent.py").write_text(PARENT)
    arguments = (tmp_path / "parent.py", Path(__file__).parent, tmp_path / "workers")
    parent = subprocess.Popen([sys.executable, *map(str, arguments)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60.0
    while len(found := [int(path.name) for path in (tmp_path / "workers").iterdir()]) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert len(found) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)
