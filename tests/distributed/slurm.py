"""srun, scancel and scontrol, as far as launch/slurm.sbatch uses them, with processes of this machine for tasks.

`install` puts them into a folder, for PATH. What they leave there: `tasks`, the ids of the tasks that run, and
`requeued`, the jobs that scontrol queued again.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def install(folder: Path) -> None:
    folder.mkdir()
    for name in COMMANDS:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n', encoding="utf-8")
        script.chmod(0o755)


def requeued(folder: Path) -> list[str]:
    found = folder / "requeued"
    return found.read_text(encoding="utf-8").split() if found.exists() else []


def srun(folder: Path, arguments: Sequence[str]) -> int:
    """Start SLURM_NTASKS tasks; the highest exit code of them, 128 and the signal's number where one ended a task."""
    program = next(n for n, argument in enumerate(arguments) if not argument.startswith("--"))
    options = dict(argument.removeprefix("--").split("=") for argument in arguments[:program])
    number = int(os.environ["SLURM_NTASKS"])
    tasks = [
        subprocess.Popen(
            arguments[program:],
            env={
                **os.environ,
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_STEP_NUM_TASKS": str(number),
            },
        )
        for index in range(number)
    ]
    (folder / "tasks").write_text(" ".join(str(task.pid) for task in tasks), encoding="utf-8")

    def kill(*_: object) -> None:
        for task in tasks:
            task.kill()

    # "srun: forcing job termination"
    signal.signal(signal.SIGTERM, kill)
    while any(task.poll() is None for task in tasks):
        if options["kill-on-bad-exit"] == "1" and any(task.returncode for task in tasks):
            kill()
        time.sleep(0.05)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def scancel(folder: Path, arguments: Sequence[str]) -> int:
    [option, job] = arguments
    assert job == os.environ["SLURM_JOB_ID"]
    name = option.removeprefix("--signal=")
    for task in (folder / "tasks").read_text(encoding="utf-8").split():
        os.kill(int(task), signal.Signals[f"SIG{name}"])
    return 0


def scontrol(folder: Path, arguments: Sequence[str]) -> int:
    [command, job] = arguments
    assert command == "requeue"
    with (folder / "requeued").open("a", encoding="utf-8") as file:
        file.write(f"{job}\n")
    return 0


COMMANDS = {"srun": srun, "scancel": scancel, "scontrol": scontrol}

if __name__ == "__main__":
    # The folder of the script that started this one stands first in PATH.
    sys.exit(COMMANDS[sys.argv[1]](Path(os.environ["PATH"].split(":")[0]), sys.argv[2:]))
