"""The campaign of faults, a few of them; and that it tells a run that was lost from one that was not."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trainee import Ended, difference

CAMPAIGN = Path(__file__).with_name("campaign.py")
KINDS = ("SIGKILL in a commit", "full disk", "damaged checkpoint", "damaged metrics")


def test_nothing_is_lost(tmp_path: Path) -> None:
    only = [word for kind in KINDS for word in ("--only", kind)]
    out = tmp_path / "campaign.json"
    command = [sys.executable, CAMPAIGN, "--runs", "4", "--seed", "0", "--json", out, "--variant", "dpo", *only]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["runs"] == found["resumed_exactly"] + found["clear_error"] == 4
    assert found["lost"] == 0
    # It is gone on from: nothing is left to do.
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert json.loads(out.read_text()) == found


def change(run: Path) -> None:
    path = run / "metrics.jsonl"
    *lines, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, json.dumps({**json.loads(last), "loss": 0.5}) + "\n"]))


def lose_a_line(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def flip(run: Path) -> None:
    path = run / "export" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change, "metrics.jsonl, step 6: loss 0.5 for"),
        (lose_a_line, "metrics.jsonl has steps [0, 1, 2, 3, 4, 5]"),
        (flip, "export/model.safetensors differs"),
        (lambda run: (run / "summary.json").unlink(), "summary.json missing"),
        (lambda run: (run / "export" / "config.json").unlink(), "export/config.json missing"),
    ],
)
def test_what_is_not_the_same_is_seen(damage: Callable[[Path], None], told: str, whole: Path, tmp_path: Path) -> None:
    ours = tmp_path / "run"
    shutil.copytree(whole, ours)
    assert difference(ours, whole, exactly=True) is None
    assert difference(ours, whole, exactly=False) is None
    damage(ours)
    found = difference(ours, whole, exactly=True)
    assert found is not None
    assert found.startswith(told)


def test_lines_may_be_given_up(whole: Path, tmp_path: Path) -> None:
    ours = tmp_path / "run"
    shutil.copytree(whole, ours)
    path = ours / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[-3:]))
    assert difference(ours, whole, exactly=True, lines_from=4) is None
    assert difference(ours, whole, exactly=True, lines_from=3) == "metrics.jsonl has steps [4, 5, 6]"
    lose_a_line(ours)
    assert difference(ours, whole, exactly=True, lines_from=4) == "metrics.jsonl has steps [4, 5]"


def test_a_clear_error_is_one_paragraph_of_every_process() -> None:
    clear = "loading …\nerror: output_dir run cannot be used.\n"
    assert Ended((2, 2), (clear, clear), 1.0).told == "error: output_dir run cannot be used."
    assert Ended((2, 1), (clear, clear), 1.0).told is None
    assert Ended((2, 2), (clear, "loading …\n"), 1.0).told is None
    assert Ended((2,), ("Traceback (most recent call last):\n" + clear,), 1.0).told is None
