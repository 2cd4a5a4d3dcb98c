"""A training run as a process of its own, to be interrupted."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

DIE_AT = Path(__file__).with_name("die_at.py")
COMPILED = Path("~/.cache/jaxpo/xla-tests").expanduser()


@dataclass(frozen=True)
class Command:
    """`jaxpo.launch train` on the tiny DPO config with an output_dir and a reference.cache_dir of its own."""

    folder: Path
    arguments: tuple[str, ...]

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def start(self, *program: str) -> "subprocess.Popen[str]":
        # What is compiled once is not compiled again: these processes shall run, not compile.
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen(
            [sys.executable, *program, "train", *self.arguments],
            env=os.environ | cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> str:
        """The command to its end, which has to be a good one; returns what it printed."""
        process = self.start("-m", "jaxpo.launch")
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        return printed

    def killed_at(self, point: str, count: int, delay: float = 0.0) -> str:
        """The command until SIGKILL at a point of `die_at`; returns what it printed."""
        process = self.start(str(DIE_AT), point, str(count), str(delay))
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, f"not killed at {point} {count}: {printed}"
        return printed

    def terminated_after(self, line: str) -> tuple[int, str]:
        """The command until SIGTERM, sent when it has logged `line` in metrics.jsonl; returns exit code and print."""
        process = self.start("-m", "jaxpo.launch")
        metrics = self.out / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and line in metrics.read_text()):
            time.sleep(0.01)
        process.terminate()
        printed, _ = process.communicate(timeout=300)
        return process.returncode, printed


@dataclass(frozen=True)
class Commands:
    """The same training twice: to be interrupted, and to be left in peace."""

    interrupted: Command
    undisturbed: Command


def command(tiny: Path, folder: Path, *changes: str) -> Command:
    """The command with places of its own under `folder`; changes: of the config, as on the command line."""
    places = (f"output_dir={folder}/run", f"reference.cache_dir={folder}/reference")
    return Command(folder, (str(tiny / "dpo.yaml"), *places, *changes))
