"""A training that faults happen to: how it is started, what came of it, what lies on the disk, whether it is right.

Every process is the leader of a group of its own, and what is left of the group ends with it.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from command import COMPILED, DIE_AT
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
METRICS = "metrics.jsonl"
PERIOD = 0.02
# Seconds in which a process of several ends when another one has been killed: gloo tells at once.
SOON = 90.0
TERMINATED = 128 + signal.SIGTERM
# What has to be there when a run has ended well, and to be equal to that of the undisturbed run but for the clock.
SUMMARY = ("before", "after", "steps", "stopped", "examples", "exported_step", "dropped", "truncated")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Ended:
    """What came of one start: the exit code of each process, None where it had to be killed for it did not end."""

    codes: tuple[int | None, ...]
    printed: tuple[str, ...]
    seconds: float

    @property
    def good(self) -> bool:
        return set(self.codes) == {0}

    @property
    def traceback(self) -> bool:
        return any("Traceback (most recent call last)" in text for text in self.printed)

    @property
    def told(self) -> str | None:
        """The paragraph of a clear error, None unless every process ended with exit code 2 and one."""
        found = [re.findall(r"^error: .*$", text, re.MULTILINE) for text in self.printed]
        return found[0][-1] if set(self.codes) == {2} and all(found) and not self.traceback else None

    @property
    def last_words(self) -> str:
        lines = [line for text in self.printed for line in text.splitlines() if line.strip()]
        wanted = ("error:", "going on from", "SIGTERM:", "holds a finished run", "interrupted")
        said = [line for line in lines if line.startswith(wanted) or "holds a finished run" in line] or lines[-1:]
        return " | ".join(said)[:600]


@dataclass(frozen=True)
class Trainee:
    """`jaxpo.launch train` with all of its places under `folder`, in so many processes of one device each."""

    folder: Path
    config: Path
    changes: tuple[str, ...] = ()
    processes: int = 1
    timeout: float = 300.0
    logs: list[Path] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self, dying: Mapping[int, Sequence[str]] = MappingProxyType({})) -> list["subprocess.Popen[bytes]"]:
        """All processes. dying: by number of a process, where `die_at` is to kill it."""
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        places = (f"output_dir={self.run}", f"reference.cache_dir={self.reference}", f"data.cache_dir={self.data}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        started = []
        for number in range(self.processes):
            program = [str(DIE_AT), *dying[number]] if number in dying else ["-m", "jaxpo.launch"]
            place = ["--coordinator", coordinator, "--processes", str(self.processes), "--process", str(number)]
            command = [sys.executable, *program, "train", str(self.config), *places, *self.changes]
            self.folder.mkdir(parents=True, exist_ok=True)
            self.logs.append(self.folder / f"{len(self.logs)}.log")
            with self.logs[-1].open("wb") as log:
                started.append(
                    subprocess.Popen(
                        command + (place if self.processes > 1 else []),
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        cwd=ROOT,
                    )
                )
        return started

    def end(self, started: Sequence["subprocess.Popen[bytes]"], since: float, timeout: float | None = None) -> Ended:
        """Wait for all of them; what does not end in time is killed."""
        until = time.monotonic() + (timeout or self.timeout)
        while any(process.poll() is None for process in started) and time.monotonic() < until:
            time.sleep(PERIOD)
        codes = tuple(process.poll() for process in started)
        end_all(started)
        printed = tuple(log.read_text(encoding="utf-8", errors="replace") for log in self.logs[-len(started) :])
        return Ended(codes, printed, round(time.monotonic() - since, 1))

    def to_its_end(self, dying: Mapping[int, Sequence[str]] = MappingProxyType({})) -> Ended:
        since = time.monotonic()
        started = self.start(dying)
        try:
            return self.end(started, since)
        finally:
            end_all(started)

    def signalled(self, what: signal.Signals, who: Sequence[int], moment: Callable[["Trainee"], bool]) -> Ended:
        """A start in which these processes get a signal, once `moment` has come."""
        since = time.monotonic()
        started = self.start()
        try:
            until = since + self.timeout
            while not moment(self) and all(p.poll() is None for p in started) and time.monotonic() < until:
                time.sleep(PERIOD)
            for number in who:
                if started[number].poll() is None:
                    started[number].send_signal(what)
            return self.end(started, since, SOON if what == signal.SIGKILL else None)
        finally:
            end_all(started)

    # What lies on the disk.

    def saved(self) -> list[int]:
        """The steps that are saved."""
        folder = self.run / "checkpoints"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []

    def logged(self) -> list[int]:
        """The steps whose lines are whole."""
        path = self.run / METRICS
        text = path.read_text(errors="replace") if path.is_file() else ""
        return [int(found) for found in re.findall(r'^\{"step": (\d+),.*\}\n', text, re.MULTILINE)]

    def chunks(self) -> dict[Path, int]:
        """The chunks of the reference tables, each with the time it was written."""
        return {
            path: path.stat().st_mtime_ns for path in self.reference.glob("*/logps/c.*") if path.suffix != ".__lock"
        }


def end_all(started: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Kill what is left of the processes' groups."""
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock has written."""
    text = (run / METRICS).read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in record.items() if not key.endswith("_per_s")} for record in records]


def difference(ours: Path, theirs: Path, exactly: bool, lines_from: int = 0) -> str | None:
    """How a run that has ended well differs from the undisturbed one, None if it does not.

    exactly: to the bit; otherwise losses to 1e-5 and weights in norm. lines_from: the first step whose metrics are not
    given up.
    """
    there = {path.name for path in theirs.iterdir()} | {f"export/{path.name}" for path in (theirs / "export").iterdir()}
    if missing := sorted(name for name in there if not (ours / name).exists()):
        return f"{', '.join(missing)} missing"
    mine, others = lines(ours), [record for record in lines(theirs) if record["step"] >= lines_from]
    if [record["step"] for record in mine] != [record["step"] for record in others]:
        return f"metrics.jsonl has steps {[record['step'] for record in mine]}"
    for a, b in zip(mine, others, strict=True):
        differing = [key for key in a.keys() | b.keys() if not near(a.get(key), b.get(key), exactly)]
        if differing:
            found = (f"{key} {a.get(key)} for {b.get(key)}" for key in sorted(differing)[:3])
            return f"metrics.jsonl, step {a['step']}: {', '.join(found)}"
    for file in sorted((theirs / "export").glob("*.safetensors")):
        if exactly:
            if file.read_bytes() != (ours / "export" / file.name).read_bytes():
                return f"export/{file.name} differs"
            continue
        found, wanted = load_file(ours / "export" / file.name), load_file(file)
        for name, value in wanted.items():
            if np.linalg.norm(found[name] - value) > TOLERANCE * np.linalg.norm(value):
                return f"export/{file.name}: {name} differs"
    if exactly:
        for name in ("samples.json", "samples.md", "dropped.jsonl"):
            if (theirs / name).exists() and (ours / name).read_bytes() != (theirs / name).read_bytes():
                return f"{name} differs"
        mine, others = (json.loads((run / "summary.json").read_text()) for run in (ours, theirs))
        if differing := [name for name in SUMMARY if mine.get(name) != others.get(name)]:
            return f"summary.json: {', '.join(differing)}"
    return None


def near(a: Any, b: Any, exactly: bool) -> bool:
    if exactly or a is None or b is None:
        return a == b
    return abs(a - b) <= TOLERANCE * (1.0 + abs(b))


def left_behind(ours: Path, theirs: Path) -> list[str]:
    """Names in a run's folder that the undisturbed run has not: what a fault has left there for good."""
    return sorted({path.name for path in ours.iterdir()} - {path.name for path in theirs.iterdir()})
