"""Several processes on this machine that train as one, as on the hosts of a cluster: jax.distributed over gloo."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

COMPILED = Path("~/.cache/jaxpo/xla-tests").expanduser()
TIMEOUT = 300.0


@dataclass(frozen=True)
class Ended:
    """What came of a process: its exit code, None where it did not end, and what it printed."""

    code: int | None
    printed: str


def start(
    logs: Path,
    processes: int,
    devices: int,
    *arguments: str,
    differing: Mapping[int, Sequence[str]] = MappingProxyType({}),
    program: Sequence[str] = ("-m", "jaxpo.launch"),
) -> list["subprocess.Popen[bytes]"]:
    """`jaxpo.launch` with these arguments, once for each process, of so many simulated devices each.

    differing: arguments that some processes have besides. program: another one for Python to run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for index in range(processes):
        place = ("--coordinator", coordinator, "--processes", str(processes), "--process", str(index))
        with log_of(logs, index).open("wb") as log:
            command = (
                sys.executable,
                *program,
                *arguments,
                *differing.get(index, ()),
                *(place if processes > 1 else ()),
            )
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def log_of(logs: Path, index: int) -> Path:
    return logs / f"{index}.log"


def ended(logs: Path, started: Sequence["subprocess.Popen[bytes]"], timeout: float = TIMEOUT) -> list[Ended]:
    """Wait for all of them; those that do not end in time are killed."""
    until = time.monotonic() + timeout
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(max(0.0, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
    printed = [log_of(logs, index).read_text(encoding="utf-8", errors="replace") for index in range(len(started))]
    return [Ended(code, text) for code, text in zip(codes, printed, strict=True)]


def run(
    logs: Path,
    processes: int,
    devices: int,
    *arguments: str,
    program: Sequence[str] = ("-m", "jaxpo.launch"),
    timeout: float = TIMEOUT,
) -> list[Ended]:
    """All of them to a good end."""
    found = ended(logs, start(logs, processes, devices, *arguments, program=program), timeout)
    assert [one.code for one in found] == [0] * processes, "\n---\n".join(one.printed for one in found)
    return found


CHANGES = ("samples={prompts: 2, max_new_tokens: 4}", "export.max_shard_gb=1.0e-5")


def training(tiny: Path, folder: Path, *changes: str) -> tuple[str, ...]:
    """The arguments of a run with places of its own under `folder`."""
    places = (f"output_dir={folder}/run", f"reference.cache_dir={folder}/reference")
    return "train", str(tiny / "dpo.yaml"), *places, *CHANGES, *changes


def until(run: Path, step: int) -> None:
    """Return when a step has been logged."""
    end = time.monotonic() + TIMEOUT
    metrics = run / "metrics.jsonl"
    while time.monotonic() < end:
        if metrics.exists() and f'{{"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} was not logged in time")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, np.ndarray]:
    files = sorted((run / "export").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same losses and the same weights, to float tolerance."""
    a, b = records(ours), records(theirs)
    assert [record["step"] for record in a] == [record["step"] for record in b]
    for name in ("loss", "eval_loss", "rewards/margins", "grad_norm"):
        found, expected = ([record.get(name, 0.0) for record in one] for one in (a, b))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    exported, wanted = weights(ours), weights(theirs)
    assert exported.keys() == wanted.keys()
    for name, value in exported.items():
        # In norm: where a gradient is rounding noise, AdamW's first updates have its sign by chance.
        assert np.linalg.norm(value - wanted[name]) <= 1e-5 * np.linalg.norm(wanted[name]), name


def stopped(run: Path, step: int, to: Path) -> None:
    """A copy of a finished run as it would be had it been killed when it had saved this step."""
    shutil.copytree(run, to)
    for name in ("export", "plots"):
        shutil.rmtree(to / name, ignore_errors=True)
    for name in ("summary.json", "samples.md"):
        (to / name).unlink(missing_ok=True)
    for saved in (to / "checkpoints").iterdir():
        if int(saved.name) > step:
            shutil.rmtree(saved)
