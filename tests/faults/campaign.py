"""Fault after fault, drawn from a seed, each on a run of its own; then the same command again, until the run has ended.

    python tests/faults/campaign.py --runs 57 --seed 0 --json campaign.json

Each run ends in one of three ways, by comparison with the same run undisturbed: every line of metrics.jsonl, the
exported weights, samples and figures are equal to the bit (of two processes: losses and weights to 1e-5).

  resumed_exactly  the same command, given again, ended like the undisturbed run
  clear_error      so it did once what the messages said was done: exit code 2, and a paragraph that says it
  lost             anything else: a traceback, another result, a hang, a checkpoint or a chunk of the reference table
                   that was on the disk and was not gone on from, a message that does not help

The campaign ends only what it has started, each process in a group of its own, with a time limit. Full and read-only
disks are mounts in a namespace of its own, which end with it. --json is written after each run; with the same seed it
is gone on from. The exit code is 1 if anything was lost.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kinds
from kinds import Fault, Kind, Whole
from trainee import METRICS, ROOT, TERMINATED, Ended, Trainee, difference, left_behind

VERDICTS = ("resumed_exactly", "clear_error", "lost")
# Starts after the one that the fault came in.
MOST_STARTS = 6
MAY_MOUNT = "JAXPO_CAMPAIGN_MAY_MOUNT"

SAMPLES = ("samples={prompts: 2, max_new_tokens: 4}",)
LLAMA = "model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4"
TOKENIZER = "tokenizer: {vocab_size: 400, chat_template: chatml}"
SCRATCH = f"model={{scratch: {{architecture: {{{LLAMA}}}, {TOKENIZER}}}, compute_dtype: float32, remat: none}}"


@dataclass(frozen=True)
class Variant:
    """A run that faults happen to: what is changed of the tiny config, and how many processes train."""

    changes: tuple[str, ...] = ()
    processes: int = 1


VARIANTS = {
    "dpo": Variant(SAMPLES),
    "best": Variant(
        (*SAMPLES, "training.best_metric=eval_loss", "training.keep_checkpoints=1", "export.checkpoint=best")
    ),
    "moving": Variant(("reference.sync_steps=2", "reference.mixup_alpha=0.6", "training.save_every=3")),
    "scratch": Variant((SCRATCH,)),
    "two": Variant((*SAMPLES, "export.max_shard_gb=5.0e-5"), processes=2),
}
SINGLE = ("dpo", "dpo", "best", "moving", "scratch")
# Each kind of fault with the variants that it may happen to.
KINDS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "SIGKILL": (kinds.kill, SINGLE),
    "SIGKILL at a rename": (kinds.kill_at_rename, SINGLE),
    "SIGKILL in a commit": (kinds.kill_in_commit, ("dpo", "best", "moving")),
    "SIGKILL in the export": (kinds.kill_in_export, ("dpo", "best")),
    "SIGKILL in the reference": (kinds.kill_in_reference, ("dpo", "moving", "scratch")),
    "SIGKILL in tokenising": (kinds.kill_in_tokenising, ("dpo", "scratch")),
    "SIGKILL in a new model": (kinds.kill_in_scratch, ("scratch",)),
    "SIGKILL at a sync": (kinds.kill_in_sync, ("moving",)),
    "SIGTERM": (kinds.terminate, SINGLE),
    "full disk": (kinds.full_disk, SINGLE),
    "read-only folder": (kinds.read_only, ("dpo", "moving", "scratch")),
    "file in the way": (kinds.in_the_way, ("dpo",)),
    "damaged checkpoint": (kinds.damaged_checkpoint, ("dpo", "moving", "scratch")),
    "damaged reference": (kinds.damaged_reference, ("dpo", "moving")),
    "damaged data cache": (kinds.damaged_data, ("dpo", "scratch")),
    "damaged metrics": (kinds.damaged_metrics, ("dpo", "best", "moving")),
    "damaged small file": (kinds.damaged_small_file, ("dpo",)),
    "SIGKILL of one of two": (kinds.kill_one_of_two, ("two",)),
    "SIGKILL of both": (kinds.kill_both, ("two",)),
    "SIGKILL of one in a commit": (kinds.kill_one_of_two_in_commit, ("two",)),
    "SIGTERM of one of two": (kinds.terminate_one_of_two, ("two",)),
    "full disk of two": (kinds.full_disk, ("two",)),
}
MOUNTING = {"full disk", "read-only folder", "full disk of two"}


class Campaign:
    """The undisturbed runs, each made when it is first needed, and the trials against them."""

    def __init__(self, folder: Path, variants: Collection[str], keep: Path | None) -> None:
        self._folder, self._variants, self._keep = folder, variants, keep
        self._wholes: dict[str, Whole] = {}
        self._tiny = folder / "tiny"

    def make_tiny(self) -> None:
        """What all runs start from."""
        make = "import sys; from pathlib import Path; from conftest import make_tiny; make_tiny(Path(sys.argv[1]))"
        self._tiny.mkdir()
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([sys.executable, "-c", make, self._tiny], env=os.environ | paths, check=True)

    def trainee(self, name: str, variant: str) -> Trainee:
        given = VARIANTS[variant]
        return Trainee(self._folder / name, self._tiny / "dpo.yaml", given.changes, given.processes)

    def whole(self, variant: str) -> Whole:
        """The undisturbed run."""
        if variant not in self._wholes:
            trainee = self.trainee(f"{variant}-undisturbed", variant)
            ended = trainee.to_its_end({0: ("rename", "0", "0")})
            if not ended.good:
                raise SystemExit(f"the undisturbed run of {variant} ended with {ended.codes}:\n{ended.printed[0]}")
            claimed = (trainee.run / "config.yaml").stat().st_mtime
            places = {place: of(trainee) for place, of in kinds.PLACES.items()}
            self._wholes[variant] = Whole(
                folder=trainee.run,
                seconds=(trainee.run / "summary.json").stat().st_mtime - claimed,
                renames=int(re.findall(r"came to rename (\d+) times", ended.printed[0])[0]),
                sizes={place: used(path) for place, path in places.items()},
            )
        return self._wholes[variant]

    def trial(self, number: int, seed: int, kind: str) -> dict[str, Any]:
        """One fault and what came of it."""
        draw = random.Random(f"{seed}/{number}/{kind}")
        make, variants = KINDS[kind]
        variant = draw.choice([name for name in variants if name in self._variants])
        whole = self.whole(variant)
        fault = make(draw, whole)
        trainee = self.trainee(f"run-{number}", variant)
        trial = Trial(trainee, whole, fault, draw)
        since = time.monotonic()
        try:
            trial.go()
        finally:
            for of in kinds.PLACES.values():
                for folder in (of(trainee) / "checkpoints", of(trainee)):
                    if self._keep is not None and trial.why and folder.is_dir():
                        shutil.copytree(folder, self._keep / f"run-{number}" / "mounted" / folder.name)
                    # Nothing tells a folder from one that is mounted on itself.
                    kinds.unmount(folder)
        if trial.why and self._keep is not None:
            shutil.copytree(trainee.folder, self._keep / f"run-{number}", dirs_exist_ok=True)
        shutil.rmtree(trainee.folder)
        return {
            "run": number,
            "fault": kind,
            "variant": variant,
            "detail": fault.detail,
            "seen": trial.seen,
            "left_behind": trial.left_behind,
            "verdict": "lost" if trial.why else "clear_error" if trial.told else "resumed_exactly",
            "why": trial.why,
            "seconds": round(time.monotonic() - since, 1),
        }


class Trial:
    """A run with one fault: `go` makes it, and then `why` says how it was lost, None if it was not."""

    def __init__(self, trainee: Trainee, whole: Whole, fault: Fault, draw: random.Random) -> None:
        self._trainee, self._whole, self._fault, self._draw = trainee, whole, fault, draw
        self.seen: list[dict[str, Any]] = []
        self.why: str | None = None
        self.told = False
        self.left_behind: list[str] = []
        self._lines_from = 0

    def go(self) -> None:
        trainee = self._trainee
        self._fault.prepare(trainee)
        ended = self._fault.first(trainee)
        self._see(ended)
        self.why = self._wrong_at_first(ended)
        if self.why is None and ended.told is not None:
            self._do_as_told(ended.told)
        if self.why is None:
            done = self._fault.damage(trainee)
            self._fault.detail += f": {done}" if done else ""
        for _ in range(MOST_STARTS):
            if self.why is not None:
                return
            saved, chunks = trainee.saved(), trainee.chunks()
            ended = trainee.to_its_end()
            self._see(ended)
            if ended.good:
                self.why = self._wrong_at_last(ended, saved, chunks)
                self.left_behind = left_behind(trainee.run, self._whole.folder)
                return
            if ended.told is None:
                self.why = f"a start ended with {ended.codes} and no clear message"
                return
            self._do_as_told(ended.told)
        self.why = "no end: each start tells of an error, though what it says was done"

    def _see(self, ended: Ended) -> None:
        self.seen.append({"codes": ended.codes, "said": ended.last_words, "seconds": ended.seconds})

    def _wrong_at_first(self, ended: Ended) -> str | None:
        """What was wrong with the start that the fault came in."""
        trainee = self._trainee
        if None in ended.codes:
            return "a hang: a process did not end in time"
        if ended.traceback:
            return "a traceback"
        if TERMINATED in ended.codes and max(trainee.logged(), default=0) > max(trainee.saved(), default=0):
            return f"SIGTERM saved {trainee.saved()}, and the last line is of step {trainee.logged()[-1]}"
        expected = {0, TERMINATED, -signal.SIGKILL, -signal.SIGTERM}
        if -signal.SIGKILL in ended.codes:
            # Of the other one, which cannot go on alone. jax itself aborts it where its service is the first to notice.
            aborted = any("JAX distributed service detected fatal errors" in text for text in ended.printed)
            expected |= {1, -signal.SIGABRT} if aborted else {1}
        if ended.told is None and not set(ended.codes) <= expected:
            return f"exit codes {ended.codes}"
        return None

    def _wrong_at_last(self, ended: Ended, saved: list[int], chunks: dict[Path, int]) -> str | None:
        """What is wrong with a run that has ended well: work that was done again, or another result."""
        text = "\n".join(ended.printed)
        if saved and f"going on from step {saved[-1]} of" not in text and "holds a finished run" not in text:
            return f"step {saved[-1]} was saved, and the run did not go on from there"
        if again := [
            path.name for path, written in self._trainee.chunks().items() if chunks.get(path, written) != written
        ]:
            return f"chunks of the reference table computed again: {', '.join(again)}"
        exactly = self._trainee.processes == 1
        return difference(self._trainee.run, self._whole.folder, exactly, self._lines_from)

    def _do_as_told(self, message: str) -> None:
        """What a person does who reads the message; it has to say what to do."""
        self.told = True
        if found := re.search(r"to keep the other rows delete only (\S+?)(?: and (\S+))? in it", message):
            folder = re.findall(r"Delete the folder (\S+)", message)[0]
            if self._draw.random() < 0.5:
                for name in filter(None, found.groups()):
                    self._own(f"{folder}/{name}").unlink()
            else:
                shutil.rmtree(self._own(folder))
        elif found := re.search(r"Delete the folder (\S+)|checkpoint (\S+) cannot be read: .*delete it", message):
            shutil.rmtree(self._own(found[1] or found[2]))
        elif found := re.search(r"(\S+?)(?::\d+)? is damaged: .*[Mm]ove (?:it|the file) away", message):
            self._restore(self._own(found[1]))
        elif re.search(r"written|cannot be used|cannot be kept|is a file; expected a folder", message):
            self._fault.undo(self._trainee)
            self._fault.undo = lambda trainee: None
        else:
            self.why = f"the message does not say what to do: {message}"

    def _restore(self, path: Path) -> None:
        """A damaged file is moved away; metrics.jsonl is put back perhaps, for its lines would be given up."""
        if path.name != METRICS:
            path.unlink()
        elif not self._fault.damages_metrics:
            self.why = f"{path} is said to be damaged, and it was not"
        elif self._draw.random() < 0.5:
            self._fault.undo(self._trainee)
        else:
            path.unlink()
            self._lines_from = max(self._trainee.saved(), default=0)

    def _own(self, path: str) -> Path:
        """A path that a message names: nothing is taken away but what is the run's own."""
        resolved = Path(path).resolve()
        if not resolved.is_relative_to(self._trainee.folder):
            raise SystemExit(f"a message of run {self._trainee.folder.name} names {resolved}, which is not the run's")
        return resolved


def used(folder: Path) -> int:
    """Bytes that a folder takes, in whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def schedule(seed: int, runs: int, only: set[str], variants: set[str], may_mount: bool) -> list[str]:
    """The kind of each run: all of them in an order of the seed's, again and again."""
    names = [
        name
        for name, (_, of) in KINDS.items()
        if name in only and not variants.isdisjoint(of) and (may_mount or name not in MOUNTING)
    ]
    random.Random(seed).shuffle(names)
    return [names[number % len(names)] for number in range(runs)]


def table(results: list[dict[str, Any]]) -> str:
    counts = Counter((result["fault"], result["verdict"]) for result in results)
    shown = [name for name in KINDS if any(result["fault"] == name for result in results)]
    rows = [[name, *(counts[name, verdict] for verdict in VERDICTS)] for name in shown]
    rows.append(["all", *(sum(result["verdict"] == verdict for result in results) for verdict in VERDICTS)])
    head = f"{'fault':<28}" + "".join(f"{verdict:>17}" for verdict in VERDICTS)
    return "\n".join([head, *(f"{row[0]:<28}" + "".join(f"{count:>17}" for count in row[1:]) for row in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT.json")
    parser.add_argument("--only", action="append", choices=[*KINDS], help="a kind of fault (default: all)")
    parser.add_argument("--variant", action="append", choices=[*VARIANTS], help="a kind of run (default: all)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the folders of lost runs go")
    arguments = parser.parse_args()
    # So that what was started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    may_mount = os.environ.get(MAY_MOUNT) == "yes"
    variants = {*(arguments.variant or VARIANTS)}
    wanted = schedule(arguments.seed, arguments.runs, {*(arguments.only or KINDS)}, variants, may_mount)
    results: list[dict[str, Any]] = []
    if arguments.json.exists():
        before = json.loads(arguments.json.read_text(encoding="utf-8"))
        if before["seed"] == arguments.seed:
            results = [one for one in before["each"] if wanted[one["run"] : one["run"] + 1] == [one["fault"]]]
    done = {one["run"] for one in results}
    left = [(number, kind) for number, kind in enumerate(wanted) if number not in done]
    if not may_mount:
        print("no mounts can be made here: without full disks and read-only folders", flush=True)
    with tempfile.TemporaryDirectory(prefix="jaxpo-campaign-") as name:
        campaign = Campaign(Path(name).resolve(), variants, arguments.keep)
        if left:
            campaign.make_tiny()
        for number, kind in left:
            one = campaign.trial(number, arguments.seed, kind)
            results.append(one)
            print(
                f"{number:>3} {one['verdict']:<16} {one['seconds']:>6.1f} s  {kind}, {one['variant']}, {one['detail']}"
            )
            if one["why"] is not None:
                print(f"    {one['why']}")
                print("".join(f"    {start['codes']} {start['said']}\n" for start in one["seen"]), end="")
            sys.stdout.flush()
            report(arguments.json, arguments.seed, results)
    print(table(results))
    return 1 if any(one["verdict"] == "lost" for one in results) else 0


def report(path: Path, seed: int, results: list[dict[str, Any]]) -> None:
    counts = Counter(one["verdict"] for one in results)
    said = {"runs": len(results), **{verdict: counts[verdict] for verdict in VERDICTS}}
    said |= {"seed": seed, "seconds": round(sum(one["seconds"] for one in results), 1), "each": results}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(said, indent=1), encoding="utf-8")
    draft.replace(path)


def in_own_mounts() -> None:
    """Start anew in a namespace of mounts, as its root, where the system lets us; there they end with the process."""
    unshare = shutil.which("unshare")
    if MAY_MOUNT in os.environ:
        return
    if (
        unshare
        and subprocess.run(
            [unshare, "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], stderr=subprocess.DEVNULL
        ).returncode
        == 0
    ):
        os.environ[MAY_MOUNT] = "yes"
        os.execv(unshare, [unshare, "-rm", sys.executable, *sys.argv])
    os.environ[MAY_MOUNT] = "no"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    in_own_mounts()
    sys.exit(main())
