"""Run jaxpo's command line and kill it with SIGKILL at a point: die_at.py POINT COUNT DELAY ARGUMENT...

The process dies at the COUNTth time that it comes to POINT, DELAY seconds after that: threads that write in the
background go on until then. No handler, no `finally` and no flush runs, as when the machine takes the process away.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from jaxpo import atomic, launch, run
from jaxpo.evaluation import plots, report
from jaxpo.reference.store import ReferenceTable
from jaxpo.training import evaluate, loop
from jaxpo.training.checkpoint import Checkpoints

# Where a function of jaxpo is called, before or after which the process dies.
POINTS: dict[str, tuple[Any, str, str]] = {
    "config": (run, "write_dropped", "before"),
    "reference": (ReferenceTable, "write", "after"),
    "step": (loop, "OpenStep", "before"),
    "sync": (loop, "move", "after"),
    "checkpoint": (Checkpoints, "save", "after"),
    "evaluation": (evaluate, "total", "before"),
    "plots": (plots, "write", "before"),
    "export": (atomic, "replace_folder", "before"),
    "exported": (atomic, "replace_folder", "after"),
    "summary": (report, "show", "before"),
}


def dying(function: Callable[..., Any], when: str, count: int, delay: float) -> Callable[..., Any]:
    """The function, which kills the process at its COUNTth call."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs) if calls < count or when == "after" else None
        if calls == count:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


if __name__ == "__main__":
    point, count, delay, *arguments = sys.argv[1:]
    owner, name, when = POINTS[point]
    setattr(owner, name, dying(getattr(owner, name), when, int(count), float(delay)))
    sys.exit(launch.main(arguments))
