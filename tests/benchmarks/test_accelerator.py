"""The accelerators' benchmark, as far as it goes where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).with_name("accelerator.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, str(BENCHMARK), *arguments], capture_output=True, text=True, env=environment)


def test_the_tiny_shape_runs_anywhere(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run("--json", str(out), "--shapes", "tiny", "--steps", "2", "--pair-tokens", "200")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["tiny"]
    assert found["finite"]
    # 4 pairs of 200 tokens in a row of 1,024.
    assert (found["pairs"], found["tokens"], found["microbatches"]) == (4, 800, 1)
    assert 0.0 < found["mfu"] < 1.0


def test_a_machine_without_an_accelerator_is_told(tmp_path: Path) -> None:
    done = run("--json", str(tmp_path / "out.json"))
    assert done.returncode == 1
    assert done.stderr == "there is neither a GPU nor a TPU here; --shapes tiny runs on a CPU\n"
