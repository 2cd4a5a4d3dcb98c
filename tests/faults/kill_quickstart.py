"""Kill the quickstart's DPO stage at random moments, resume it each time, and compare with a run left in peace.

    python tests/faults/kill_quickstart.py --kills 10 --seed 0

The SFT stage is trained once and every run starts from it. A run left in peace tells how long the DPO stage takes;
another is killed with SIGKILL at moments drawn from that time and started again with the same command each time, which
goes on from what was saved. When it ends although kills are left, the next victim begins anew. Exit code 0 means: the
weights of every victim are equal to those of the run left in peace, bit for bit, and so is what metrics.jsonl says of
every step. Takes some minutes; pytest leaves it alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Quickstart:
    """The quickstart in a folder of its own, its reference table included."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self) -> "subprocess.Popen[bytes]":
        overrides = (f"output_dir={self.run}", f"reference.cache_dir={self.folder}/reference")
        log = (self.folder / "log").open("ab")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "jaxpo.launch", "train", str(CONFIG), *overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def to_its_end(self) -> None:
        code = self.start().wait()
        if code != 0:
            sys.exit(f"exit code {code}: {self.tail()}")

    def tail(self) -> str:
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-20:])

    def records(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def checkpoints(self) -> list[int]:
        folder = self.run / "checkpoints"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.exists() else []

    def doing(self) -> str:
        """What the killed process was at, by the last thing it said and by what it left half done."""
        said = [line for line in (self.folder / "log").read_text(errors="replace").splitlines() if line.strip()][-1]
        checkpoints, table = self.run / "checkpoints", self.folder / "reference"
        left = [
            name
            for name, there in (
                ("table", table.exists() and len(list(table.glob("*/complete.json"))) < 2),
                ("checkpoint", checkpoints.exists() and any(checkpoints.glob("*tmp*"))),
                ("export", any(self.run.glob(".export.new-*"))),
            )
            if there
        ]
        return f"{said[:48]}{'  half done: ' + ', '.join(left) if left else ''}"

    def weights(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (self.run / "export").glob("*.safetensors")}


def after_sft(folder: Path) -> Quickstart:
    """The quickstart up to the end of its SFT stage: killed as soon as that has its summary."""
    made = Quickstart(folder)
    folder.mkdir()
    process = made.start()
    done = made.run / "stages" / "sft" / "summary.json"
    while not done.exists():
        if process.poll() is not None:
            sys.exit(f"the SFT stage ended with exit code {process.returncode}: {made.tail()}")
        time.sleep(0.05)
    process.kill()
    process.wait()
    for path in made.run.iterdir():
        if path.name != "stages":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder / "reference", ignore_errors=True)
    (folder / "log").unlink()
    return made


def copied(made: Quickstart, folder: Path) -> Quickstart:
    shutil.copytree(made.folder, folder)
    return Quickstart(folder)


def dies(quickstart: Quickstart, moment: float) -> bool:
    """Start it and kill it after `moment` seconds; False if it has ended by then, as it should."""
    process = quickstart.start()
    try:
        code = process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        code = process.wait()
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"exit code {code}: {quickstart.tail()}")
    return code != 0


def learnt(record: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what the clock has written."""
    return {name: value for name, value in record.items() if not name.endswith("_per_s")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="kill-quickstart-") as name:
        folder = Path(name)
        made = after_sft(folder / "sft")
        peace = copied(made, folder / "peace")
        start = time.perf_counter()
        peace.to_its_end()
        whole = time.perf_counter() - start
        print(f"left in peace: {whole:.1f} s, {len(peace.records())} lines in metrics.jsonl", flush=True)

        print(f"{'kill':>4} {'victim':>6} {'after':>8} {'logged':>7} {'saved':>6}  at")
        victims = [copied(made, folder / "victim-1")]
        kills = 0
        while kills < arguments.kills:
            moment = draw.uniform(0.1 * whole, whole)
            if not dies(victims[-1], moment):
                victims.append(copied(made, folder / f"victim-{len(victims) + 1}"))
                continue
            kills += 1
            logged = max((record["step"] for record in victims[-1].records()), default="-")
            saved = max(victims[-1].checkpoints(), default="-")
            row = f"{kills:>4} {len(victims):>6} {moment:>6.1f} s {logged:>7} {saved:>6}  {victims[-1].doing()}"
            print(row, flush=True)
        victims[-1].to_its_end()
        differing = [victim.folder.name for victim in victims if not equal(victim, peace)]
        size = sum(map(len, peace.weights().values()))
        verdict = (
            f"DIFFERENT: {', '.join(differing)}" if differing else "equal bit for bit, metrics of every step equal"
        )
        print(f"{kills} kills of {len(victims)} victims; weights ({size:,} bytes) {verdict}")
        return 1 if differing or not size else 0


def equal(a: Quickstart, b: Quickstart) -> bool:
    """Whether two runs have ended with the same weights, and with the same metrics on the way."""
    return a.weights() == b.weights() and list(map(learnt, a.records())) == list(map(learnt, b.records()))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
