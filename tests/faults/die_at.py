"""Run jaxpo's command line and kill it with SIGKILL at a point: die_at.py POINT COUNT DELAY ARGUMENT...

The process dies at the COUNTth time that it comes to POINT, DELAY seconds after that: threads that write in the
background go on until then. No handler, no `finally` and no flush runs, as when the machine takes the process away.
With a COUNT of 0 it lives, and says at its end how often it came to POINT.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from jaxpo import atomic, launch, prepare, run
from jaxpo.data import dataset
from jaxpo.evaluation import plots, report
from jaxpo.models import export
from jaxpo.reference.store import ReferenceTable
from jaxpo.training import evaluate, loop
from jaxpo.training.checkpoint import Checkpoints

# Where functions are called, before or after which the process dies. What takes its name by a rename is there from then
# on: a checkpoint, a table's key, an export, a line of metrics.jsonl that is written again.
POINTS: dict[str, tuple[str, list[tuple[Any, str]]]] = {
    "scratch": ("after", [(prepare, "export")]),
    "tokens": ("before", [(dataset, "_fingerprint")]),
    "config": ("before", [(run, "write_dropped")]),
    "reference": ("after", [(ReferenceTable, "write")]),
    "step": ("before", [(loop, "OpenStep")]),
    "sync": ("after", [(loop, "move")]),
    "checkpoint": ("after", [(Checkpoints, "save")]),
    "evaluation": ("before", [(evaluate, "total")]),
    "plots": ("before", [(plots, "write")]),
    "weights": ("after", [(export, "write")]),
    "small files": ("before", [(export, "_write_json")]),
    "export": ("before", [(atomic, "replace_folder")]),
    "exported": ("after", [(atomic, "replace_folder")]),
    "summary": ("before", [(report, "show")]),
    "rename": ("before", [(os, "rename"), (os, "replace")]),
    "renamed": ("after", [(os, "rename"), (os, "replace")]),
}


def dying(function: Callable[..., Any], when: str, calls: "count[int]", last: int, delay: float) -> Callable[..., Any]:
    """The function, which kills the process at the call that is the LASTth of `calls`."""

    def die() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        dies = next(calls) == last
        if dies and when == "before":
            die()
        result = function(*args, **kwargs)
        if dies:
            die()
        return result

    return wrapped


if __name__ == "__main__":
    point, last, delay, *arguments = sys.argv[1:]
    when, places = POINTS[point]
    calls = count(1)
    for owner, name in places:
        setattr(owner, name, dying(getattr(owner, name), when, calls, int(last), float(delay)))
    code = launch.main(arguments)
    if last == "0":
        print(f"came to {point} {next(calls) - 1} times")
    sys.exit(code)
